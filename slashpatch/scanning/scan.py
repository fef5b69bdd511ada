"""Scan: measure slash scores, rank and logit profiles of every head over prompts."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from .. import bridge
from ..bridge.attached import has_per_head_keys
from ..bridge.provenance import provenance
from ..bridge.workers.options import Workers, as_workers
from ..data.prompts import PromptSet, prompt_set
from ..errors import ModelError, OffsetError, ScanError
from ..maths.offsets import as_offsets
from ..patching.fused import why_not
from ..patching.worker_pool import units_of
from .batches import BatchSums, ScanJob, run_by
from .lines import LineSums
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
    lines: bool = False,
    seed: int = 0,
    progress: bool | None = None,
    workers: int | str | Workers | None = None,
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
        lines: Whether to gather the sums behind `Scan.lines`, at all offsets of the prompts: about
            as much work as one attention layer more for each.
        seed: Random seed of natural and random prompts.
        progress: Whether to show a progress bar; None: on a terminal only.
        workers: Number of worker processes, or a `Workers`; None stays in this process. The unit is
            a batch, and their sums are added in the same order.

    Returns:
        A Scan. A prompt that is too short for an offset does not count in that offset's mean.

    Raises:
        ModelError: A model that slashpatch does not support, or cannot run with this engine.
        PromptError: Prompts that are empty, unreadable or longer than the context.
        OffsetError: An offset that no prompt is long enough for.
        ScanError: An unknown engine, or a pattern with NaN.
        WorkerError: Workers that cannot start, or differ from this process.
        ExtraError: `workers` without the extra `slashpatch[ray]`.
    """
    info, pool_of = bridge.read(model), as_workers(workers)
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
    batches = [
        [chosen.tokens[index] for index in indices]
        for indices in batches_of(chosen, batch_size, info.n_heads, engine)
    ]
    n_profile = None if moment_sums is None else profile_offsets
    job = ScanJob(batches, deltas, engine, n_profile, lines=lines)
    line_sums: LineSums | None = None
    by_layer = ["bridge"] * info.n_layers
    with closing(in_order(model, job, pool_of, progress)) as found_in_order:
        # Sums of a batch first, so that rounding does not depend on who computed them.
        for found in found_in_order:
            sums += found.sums
            squares += found.squares
            counts += found.counts
            by_layer = found.engine_of_layers
            if found.lines is not None:
                line_sums = found.lines if line_sums is None else line_sums + found.lines
            if moment_sums is not None and found.moments is not None:
                moment_sums.add(found.moments)
    details = {
        "engine": engine,
        "engine_of_layers": by_layer,
        "prompts": [chosen.record],
        "seed": seed,
        **({} if pool_of is None else pool_of.record),
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
        line_sums,
    )


def in_order(
    model: TransformerBridge, job: ScanJob, workers: Workers | None, progress: bool | None
) -> Generator[BatchSums, None, None]:
    """Yield the sums of each batch in order, from this process or from workers."""
    waiting: dict[int, BatchSums] = {}
    place = 0
    ahead = None if workers is None else 4 * workers.count  # bounds how many wait here
    places, sizes = range(len(job.batches)), [len(batch) for batch in job.batches]
    # Entered for all batches, since that takes a moment; workers enter it for each.
    with run_by(model, job.engine) if workers is None else nullcontext():
        units = units_of(model, job, places, "scanning", workers, progress, sizes, ahead)
        for index, found in units:
            waiting[index] = found
            while place in waiting:
                yield waiting.pop(place)
                place += 1


def which_engine(model: TransformerBridge, engine: str) -> str:
    """Return "fused" or "bridge": the one that was asked for, or that "auto" stands for.

    Raises ScanError for another name.
    """
    if engine not in _ENGINES:
        raise ScanError(f"engine must be one of {', '.join(_ENGINES)}; got {engine!r}")
    if engine == "auto":
        return "bridge" if why_not(model) else "fused"
    return engine


def batches_of(
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
