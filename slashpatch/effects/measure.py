"""Measure the effects of edits on metrics, on paired prompts, next to controls."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..bridge.provenance import provenance
from ..bridge.workers.options import Workers, as_workers
from .controls.base import Control, few_draws
from .controls.by_name import as_control
from .metrics.by_name import as_metric
from .result import Result
from .running.conditions import Condition, conditions, require_options, seen_in_fits
from .running.evaluate import evaluate
from .running.evaluation import MetricRunner
from .running.inputs import batches, prompts_for
from .statistics import adjusted, beyond_draws, compared, few_prompts

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge


def measure(
    model: TransformerBridge,
    edits: Any,
    metrics: Any = ("loss", "kl", "top1"),
    prompts: Any = None,
    controls: Any = (),
    *,
    random_tokens: bool = False,
    n_prompts: int = 16,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
    workers: int | str | Workers | None = None,
) -> Result:
    """Measure the effects of edits on metrics, with intervals, p-values and controls.

    Args:
        model: A TransformerBridge; active patches are part of the clean run.
        edits: One or several edits, each measured alone; edits of a nested list act together.
        metrics: Names (`slashpatch.effects.metrics.by_name.METRICS`), functions of logits and
            tokens, or objects such as `SlashScores(heads, offset)`.
        prompts: As for `scan`. None: natural text, or repeated random tokens for copying metrics.
        controls: Names such as "random-heads:8", "matched-heads", "other-offsets", "random-pairs".
            Without a number, 19 are drawn, or as many as there are.
        random_tokens: Use uniform random tokens instead of natural text.
        n_prompts: Number of prompts; fewer than 6 have no intervals and p-values.
        max_tokens: Length of generated prompts, at most the model's context; None: 128, or the
            context if that is shorter.
        batch_size: Prompts per forward pass; None: by memory. Changes results by rounding only.
        confidence: Level of the intervals.
        seed: Random seed of prompts, controls and bootstrap resamples.
        progress: Whether to show a progress bar; None: on a terminal only.
        workers: Number of worker processes, or a `Workers`; None stays in this process.

    Returns:
        A Result. `frame` has a row per edit, metric and number of the metric (`of`: a head or a
        position). Rows against "clean" hold the paired effect, edited − clean; interval and `p`
        speak of other prompts. Rows against a control hold the effect beyond the control's mean
        effect. Their interval speaks of other prompts and other draws (NaN for fewer than 6 draws),
        `p` of other prompts with these same draws, and `p_rank` of other draws on these same
        prompts: (1 + draws at least as large) / (1 + draws). `as_large` is the share of draws whose
        mean effect is at least as large. `q` is p adjusted over all rows (Benjamini-Hochberg).
        `tables` has the control's `draws` and each prompt's `values`; `remarks` say where prompts
        or draws are too few.

    Raises:
        EditError: An edit that does not fit the model.
        MetricError: A metric that is misspelt, or whose values are not finite.
        ControlError: A control that is misspelt, or that cannot be drawn for an edit.
        PromptError: Prompts that are empty, longer than the context, or unfit for a metric.
        PatchError: As `patch` raises it.
    """
    require_options(seed, confidence, n_prompts=n_prompts, batch_size=batch_size)
    pool_of, wanted = as_workers(workers), conditions(edits)
    several = metrics if isinstance(metrics, (list, tuple)) else [metrics]
    runner = MetricRunner(model, [as_metric(metric) for metric in several])
    drawn_by = [
        as_control(control)
        for control in (controls if isinstance(controls, (list, tuple)) else [controls])
    ]
    chosen = prompts_for(
        model,
        runner.metrics,
        prompts,
        random_tokens=random_tokens,
        n_prompts=n_prompts,
        max_tokens=max_tokens,
        default=128,
        seed=seed,
    )
    all_batches = batches(chosen, model.cfg.d_vocab, batch_size, model.cfg.device)
    draws = {
        (condition, control): control.draw(model, condition, all_batches, seed)
        for condition in wanted
        for control in drawn_by
    }
    edited = list(dict.fromkeys([*wanted, *itertools.chain.from_iterable(draws.values())]))
    clean, *others = evaluate(model, runner, chosen, edited, batch_size, progress, pool_of)
    values = dict(zip(edited, others, strict=True))
    table = _Table(runner, seed, confidence)
    for condition in wanted:
        table.add(condition, "clean", clean, values[condition])
        for control in drawn_by:
            drawn = draws[condition, control]
            table.add_control(condition, control, drawn, clean, values)
            table.remarks += few_draws(control, len(drawn))
    details = {
        "measured": [str(condition) for condition in wanted],
        "metrics": runner.names,
        "controls": [str(control) for control in drawn_by],
        "prompts": chosen.record,
        "confidence": confidence,
        "seed": seed,
        **({} if pool_of is None else pool_of.record),
    }
    per_prompt = _values(runner, {Condition(): clean, **values})
    remarks = seen_in_fits(edited, chosen)
    return table.result(per_prompt, remarks, provenance(model, **details))


class _Table:
    """Collects the rows of a result, and adjusts their p-values together at the end."""

    def __init__(self, runner: MetricRunner, seed: int, confidence: float) -> None:
        self.runner, self.seed, self.confidence = runner, seed, confidence
        self.rows: list[dict[str, Any]] = []
        self.draws: list[dict[str, Any]] = []
        self.remarks: list[str] = []

    def add(
        self,
        condition: Condition,
        against: str,
        before: list[Tensor],
        after: list[Tensor],
        **more: list[Tensor],
    ) -> None:
        """Add the rows of one comparison; `more` adds columns, one tensor [of] per metric."""
        for index, name in enumerate(self.runner.names):
            columns = compared(before[index], after[index], self.seed, self.confidence)
            columns.update({column: tensors[index] for column, tensors in more.items()})
            n, width = before[index].shape
            for at, of in enumerate(self.runner.labels(index, width)):
                row = {"edit": str(condition), "metric": name, "of": of, "against": against, "n": n}
                self.rows.append({**row, **{key: float(x[at]) for key, x in columns.items()}})

    def add_control(
        self,
        condition: Condition,
        control: Control,
        drawn: list[Condition],
        clean: list[Tensor],
        values: dict[Condition, list[Tensor]],
    ) -> None:
        """Add the rows of an edit against the mean over a control's draws, and the draws."""
        means: list[Tensor] = []
        more: dict[str, list[Tensor]] = {name: [] for name in ("low", "high", "p_rank", "as_large")}
        for index, before in enumerate(clean):
            of_draws = torch.stack([values[draw][index] for draw in drawn])  # [draw, prompt, of]
            effects = of_draws.mean(1) - before.mean(0)
            effect_of_edit = (values[condition][index] - before).mean(0)
            means.append(of_draws.mean(0))
            more["as_large"].append((effects.abs() >= effect_of_edit.abs()).double().mean(0))
            beyond = beyond_draws(
                values[condition][index] - before, of_draws - before, self.seed, self.confidence
            )
            for name in ("low", "high", "p_rank"):
                more[name].append(getattr(beyond, name))
            for draw, effect in zip(drawn, effects, strict=True):
                for at, of in enumerate(self.runner.labels(index, effect.numel())):
                    self.draws.append(
                        {
                            "edit": str(condition),
                            "control": control.name,
                            "drawn": str(draw),
                            "metric": self.runner.names[index],
                            "of": of,
                            "effect": float(effect[at]),
                        }
                    )
        self.add(condition, f"{control.name}:{len(drawn)}", means, values[condition], **more)

    def result(
        self, values: pd.DataFrame, remarks: tuple[str, ...], origin: dict[str, Any]
    ) -> Result:
        """Return the Result, with p-values adjusted over all rows."""
        import pandas as pd

        tables = {"values": values}
        if self.draws:
            tables["draws"] = pd.DataFrame(self.draws)
        remarks = (*few_prompts(self.rows[0]["n"]), *dict.fromkeys(self.remarks), *remarks)
        return Result("measure", adjusted(self.rows), tables, remarks, origin)


def _values(runner: MetricRunner, values: dict[Condition, list[Tensor]]) -> pd.DataFrame:
    """Return a table of all values: one row per condition, metric, number and prompt."""
    import pandas as pd

    rows = []
    for condition, by_metric in values.items():
        for index, table in enumerate(by_metric):
            labels = runner.labels(index, table.shape[1])
            for prompt, numbers in enumerate(table.tolist()):
                rows += [
                    (str(condition), runner.names[index], of, prompt, number)
                    for of, number in zip(labels, numbers, strict=True)
                ]
    return pd.DataFrame(rows, columns=["edit", "metric", "of", "prompt", "value"])
