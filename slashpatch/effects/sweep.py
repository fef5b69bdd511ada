"""Sweep: one edit at every head in turn, exact and resumable."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..bridge.provenance import provenance
from ..bridge.workers.options import Workers, as_workers
from ..data.files import require_output
from ..data.journal import Journal
from .every_head.run import SweepRun
from .every_head.variants import Variant, digest, first_columns, sweep_variants
from .metrics.by_name import as_metric
from .result import SUFFIXES, Result
from .resumable import resumable
from .running.conditions import require_options
from .running.evaluation import MetricRunner
from .running.inputs import prompts_for
from .statistics import compared, false_discovery, few_prompts, largest

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
    max_tokens: int | None = None,
    batch_size: int | None = None,
    per_pass: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
    workers: int | str | Workers | None = None,
) -> Result:
    """Measure the effect of an edit on one metric, at every head, one head at a time.

    The residual stream before the edited layer is cached, so earlier layers are not computed again.
    Results equal those of patching and running the whole model, bit for bit if `per_pass` is 1.

    Args:
        model: A TransformerBridge; active patches are part of the clean run.
        make_edit: The edit at a head: a text with {head} (and {offset}), or a function of a head
            (and an offset).
        heads: Heads to sweep; None for all.
        metric: A name, function or object that gives one number per prompt.
        prompts: As for `measure`; None: natural text, or repeated random tokens for copying
            metrics.
        offsets: Offsets Δ to sweep as well, if `make_edit` takes an offset.
        path: A .parquet or .json file to write. While the sweep runs, finished rows are written to
            a file next to it, with ".unfinished" after its name; `resume` continues from there.
        resume: Continue an unfinished sweep, or load a finished one. A sweep of another model,
            prompts, seed or version is refused.
        random_tokens: Use uniform random tokens instead of natural text.
        n_prompts: Number of prompts, which are the unit of the intervals. With few prompts, no
            p-value is small enough to stand out among many heads.
        max_tokens: Length of generated prompts, at most the model's context; None: 65, or the
            context if that is shorter.
        batch_size: Prompts per forward pass; None: by memory.
        per_pass: Number of variants (edits of one layer) that share a forward pass. None: 1 on the
            CPU, where more saves nothing; elsewhere as many as memory allows. More than 1 changes
            results by rounding.
        confidence: Level of the intervals.
        seed: Random seed of prompts, bootstrap resamples and halves.
        progress: Whether to show a progress bar with the time left; None: on a terminal only.
        workers: Number of worker processes, or a `Workers`; None stays in this process. Only this
            process writes the file, and a sweep can be resumed with any number of workers.

    Returns:
        A Result; `frame` has a row per head (and offset), the largest effect first. A remark names
        the row that is largest on one half of the prompts, and its effect on the other half: on the
        prompts that it is picked on, the largest of many looks larger than it is.

    Raises:
        EditError: A `make_edit` that gives no edit, or one that does not fit the model.
        HeadError: Heads that the model does not have.
        OffsetError: Offsets beyond the context.
        MetricError: A metric that is misspelt, or gives several numbers per prompt.
        PromptError: Prompts that are empty or longer than the context.
        OutputError: A path that cannot be written.
        SweepError: The file at `path` holds another sweep.
        WorkerError: Workers that cannot start, or differ from this process.
        ExtraError: `workers` without the extra `slashpatch[ray]`.
    """
    require_options(seed, confidence, n_prompts=n_prompts, batch_size=batch_size, per_pass=per_pass)
    pool_of = as_workers(workers)
    variants = sweep_variants(model, make_edit, heads, offsets)
    runner = MetricRunner(model, [as_metric(metric)])
    target = None if path is None else Path(path)
    require_output(target, SUFFIXES)
    chosen = prompts_for(
        model,
        runner.metrics,
        prompts,
        random_tokens=random_tokens,
        n_prompts=n_prompts,
        max_tokens=max_tokens,
        default=65,
        seed=seed,
    )
    origin = provenance(
        model,
        metric=runner.names[0],
        prompts=chosen.record,
        swept=digest(variants),
        confidence=confidence,
        seed=seed,
    )
    work = SweepRun(model, runner, chosen, variants, batch_size, per_pass)
    # Not of the journal's header: any number of workers may go on with it.
    made_by = origin if pool_of is None else {**origin, **pool_of.record}

    def run(journal: Journal | None) -> Result:
        return _result(variants, work.all(journal, pool_of, progress), made_by)

    return resumable(target, resume, origin, "sweep", len(variants), len(chosen.tokens), run)


def _result(
    variants: list[Variant], rows: dict[int, list[float]], origin: dict[str, Any]
) -> Result:
    """Return the table of all variants, from values [prompt] by index; −1 is the clean run."""
    import pandas as pd

    ordered = sorted(variants, key=lambda variant: variant.index)
    after = torch.tensor([rows[v.index] for v in ordered], dtype=torch.float64).T
    before = torch.tensor(rows[-1], dtype=torch.float64)[:, None].expand_as(after)
    columns = compared(before, after, origin["seed"], origin["confidence"])
    frame = pd.DataFrame(
        {
            **first_columns(ordered, origin["metric"], len(before)),
            **{name: values.numpy() for name, values in columns.items()},
            "q": false_discovery(columns["p"]).numpy(),
        }
    )
    frame = frame.sort_values("effect", key=lambda e: -e.abs(), kind="stable")
    names = [str(variant.edit) for variant in ordered]
    remarks = largest(names, after - before, origin["seed"], origin["confidence"])
    remarks += few_prompts(len(before))
    return Result("sweep", frame.reset_index(drop=True), {}, remarks, origin)
