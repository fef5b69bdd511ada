"""Dose: one edit with a number in it, measured over a range of that number."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..bridge.provenance import provenance
from ..bridge.workers.options import Workers, as_workers
from ..data.files import require_output
from ..data.journal import Journal
from .controls.base import Control, few_draws
from .controls.by_name import as_control
from .doses.edits import as_doses, dose_conditions, template
from .doses.trend import trend
from .metrics.by_name import as_metric
from .result import SUFFIXES, Result
from .resumable import resumable
from .running.conditions import Condition, require_options, seen_in_fits
from .running.evaluation import MetricRunner
from .running.inputs import batches, prompts_for
from .running.runs import digest_of, run_all
from .statistics import adjusted, beyond_draws, compared, few_prompts

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

#: The fewest doses that have a trend.
_LEAST = 3
#: What rows against the clean run have in the columns of draws.
_NO_DRAWS = {"p_rank": float("nan"), "as_large": float("nan")}


def dose(
    model: TransformerBridge,
    make_edit: str | Callable[..., Any],
    values: Any,
    metrics: Any = "loss",
    prompts: Any = None,
    controls: Any = (),
    *,
    path: str | os.PathLike[str] | None = None,
    resume: bool = False,
    random_tokens: bool = False,
    n_prompts: int = 16,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
    workers: int | str | Workers | None = None,
) -> Result:
    """Measure an edit at each dose: a curve of its effect, with intervals and a trend.

    A dose is the number in the edit: a factor, a shift, a rank, a share of the rotary pairs.

    Args:
        model: A TransformerBridge; active patches are part of the clean run.
        make_edit: A text with {} in the place of the number, such as
            "ScaleOffsets(L16H0, 1, {})", or a function of the number that returns an edit, a list
            of edits that act together, or None for the clean run.
        values: The doses: numbers, or a text such as "0:2:0.25" (both ends included) or "1,2,4".
        metrics: As for `measure`, with one number per prompt each.
        prompts: As for `measure`.
        controls: As for `measure`; the draws are the same heads, offsets or pairs at each dose
            where the edit has the same ones.
        path: A .parquet or .json file to write. Finished runs are written to a file next to it,
            with ".unfinished" after its name; `resume` continues from there.
        resume: Continue an unfinished run, or load a finished one. Another model, edit, prompts,
            seed or version is refused.
        random_tokens: Use uniform random tokens instead of natural text.
        n_prompts: Number of prompts, which are the unit of all intervals and tests;
            fewer than 6 have none.
        max_tokens: Length of generated prompts, at most the model's context; None: 65, or the
            context if that is shorter.
        batch_size: Prompts per forward pass; None: by memory.
        confidence: Level of the intervals, each for its dose alone: the band is pointwise.
        seed: Random seed of prompts, controls, bootstrap resamples and sign flips.
        progress: Whether to show a progress bar; None: on a terminal only.
        workers: Number of worker processes, or a `Workers`; None stays in this process.

    Returns:
        A Result. `frame` has a row per metric, comparison and dose: against "clean" the paired
        effect, edited − clean; against a control the effect beyond the mean of its draws, with the
        interval, `p_rank` and `as_large` of `measure`. A dose that changes nothing has an effect of
        exactly 0. `tables["trend"]` has, for 3 doses or more,
        Spearman's correlation of dose and metric and the slope, both of each prompt by itself, then
        averaged over prompts with an interval (*ours*). A step has a trend as well as a line, and a
        curve that rises and falls may have none: look at the curve.

    Raises:
        EditError: No doses, or an edit that cannot be made or does not fit the model at a dose.
        MetricError: A metric that is misspelt, or gives several numbers per prompt.
        ControlError: A control that is misspelt, or that cannot be drawn at a dose.
        PromptError: Prompts that are empty, longer than the context, or unfit for a metric.
        OutputError: A path that cannot be written.
        SweepError: The file at `path` holds another run.
    """
    require_options(seed, confidence, n_prompts=n_prompts, batch_size=batch_size)
    pool_of, doses = as_workers(workers), as_doses(values)
    target = None if path is None else Path(path)
    require_output(target, SUFFIXES)
    several = metrics if isinstance(metrics, (list, tuple)) else [metrics]
    runner = MetricRunner(model, [as_metric(metric) for metric in several])
    drawn_by = [
        as_control(control)
        for control in (controls if isinstance(controls, (list, tuple)) else [controls])
    ]
    edited = dose_conditions(model, make_edit, doses)
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
    all_batches = batches(chosen, model.cfg.d_vocab, batch_size, model.cfg.device)
    draws = {
        control: [
            control.draw(model, condition, all_batches, seed, template(make_edit))
            if condition.edits
            else [condition] * control.most
            for condition in edited
        ]
        for control in drawn_by
    }
    drawn = [one for of_control in draws.values() for at_dose in of_control for one in at_dose]
    runs = list(dict.fromkeys(run for run in [*edited, *drawn] if run.edits))
    origin = provenance(
        model,
        measured=[template(make_edit)],
        metrics=runner.names,
        controls=[str(control) for control in drawn_by],
        doses=list(doses),
        runs=digest_of([*map(str, edited), *map(str, runs)]),
        prompts=chosen.record,
        confidence=confidence,
        seed=seed,
    )
    made_by = origin if pool_of is None else {**origin, **pool_of.record}

    def run(journal: Journal | None) -> Result:
        found = run_all(model, runner, chosen, runs, journal, batch_size, progress, pool_of)
        by_run = dict(zip([Condition(), *runs], found, strict=True))
        curves = _Curves(doses, runner.names, edited, draws, by_run, seed, confidence)
        frame, tables = curves.tables()
        few = [
            remark
            for control, by_dose in draws.items()
            for remark in few_draws(control, min(map(len, by_dose)))
        ]
        remarks = (
            *few_prompts(len(chosen.tokens)),
            *few,
            *curves.remarks(),
            *seen_in_fits(runs, chosen),
        )
        return Result("dose", frame, tables, remarks, made_by)

    n_rows = len(doses) * len(runner.names) * (1 + len(drawn_by))
    width = len(chosen.tokens) * len(runner.names)
    return resumable(target, resume, origin, "dose", n_rows, width, run, len(runs))


class _Curves:
    """The tables of a dose: each metric of each comparison at each dose, and its trend."""

    def __init__(
        self,
        doses: tuple[float | int, ...],
        names: list[str],
        edited: list[Condition],
        draws: dict[Control, list[list[Condition]]],
        values: dict[Condition, Float[Tensor, "prompt metric"]],
        seed: int,
        confidence: float,
    ) -> None:
        self.doses, self.names, self.edited, self.draws = doses, names, edited, draws
        self.values, self.seed, self.confidence = values, seed, confidence
        self.clean = values[Condition()]
        self.rows: list[dict[str, Any]] = []
        self.drawn: list[dict[str, Any]] = []
        self.trends: list[dict[str, Any]] = []

    def tables(self) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
        """Return the main table and the further ones, by name."""
        import pandas as pd

        for at, name in enumerate(self.names):
            after = torch.stack([self.values[edit][:, at] for edit in self.edited])
            self._add(name, "clean", self.clean[:, at].expand_as(after), after)
            for control, by_dose in self.draws.items():
                means = [
                    torch.stack([self.values[draw][:, at] for draw in drawn]) for drawn in by_dose
                ]
                beyond = self._add_draws(name, at, control, by_dose, after)
                self._add(
                    name, str(control), torch.stack([m.mean(0) for m in means]), after, beyond
                )
        tables = {"values": pd.DataFrame(self._values())}
        if self.trends:
            tables["trend"] = pd.DataFrame(self.trends)
        if self.drawn:
            tables["draws"] = pd.DataFrame(self.drawn)
        return adjusted(self.rows), tables

    def remarks(self) -> tuple[str, ...]:
        """Say how each metric follows the dose."""
        return tuple(
            f"{row['metric']}{'' if row['against'] == 'clean' else ' beyond ' + row['against']} by "
            f"dose, of each prompt: rank correlation {row['spearman']:+.2f} "
            f"[{row['spearman_low']:+.2f}, {row['spearman_high']:+.2f}], "
            f"p {row['spearman_p']:.2g}; slope {row['slope']:+.3g} "
            f"[{row['slope_low']:+.3g}, {row['slope_high']:+.3g}]"
            for row in self.trends
        )

    def _add(
        self,
        name: str,
        against: str,
        before: Float[Tensor, "dose prompt"],
        after: Float[Tensor, "dose prompt"],
        beyond: list[dict[str, float]] | None = None,
    ) -> None:
        """Add a row for each dose, and the trend."""
        columns = compared(before.T, after.T, self.seed, self.confidence)
        for place, number in enumerate(self.doses):
            row = {
                "dose": float(number),
                "edit": str(self.edited[place]),
                "metric": name,
                "against": against,
                "n": before.shape[1],
                **{key: float(column[place]) for key, column in columns.items()},
            }
            if self.draws:
                row |= _NO_DRAWS if beyond is None else beyond[place]
            self.rows.append(row)
        if len(self.doses) >= _LEAST:
            doses = torch.tensor(self.doses, dtype=torch.float64)
            followed = after if against == "clean" else after - before
            self.trends.append(
                {
                    "metric": name,
                    "against": against,
                    "n": before.shape[1],
                    **trend(doses, followed, self.seed, self.confidence),
                }
            )

    def _add_draws(
        self,
        name: str,
        at: int,
        control: Control,
        by_dose: list[list[Condition]],
        after: Float[Tensor, "dose prompt"],
    ) -> list[dict[str, float]]:
        """Add a control's draws; return at each dose what `measure` says of the edit and them."""
        found = []
        for place, drawn in enumerate(by_dose):
            of_draws = torch.stack([self.values[draw][:, at] for draw in drawn])
            draws, edit = of_draws - self.clean[:, at], after[place] - self.clean[:, at]
            effects = draws.mean(1).tolist()
            beyond = beyond_draws(edit, draws, self.seed, self.confidence)
            found.append(
                {
                    **{part: float(getattr(beyond, part)) for part in ("low", "high", "p_rank")},
                    "as_large": float((draws.mean(1).abs() >= edit.mean().abs()).double().mean()),
                }
            )
            self.drawn += [
                {
                    "edit": str(self.edited[place]),
                    "dose": float(self.doses[place]),
                    "control": control.name,
                    "drawn": str(draw),
                    "metric": name,
                    "of": "",
                    "effect": effect,
                }
                for draw, effect in zip(drawn, effects, strict=True)
            ]
        return found

    def _values(self) -> list[dict[str, Any]]:
        """Return a row for each dose, metric and prompt, and for the clean run (dose NaN)."""
        runs = [(float("nan"), Condition()), *zip(map(float, self.doses), self.edited, strict=True)]
        return [
            {
                "dose": number,
                "edit": str(run),
                "metric": name,
                "prompt": prompt,
                "value": float(self.values[run][prompt, at]),
            }
            for number, run in runs
            for at, name in enumerate(self.names)
            for prompt in range(len(self.clean))
        ]
