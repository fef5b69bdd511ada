"""Scan: measure slash scores, rank and logit profiles of every head over prompts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .. import bridge
from ..bridge.attached import has_per_head_keys, reads_diagonals
from ..bridge.modes import forming_matrices
from ..bridge.provenance import provenance
from ..data.progress import progress_over
from ..data.prompts import PromptSet, prompt_set
from ..errors import ModelError, OffsetError, ScanError
from ..heads import Head
from ..maths.offsets import as_offsets
from ..maths.slash_scores import slash_sums
from ..patching.fused import engine_of_layers, fused, why_not
from .moment_sums import MomentSums
from .result import Scan

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_ENGINES = ("auto", "fused", "bridge")
#: Bytes that one layer's pattern of one batch may take; bounds the batch size.
_PATTERN_BYTES = 256 * 2**20
#: Tokens of one batch in the fused engine, which forms no attention matrix.
_BATCH_TOKENS = 4096


def scan(
    model: TransformerBridge,
    prompts: Any = None,
    offsets: Any = range(16),
    engine: str = "auto",
    *,
    random_tokens: bool = False,
    n_prompts: int = 8,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    moments: bool = True,
    profile_offsets: int = 64,
    seed: int = 0,
    progress: bool | None = None,
) -> Scan:
    """Measure the slash scores of every head, averaged over prompts.

    The model is run as it is, active patches included.

    Args:
        model: A TransformerBridge in evaluation mode.
        prompts: None for natural text, or a text, texts, a file, or token ids [batch, pos]; texts
            and rows of token ids may come from a generator.
        offsets: Δ ≥ 0: an int, ints, a range, or text such as "0-15"; or "all".
        engine: "fused" computes scores without forming attention patterns; "bridge" reads the
            patterns that TransformerLens forms; "auto" is "fused" where that is exact. Both give
            the same scores.
        random_tokens: Use uniform random tokens (out of distribution) instead of natural text.
        n_prompts: Number of generated prompts; at most this many pieces of a file.
        max_tokens: Length of the prompts, at most the model's context; None: 512 or the context,
            and no limit for texts.
        batch_size: Prompts per forward pass; None: by memory. Does not change scores.
        moments: Whether to gather the sums behind `Scan.rank_one` and `Scan.profile`, which takes
            about as long again as the slash scores.
        profile_offsets: Number of offsets of `Scan.profile`, counted from 0.
        seed: Random seed of natural and random prompts.
        progress: Whether to show a progress bar; None: on a terminal only.

    Returns:
        A Scan. A prompt that is too short for an offset does not count in that offset's mean.

    Raises:
        ModelError: A model that slashpatch does not support, or cannot run with this engine.
        PromptError: Prompts that are empty, unreadable or longer than the context.
        OffsetError: An offset that no prompt is long enough for.
        ScanError: An unknown engine, or a pattern with NaN.
    """
    info = bridge.read(model)
    all_offsets = isinstance(offsets, str) and offsets.strip() == "all"
    deltas = (0,) if all_offsets else as_offsets(offsets)
    engine = which_engine(model, engine)
    chosen = prompt_set(
        model,
        prompts,
        random_tokens=random_tokens,
        n_prompts=n_prompts,
        max_tokens=max_tokens,
        seed=seed,
    )
    longest = max(len(tokens) for tokens in chosen.tokens)
    if all_offsets:
        deltas = tuple(range(longest))
    if deltas[-1] >= longest:
        raise OffsetError(
            f"offset {deltas[-1]} needs a prompt of at least {deltas[-1] + 1} tokens; "
            f"the longest has {longest}"
        )
    if isinstance(profile_offsets, bool) or profile_offsets < 1:
        raise ScanError(
            f"profile_offsets must be an integer of at least 1; got {profile_offsets!r}"
        )
    moment_sums, refusal = None, None
    try:
        if not moments:
            raise ModelError("the scan ran with moments=False")
        if has_per_head_keys(model):
            raise ModelError(
                "active edits use per-head keys, but rank and profiles would describe the shared "
                "keys"
            )
        moment_sums = MomentSums(model, info, profile_offsets)
    except ModelError as error:
        refusal = str(error)
    shape = (info.n_layers, info.n_heads, len(deltas))
    sums, squares = torch.zeros(2, *shape, dtype=torch.float64)
    counts = torch.zeros(len(deltas), dtype=torch.int64)
    # Where RoPE follows a batch's length, a long prompt would change the others of its batch.
    batch_size = 1 if info.rope_follows_length else batch_size
    batches = list(_batches(chosen, batch_size, info.n_heads, engine))
    with run_by(model, engine):
        for indices in progress_over(
            batches, "scanning", show=progress, n=[len(b) for b in batches]
        ):
            batch = [chosen.tokens[index] for index in indices]
            means, counted = _scan_batch(model, info, batch, deltas, moment_sums)
            sums += means.sum(0)
            squares += means.square().sum(0)
            counts += counted
        by_layer = engine_of_layers(model)
    details = {
        "engine": engine,
        "engine_of_layers": by_layer,
        "prompts": [chosen.record],
        "seed": seed,
    }
    if refusal is not None:
        details["moments"] = refusal
    return Scan(
        deltas,
        sums,
        squares,
        counts,
        chosen.n_tokens,
        provenance(model, **details),
        None if moment_sums is None else moment_sums.finish(),
    )


def which_engine(model: TransformerBridge, engine: str) -> str:
    """Return "fused" or "bridge": the one that was asked for, or that "auto" stands for.

    Raises ScanError for another name.
    """
    if engine not in _ENGINES:
        raise ScanError(f"engine must be one of {', '.join(_ENGINES)}; got {engine!r}")
    if engine == "auto":
        return "bridge" if why_not(model) else "fused"
    return engine


@contextmanager
def run_by(model: TransformerBridge, engine: str) -> Iterator[None]:
    """Run the model by one of the engines "fused" and "bridge"."""
    with fused(model) if engine == "fused" else forming_matrices():
        yield


def _batches(
    prompts: PromptSet, batch_size: int | None, n_heads: int, engine: str
) -> Iterator[list[int]]:
    """Yield the prompt indices of each batch, of similar lengths so that little is padded."""
    if batch_size is not None and (isinstance(batch_size, bool) or batch_size < 1):
        raise ScanError(f"batch_size must be an integer of at least 1; got {batch_size!r}")
    order = sorted(range(len(prompts.tokens)), key=lambda index: len(prompts.tokens[index]))
    batch: list[int] = []
    for index in order:
        n_tokens = len(prompts.tokens[index])
        most = _PATTERN_BYTES // (4 * n_heads * n_tokens**2)
        limit = batch_size or max(1, _BATCH_TOKENS // n_tokens if engine == "fused" else most)
        if len(batch) >= limit:
            yield batch
            batch = []
        batch.append(index)
    yield batch


def _scan_batch(
    model: TransformerBridge,
    info: bridge.ModelInfo,
    prompts: list[Tensor],
    offsets: tuple[int, ...],
    moments: MomentSums | None,
) -> tuple[Float[Tensor, "batch layer head offset"], Int[Tensor, "offset"]]:
    """Return each prompt's scores (0 if it is too short), and the prompts that count by offset."""
    device = torch.device(model.cfg.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    n_pos = int(lengths.max())
    tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(device)
    real = torch.arange(n_pos) < lengths[:, None]
    per_layer: list[Tensor | None] = [None] * info.n_layers

    @reads_diagonals
    def accumulate(pattern: Any, hook: Any) -> None:
        per_layer[hook.layer()] = slash_sums(pattern, offsets, real)

    hooks = [(info.hook(layer, "pattern"), accumulate) for layer in range(info.n_layers)]
    if moments is not None:
        hooks += moments.hooks(real)
    with torch.no_grad():
        mask = None if bool(real.all()) else real.long()
        bridge.run_for_hooks(model, tokens, hooks, mask)
    missing = [layer for layer, layer_sums in enumerate(per_layer) if layer_sums is None]
    if missing:
        raise ModelError(f"the pattern hook of layer {missing[0]} did not fire")
    totals = torch.stack([x for x in per_layer if x is not None], dim=1)
    if not bool(totals.isfinite().all()):
        _, layer, head, _ = (~totals.isfinite()).nonzero()[0].tolist()
        raise ScanError(
            f"the attention pattern of {Head(layer, head)} has NaN or infinite entries; "
            "check the model's weights and dtype (fp16 overflows easily; try bfloat16 or float32)"
        )
    n_rows = (lengths[:, None] - torch.tensor(offsets)).clamp(min=0)
    means = totals / n_rows.clamp(min=1)[:, None, None, :]
    return means, (n_rows > 0).sum(0)
