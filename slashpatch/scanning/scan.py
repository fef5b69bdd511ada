"""Scan: one pass over prompts that gathers slash scores, rank and profiles of every head."""

from __future__ import annotations

from collections.abc import Iterator
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
#: Bytes that one layer's attention of one batch may take; bounds the batch size.
_PATTERN_BYTES = 256 * 2**20
#: Tokens of one batch where no attention matrix is formed.
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
    """Slash scores of every head, averaged over prompts; the model as it is, patches included.

    Args:
        model: A TransformerBridge in evaluation mode.
        prompts: None for natural text, or a text, texts, a file, or token ids [batch, pos]; texts
            and rows of token ids may come from a generator.
        offsets: Δ ≥ 0: an int, ints, a range, or text such as "0-15"; or "all".
        engine: "fused" runs flash attention and never forms a pattern; "bridge" reads the one that
            TransformerLens forms; "auto" takes the first where it is exact. Scores are the same.
        random_tokens: Uniform random tokens instead of natural text: out of distribution.
        n_prompts: How many natural or random prompts; at most so many pieces of a file.
        max_tokens: Their length, at most the model's context; 512 or the context when None, for
            texts no limit.
        batch_size: Prompts per forward pass; picked by memory when None. Does not change scores.
        moments: Whether to gather what `Scan.rank_one` and `Scan.profile` tell, which costs about
            as much again as the slash scores do.
        profile_offsets: Offsets from 0 whose mean logits `Scan.profile` tells.
        seed: Of the natural and random prompts.
        progress: Whether to show a bar; when None, on a terminal only.

    Returns:
        A Scan; offsets longer than a prompt leave that prompt out of their mean.

    Raises:
        ModelError, PromptError, OffsetError, or ScanError for a pattern with NaN.
    """
    info = bridge.read(model)
    every = isinstance(offsets, str) and offsets.strip() == "all"
    wanted = (0,) if every else as_offsets(offsets)
    if engine not in _ENGINES:
        raise ScanError(f"engine is one of {', '.join(_ENGINES)}; got {engine!r}")
    found = prompt_set(
        model,
        prompts,
        random_tokens=random_tokens,
        n_prompts=n_prompts,
        max_tokens=max_tokens,
        seed=seed,
    )
    longest = max(len(tokens) for tokens in found.tokens)
    if every:
        wanted = tuple(range(longest))
    if wanted[-1] >= longest:
        raise OffsetError(
            f"offset {wanted[-1]} needs a prompt of at least {wanted[-1] + 1} tokens; "
            f"the longest has {longest}"
        )
    if isinstance(profile_offsets, bool) or profile_offsets < 1:
        raise ScanError(f"profile_offsets is an integer from 1; got {profile_offsets!r}")
    gathered, refusal = None, None
    try:
        if not moments:
            raise ModelError("the scan was told not to gather them")
        if has_per_head_keys(model):
            raise ModelError(
                "active edits give heads keys of their own, and rank and profiles would be of the "
                "shared ones"
            )
        gathered = MomentSums(model, info, profile_offsets)
    except ModelError as error:
        refusal = str(error)
    shape = (info.n_layers, info.n_heads, len(wanted))
    sums, squares = torch.zeros(2, *shape, dtype=torch.float64)
    counts = torch.zeros(len(wanted), dtype=torch.int64)
    if engine == "auto":
        engine = "bridge" if why_not(model) else "fused"
    # Where RoPE follows the length of a batch, prompts batched together would change one another.
    together = 1 if bridge.read(model).rope_follows_length else batch_size
    batches = list(_batches(found, together, info.n_heads, engine))
    with fused(model) if engine == "fused" else forming_matrices():
        for indices in progress_over(
            batches, "scanning", show=progress, n=[len(b) for b in batches]
        ):
            prompts_now = [found.tokens[i] for i in indices]
            means, counted = _scan_batch(model, info, prompts_now, wanted, gathered)
            sums += means.sum(0)
            squares += means.square().sum(0)
            counts += counted
        went = engine_of_layers(model)
    details = {
        "engine": engine,
        "engine_of_layers": went,
        "prompts": [found.record],
        "seed": seed,
    }
    if refusal is not None:
        details["moments"] = refusal
    return Scan(
        wanted,
        sums,
        squares,
        counts,
        found.n_tokens,
        provenance(model, **details),
        None if gathered is None else gathered.finish(),
    )


def _batches(
    found: PromptSet, batch_size: int | None, n_heads: int, engine: str
) -> Iterator[list[int]]:
    """Prompt indices of each batch: neighbours in length, so that little is padded."""
    if batch_size is not None and (isinstance(batch_size, bool) or batch_size < 1):
        raise ScanError(f"batch_size is an integer from 1; got {batch_size!r}")
    order = sorted(range(len(found.tokens)), key=lambda index: len(found.tokens[index]))
    batch: list[int] = []
    for index in order:
        n_tokens = len(found.tokens[index])
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
    """Each prompt's scores (0 where it is too short), and how many prompts each offset counts."""
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
    missing = [layer for layer, taken in enumerate(per_layer) if taken is None]
    if missing:
        raise ModelError(f"the pattern hook of layer {missing[0]} did not fire")
    totals = torch.stack([taken for taken in per_layer if taken is not None], dim=1)
    if not bool(totals.isfinite().all()):
        _, layer, head, _ = (~totals.isfinite()).nonzero()[0].tolist()
        raise ScanError(
            f"the attention pattern of {Head(layer, head)} has NaN or infinite entries; "
            "check the model's weights and dtype (fp16 overflows easily; try bfloat16 or float32)"
        )
    n_rows = (lengths[:, None] - torch.tensor(offsets)).clamp(min=0)
    means = totals / n_rows.clamp(min=1)[:, None, None, :]
    return means, (n_rows > 0).sum(0)
