"""One edit at every head in turn: exact, resumable, without computing what stays the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..bridge.provenance import provenance
from ..data.files import require_output
from ..data.journal import Journal, require_same
from ..errors import SweepError
from .conditions import require_options
from .evaluation import Meter
from .inputs import prompts_for
from .metrics import as_metric
from .result import SUFFIXES, Result
from .statistics import compared, false_discovery
from .sweep_run import _Run
from .sweep_variants import Variant, _digest, _variants

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def sweep(
    model: TransformerBridge,
    make_edit: str | Callable[..., Any] = "KnockOut({head}, 1)",
    heads: Any = None,
    metric: Any = "copying",
    prompts: Any = None,
    *,
    offsets: Any = None,
    path: str | os.PathLike[str] | None = None,
    resume: bool = False,
    random_tokens: bool = False,
    n_prompts: int = 16,
    max_tokens: int | None = 65,
    batch_size: int | None = None,
    per_pass: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """The effect of an edit at every head, one at a time, on one metric.

    Layers before the edited one are not computed again: their output is kept. The result is that
    of patching and running the whole model, bit for bit, where variants do not share a pass.

    Args:
        model: A TransformerBridge; active patches are part of "clean".
        make_edit: A text with {head} (and {offset}), or a function of a head (and an offset).
        heads: Which; None for all.
        metric: A name, function or object that gives one number per prompt.
        prompts: As for `measure`; None: repeated random tokens for metrics of copying.
        offsets: Δ to sweep beside the heads, if `make_edit` takes one.
        path: .parquet or .json to write. Until it is finished, rows stand in a file beside it, its
            name and ".unfinished"; a run that was killed goes on with `resume`.
        resume: Go on with an unfinished sweep, or give back a finished one. A sweep of another
            model, data, seed or version is refused.
        random_tokens: As for `measure`, and so are the following.
        n_prompts: How many. With few, p-values cannot be small enough to be told among many heads.
        max_tokens: Their length.
        batch_size: Prompts per pass.
        per_pass: How many variants of one layer share a pass. None: one on the CPU, where it saves
            nothing; elsewhere as many as memory allows. More than one changes results by rounding.
        confidence: Of the intervals.
        seed: Of prompts, resamples and sign flips.
        progress: Whether to show a bar with the time left; when None, on a terminal only.

    Returns:
        A Result; `frame` has a row per head (and offset), the largest effect first.

    Raises:
        EditError, HeadError, OffsetError, MetricError, PromptError, OutputError, or SweepError for
        a file of another sweep.
    """
    require_options(seed, confidence, n_prompts=n_prompts, batch_size=batch_size, per_pass=per_pass)
    variants = _variants(model, make_edit, heads, offsets)
    meter = Meter(model, [as_metric(metric)])
    target = None if path is None else Path(path)
    require_output(target, SUFFIXES)
    found = prompts_for(
        model,
        meter.metrics,
        prompts,
        random_tokens=random_tokens,
        n_prompts=n_prompts,
        max_tokens=max_tokens,
        seed=seed,
    )
    origin = provenance(
        model,
        metric=meter.names[0],
        prompts=found.record,
        swept=_digest(variants),
        confidence=confidence,
        seed=seed,
    )
    if target is None:
        rows = _Run(model, meter, found, batch_size, per_pass, progress).all(variants, None)
        return _result(variants, rows, origin)
    unfinished = target.with_name(target.name + ".unfinished")
    if resume and target.exists() and not unfinished.exists():
        done = Result.load(target)
        require_same(origin, done.provenance, target)
        if done.kind != "sweep" or len(done.frame) != len(variants):
            raise SweepError(f"{str(target)!r} is no finished sweep; choose another file")
        return done
    indexes = range(-1, len(variants))
    with Journal(unfinished, origin, resume, indexes, len(found.tokens)) as journal:
        rows = _Run(model, meter, found, batch_size, per_pass, progress).all(variants, journal)
        result = _result(variants, rows, origin)
        result.save(target)
        journal.remove()
    return result


def _result(
    variants: list[Variant], rows: dict[int, list[float]], origin: dict[str, Any]
) -> Result:
    import pandas as pd

    ordered = sorted(variants, key=lambda one: one.index)
    after = torch.tensor([rows[one.index] for one in ordered], dtype=torch.float64).T
    before = torch.tensor(rows[-1], dtype=torch.float64)[:, None].expand_as(after)
    said = compared(before, after, origin["seed"], origin["confidence"])
    frame = pd.DataFrame(
        {
            "name": [str(one.head) for one in ordered],
            "layer": [one.head.layer for one in ordered],
            "head": [one.head.head for one in ordered],
            "offset": [one.offset for one in ordered],
            "edit": [str(one.edit) for one in ordered],
            "metric": origin["metric"],
            "n": len(before),
            **{name: values.numpy() for name, values in said.items()},
            "q": false_discovery(said["p"]).numpy(),
        }
    )
    if ordered[0].offset is None:
        frame = frame.drop(columns="offset")
    frame = frame.sort_values("effect", key=lambda e: -e.abs(), kind="stable")
    return Result("sweep", frame.reset_index(drop=True), provenance=origin)
