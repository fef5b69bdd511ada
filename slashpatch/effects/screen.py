"""Screen: the effect of an edit at every head, estimated by gradients; the largest ones run."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..bridge.provenance import provenance
from ..bridge.workers.options import as_workers
from ..data.files import require_output
from ..data.journal import Journal
from ..errors import PromptError
from ..patching.worker_pool import worker_pool
from .every_head.choice import AUDIT, Estimates, audited, choose, estimates, require_counts
from .every_head.estimates import contributions
from .every_head.exact_changes import require_one_layer
from .every_head.run import SweepRun
from .every_head.variants import Variant, digest, first_columns, sweep_variants
from .metrics.by_name import as_metric
from .result import SUFFIXES, Result
from .resumable import resumable
from .running.conditions import require_options
from .running.evaluation import MetricRunner
from .running.gradients import require_gradient
from .running.inputs import prompts_for
from .statistics import compared, false_discovery, few_prompts
from .statistics import split as halves_of

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge


def screen(
    model: TransformerBridge,
    make_edit: str | Callable[..., Any] = "KnockOut({head}, 1)",
    heads: Any = None,
    metric: Any = "copying",
    prompts: Any = None,
    *,
    offsets: Any = None,
    verify: int = 32,
    audit: int = 32,
    split: bool = True,
    proxy: Any = None,
    above: float | None = None,
    path: str | os.PathLike[str] | None = None,
    resume: bool = False,
    random_tokens: bool = False,
    n_prompts: int = 16,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    per_pass: int | None = None,
    workers: Any = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Estimate an edit's effect at every head by gradients, then run the largest ones exactly.

    The estimate is Σ over positions of (z_edited − z_clean) · ∂metric/∂z, where the change of a
    head's output z is exact and only what lies downstream is linear (*ours*; attribution patching
    is linear in the attention as well). Its sign and size may be wrong where the model saturates or
    repairs itself, so the ranking is what it is for: rows with an `effect` have been run exactly,
    as `sweep` runs them.

    Args:
        model: A TransformerBridge; active patches are part of the clean run.
        make_edit: The edit at a head: a text with {head} (and {offset}), or a function of a head
            (and an offset). It must act in one layer.
        heads: Heads to screen; None for all.
        metric: A name, function or object that gives one number per prompt.
        prompts: As for `sweep`.
        offsets: Offsets Δ to screen as well, if `make_edit` takes an offset. Edits of diagonals
            cost little more with many offsets than with one.
        verify: Number of variants of largest |estimate| to run exactly ("top"). Variants that are
            among as many by the size of their estimates over all gradients and prompts, but not
            among these, are run as well ("flagged": their estimate is unreliable).
        audit: Number of other variants, drawn at random over the layers, to run exactly ("audit"):
            what they tell of the rest is in `tables["audit"]` and the remarks.
        split: Whether to estimate on one half of the prompts and run on the other, so that a
            variant's selection cannot make its effect look larger. Without, `q` counts all
            variants that were screened.
        proxy: A metric whose gradient to use instead, where `metric` has none (KL divergence,
            top-1). Estimates are then of the proxy, effects of the metric.
        above: The |effect| that the audit asks about; None: that of the 10th largest verified. A
            finished screen that is loaded by `resume` answers for this value.
        path: A .parquet or .json file to write. Finished rows are written next to it while the
            screen runs, as in `sweep`; `resume` continues from there.
        resume: Continue an unfinished screen, or load a finished one.
        random_tokens: Use uniform random tokens instead of natural text.
        n_prompts: Number of prompts, which are the unit of the intervals; half of them are run
            exactly if they are split. Fewer than 6 have no intervals and p-values.
        max_tokens: Length of generated prompts, at most the model's context; None: 65, or the
            context if that is shorter.
        batch_size: Prompts per forward pass; None: by memory.
        per_pass: As for `sweep`.
        workers: As for `sweep`.
        confidence: Level of the intervals and of the audit's bounds.
        seed: Random seed of prompts, halves, moved heads, audit and resamples.
        progress: Whether to show progress bars; None: on a terminal only.

    Returns:
        A Result of kind "screen". `frame` has a row per head (and offset): `estimate` (the gradient
        at the clean run), `size` (root mean square of the estimates over prompts and gradients),
        and for rows that were run `effect`, `low`, `high`, `p` and `why`: "top", "flagged" or
        "audit"; "" for the others. `q` is p adjusted over the "top" and "flagged" rows. Rows that
        were run come first, the largest effect first. `tables["audit"]` has one row.

    Raises:
        EditError: A `make_edit` that gives no edit, one that does not fit the model, or one of
            several layers.
        HeadError: Heads that the model does not have.
        OffsetError: Offsets beyond the context.
        MetricError: A metric that is misspelt, has no gradient, or gives several numbers.
        PromptError: Prompts that are empty, longer than the context, or fewer than 4 to be split.
        OutputError: A path that cannot be written.
        SweepError: The file at `path` holds another run.
        WorkerError: Workers that cannot start, or differ from this process.
        ExtraError: `workers` without the extra `slashpatch[ray]`.
    """
    require_options(seed, confidence, n_prompts=n_prompts, batch_size=batch_size, per_pass=per_pass)
    require_counts(verify, audit, above)
    pool_of = as_workers(workers)
    variants = sweep_variants(model, make_edit, heads, offsets)
    require_one_layer(variants)
    runner = MetricRunner(model, [as_metric(metric)])
    estimated = runner if proxy is None else MetricRunner(model, [as_metric(proxy)])
    require_gradient(estimated.metrics[0])
    target = None if path is None else Path(path)
    require_output(target, SUFFIXES)
    chosen = prompts_for(
        model,
        [*runner.metrics, *estimated.metrics],
        prompts,
        random_tokens=random_tokens,
        n_prompts=n_prompts,
        max_tokens=max_tokens,
        default=65,
        seed=seed,
    )
    screened, verified = halves(len(chosen.tokens), split, seed)
    origin = provenance(
        model,
        metric=runner.names[0],
        proxy=None if proxy is None else estimated.names[0],
        prompts=chosen.record,
        screened=digest(variants),
        verify=verify,
        audit=audit,
        split=split,
        confidence=confidence,
        seed=seed,
    )

    made_by = origin if pool_of is None else {**origin, **pool_of.record}

    def run(journal: Journal | None) -> Result:
        with nullcontext() if pool_of is None else worker_pool(model, pool_of) as pool:
            by_gradient = contributions(
                estimated, chosen, variants, seed, batch_size, screened, pool, progress
            )
            found = estimates(by_gradient)
            layers = torch.tensor([v.edit.layers[0] for v in _in_order(variants)])
            why = choose(found, layers, verify, audit, seed)
            kept = [variant for variant in variants if variant.index in why]
            work = SweepRun(model, runner, chosen, kept, batch_size, per_pass, verified)
            rows = work.all(journal, pool, progress)
        return told(_frame(variants, found, why, rows, origin), made_by)

    def told(frame: pd.DataFrame, made: dict[str, Any]) -> Result:
        table = audited(frame, above, confidence)
        remarks = _remarks(frame, table, origin) + few_prompts(len(verified))
        return Result("screen", frame, {"audit": table}, remarks, made)

    done = resumable(target, resume, origin, "screen", len(variants), len(verified), run)
    # A loaded file may hold the audit's answer for another effect, or (.parquet) none.
    return told(done.frame, done.provenance)


