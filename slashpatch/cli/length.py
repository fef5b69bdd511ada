"""How long a command's prompts are, and roughly how long a long run takes."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING

from ..errors import PromptError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Seconds from which a run is long enough to be announced.
_LONG = 30.0
#: Tokens of the passes that are timed: a short one always, and a longer one if the run seems long.
_TIMED = (64, 1024)


def tokens_per_prompt(model: TransformerBridge, asked: int | None, default: int) -> int:
    """Return the tokens asked for, or the default cut to the model's context.

    Raises PromptError where more are asked for than the context holds.
    """
    n_ctx = model.cfg.n_ctx
    if asked is not None and asked > n_ctx:
        raise PromptError(
            f"--max-tokens {asked} exceeds the model's context of {n_ctx} tokens; give at most "
            f"{n_ctx}"
        )
    return min(default, n_ctx) if asked is None else asked


def announce_long_run(
    model: TransformerBridge,
    n_prompts: int,
    n_tokens: int,
    n_passes: int,
    workers: str | None = None,
) -> None:
    """Print on stderr what a run will do and roughly how long it takes, if that is long.

    `n_passes` is about how often the model reads each prompt. The estimate is the time of one pass
    times the tokens: longer prompts take more than that, prompts batched together less. It is
    divided by the number of `workers`, if they are given.
    """
    from ..bridge.workers.options import as_workers

    asked = as_workers(workers)
    shared_by = 1 if asked is None else asked.count
    for limit in _TIMED:
        n_timed = min(n_tokens, limit)
        seconds = _seconds_of_pass(model, n_timed) * n_tokens / n_timed * n_prompts * n_passes
        seconds /= shared_by
        if seconds < _LONG:
            return
    prompts = "1 prompt" if n_prompts == 1 else f"{n_prompts:,} prompts"
    passes = "1 pass" if n_passes == 1 else f"about {n_passes:,} passes"
    print(
        f"slashpatch: {prompts} of {n_tokens:,} tokens, {passes} over each: roughly "
        f"{_duration(seconds)}, judged by one pass of {n_timed:,} tokens",
        file=sys.stderr,
        flush=True,
    )


def sweep_passes(model: TransformerBridge, heads: str | None, offsets: str | None) -> int:
    """Return how often a sweep reads each prompt: layers before the edited one are kept."""
    from .. import bridge

    info = bridge.read(model)
    swept = info.heads if heads is None else info.require(heads)
    n_offsets = 1 if offsets is None else len(info.require_offsets(offsets))
    shares = sum(1 - head.layer / info.n_layers for head in swept)
    return 1 + math.ceil(n_offsets * shares)


def _seconds_of_pass(model: TransformerBridge, n_tokens: int) -> float:
    """Return the seconds of one forward pass over a prompt of some tokens."""
    import torch

    from .. import bridge

    bridge.read(model)  # its own passes come first, and are not part of the time
    tokens = torch.arange(n_tokens)[None] % model.cfg.d_vocab
    start = time.perf_counter()
    with torch.no_grad():
        bridge.run_for_hooks(model, tokens.to(model.cfg.device), [])
    if torch.device(model.cfg.device).type == "cuda":
        torch.cuda.synchronize(model.cfg.device)
    return time.perf_counter() - start


def _duration(seconds: float) -> str:
    """Return a duration in the unit that a person would name."""
    for unit, size, most in (("seconds", 1, 90), ("minutes", 60, 90), ("hours", 3600, 48)):
        if seconds < most * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:,.0f} days"