def halves(n: int, split: bool, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices of the prompts to estimate on, and of those to run exactly.

    Raises PromptError for fewer than 4 prompts to split.
    """
    if not split:
        return list(range(n)), list(range(n))
    if n < 4:
        raise PromptError(
            f"{n} prompts cannot be split into halves of at least 2; give more, or split=False "
            "(--no-split)"
        )
    return halves_of(n, seed, "screen halves")


def _in_order(variants: Sequence[Variant]) -> list[Variant]:
    return sorted(variants, key=lambda variant: variant.index)


def _frame(
    variants: Sequence[Variant],
    found: Estimates,
    why: dict[int, str],
    rows: dict[int, list[float]],
    origin: dict[str, Any],
) -> pd.DataFrame:
    """Return the table of all variants; `rows` are values [prompt] by index, −1 the clean run."""
    import pandas as pd

    ordered = _in_order(variants)
    frame = pd.DataFrame(
        {
            **first_columns(ordered, origin["metric"], len(rows[-1])),
            "estimate": found.clean.numpy(),
            "size": found.size.numpy(),
        }
    )
    run = sorted(why)
    after = torch.tensor([rows[index] for index in run], dtype=torch.float64).T
    before = torch.tensor(rows[-1], dtype=torch.float64)[:, None].expand_as(after)
    columns = compared(before, after, origin["seed"], origin["confidence"])
    for name, values in columns.items():
        frame.loc[run, name] = values.numpy()
    frame["q"] = _selected_q(frame["p"], why, origin["split"]).numpy()
    frame["why"] = [why.get(index, "") for index in range(len(ordered))]
    first = frame["why"].ne("").astype(int)
    keys = {
        "run": first,
        "by_effect": frame["effect"].abs(),
        "by_estimate": frame["estimate"].abs(),
    }
    order = frame.assign(**keys).sort_values(list(keys), ascending=False, kind="stable").index
    return frame.loc[order].reset_index(drop=True)


def _selected_q(p: pd.Series[float], why: dict[int, str], split: bool) -> Float[Tensor, "variant"]:
    """Return p adjusted over the rows that the estimates chose; NaN for the others.

    Chosen on the prompts that the tests use (no split), they are adjusted as if every other row had
    p = 1, which holds however they were chosen.
    """
    chosen: Int[Tensor, "_"] = torch.tensor(
        [index for index, reason in sorted(why.items()) if reason != AUDIT]
    )
    q = torch.full((len(p),), math.nan, dtype=torch.float64)
    of_chosen = torch.tensor(p.to_list(), dtype=torch.float64)[chosen]
    more = torch.ones(0 if split else len(p) - len(chosen), dtype=torch.float64)
    q[chosen] = false_discovery(torch.cat([of_chosen, more]))[: len(chosen)]
    return q


def _remarks(frame: pd.DataFrame, table: pd.DataFrame, origin: dict[str, Any]) -> tuple[str, ...]:
    """Say how the rows were selected, and what the audit says of those that were not run."""
    found = table.iloc[0]
    n_chosen = int(frame["why"].isin(("top", "flagged")).sum())
    selected = (
        f"The {n_chosen} rows top and flagged were selected by estimates on other prompts than "
        "those of their effects; q is adjusted over them."
        if origin["split"]
        else f"The {n_chosen} rows top and flagged were selected on the prompts of their effects, "
        "which look larger for it; q counts every row that was screened."
    )
    if origin["proxy"] is not None:
        selected += f" Estimates are of {origin['proxy']}, effects of {origin['metric']}."
    if found["unverified"] == 0:
        return (selected, "Every row was run.")
    if found["audited"] == 0:
        return (selected, f"No audit: nothing is known of {found['unverified']:.0f} rows.")
    size = f"of {found['above']:.3g} or more" if found["above"] else "other than zero"
    missed = (
        f"Audit of {found['audited']:.0f} rows drawn at random: of {found['unverified']:.0f} rows "
        f"that were not run, about {found['missed']:.0f} and at most {found['missed_at_most']:.0f} "
        f"({found['confidence']:.0%}) have an effect {size}"
    )
    if found["found"]:
        missed += f"; recall about {found['recall']:.2f}, at least {found['recall_at_least']:.2f}"
    if not math.isnan(found["spearman"]):
        missed += (
            f". Rank correlation of |estimate| and |effect| in the audit: {found['spearman']:.2f}"
        )
    return (selected, f"{missed}.")
