"""What edits do, by several metrics, on paired prompts, beside controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..bridge.provenance import provenance
from .conditions import Condition, conditions, require_options
from .control import Control
from .controls import as_control
from .evaluation import Meter, evaluate
from .inputs import batches, prompts_for
from .metrics import as_metric
from .result import Result
from .statistics import adjusted, compared

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
    max_tokens: int | None = 128,
    batch_size: int | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
) -> Result:
    """Effects of edits on metrics, with intervals, p-values and controls.

    Args:
        model: A TransformerBridge, as it is: active patches are part of "clean".
        edits: An edit or several, each measured by itself; those of a nested list act together.
        metrics: Names (`slashpatch.effects.metrics.METRICS`), functions of logits and tokens, or
            objects such as `SlashScores(heads, offset)` and `LogitDifference(right, wrong)`.
        prompts: As for `scan`. None: natural text; where a metric is of copying, repeated tokens.
        controls: Such as "random-heads:8", "matched-heads", "other-offsets", "random-pairs".
        random_tokens: Uniform random tokens instead of natural text.
        n_prompts: How many; they are the unit of every interval and test.
        max_tokens: Length of prompts that are made here.
        batch_size: Prompts per pass; picked by memory when None. Results differ by rounding only.
        confidence: Of the intervals.
        seed: Of prompts, controls, resamples and sign flips.
        progress: Whether to show a bar; when None, on a terminal only.

    Returns:
        A Result. `frame` has a row per edit, metric and number of it (`of`: a head or position):
        against "clean", the paired effect edited − baseline; against each control, the effect
        beyond the control's mean effect, and `as_large`, the share of its draws whose mean effect
        is at least as large. `q` is p adjusted over all rows (Benjamini-Hochberg). `tables` has the
        `draws` and every prompt's `values`.

    Raises:
        EditError, MetricError, ControlError, PromptError, and what `patch` raises.
    """
    require_options(seed, confidence, n_prompts=n_prompts, batch_size=batch_size)
    wanted = conditions(edits)
    # A tuple of names is several metrics; a metric that is a tuple itself does not exist.
    several = metrics if isinstance(metrics, (list, tuple)) else [metrics]
    meter = Meter(model, [as_metric(metric) for metric in several])
    drawn_by = [as_control(one) for one in _listed(controls)]
    found = prompts_for(
        model,
        meter.metrics,
        prompts,
        random_tokens=random_tokens,
        n_prompts=n_prompts,
        max_tokens=max_tokens,
        seed=seed,
    )
    todo = batches(found, model.cfg.d_vocab, batch_size, model.cfg.device)
    draws = {
        (condition, control): control.draw(model, condition, todo, seed)
        for condition in wanted
        for control in drawn_by
    }
    every = list(dict.fromkeys([*wanted, *(one for drawn in draws.values() for one in drawn)]))
    clean, *others = evaluate(model, meter, found, every, batch_size, progress)
    values = dict(zip(every, others, strict=True))
    table = _Table(meter, seed, confidence)
    for condition in wanted:
        table.add(condition, "clean", clean, values[condition])
        for control in drawn_by:
            drawn = draws[condition, control]
            table.add_control(condition, control, drawn, clean, values)
    details = {
        "measured": [str(condition) for condition in wanted],
        "metrics": meter.names,
        "controls": [str(control) for control in drawn_by],
        "prompts": found.record,
        "confidence": confidence,
        "seed": seed,
    }
    each = _values(meter, {Condition(): clean, **values})
    return table.result(each, provenance(model, **details))


def _listed(spec: Any) -> Sequence[Any]:
    return list(spec) if isinstance(spec, (list, tuple)) else [spec]


class _Table:
    """Gathers rows, and adjusts their p-values together at the end."""

    def __init__(self, meter: Meter, seed: int, confidence: float) -> None:
        self.meter, self.seed, self.confidence = meter, seed, confidence
        self.rows: list[dict[str, Any]] = []
        self.draws: list[dict[str, Any]] = []

    def add(
        self,
        condition: Condition,
        against: str,
        before: list[Tensor],
        after: list[Tensor],
        **more: list[Tensor],
    ) -> None:
        """Rows of one comparison; `more` adds columns, one tensor [of] a metric."""
        for place, name in enumerate(self.meter.names):
            said = compared(before[place], after[place], self.seed, self.confidence)
            said.update({column: tensors[place] for column, tensors in more.items()})
            n, width = before[place].shape
            for at, of in enumerate(self.meter.labels(place, width)):
                row = {"edit": str(condition), "metric": name, "of": of, "against": against, "n": n}
                self.rows.append({**row, **{key: float(each[at]) for key, each in said.items()}})

    def add_control(
        self,
        condition: Condition,
        control: Control,
        drawn: list[Condition],
        clean: list[Tensor],
        values: dict[Condition, list[Tensor]],
    ) -> None:
        """The edit against the mean of the draws, and how many draws do as much."""
        means, as_large = [], []
        for place, before in enumerate(clean):
            each = torch.stack([values[one][place] for one in drawn])
            effects = each.mean(1) - before.mean(0)
            own = (values[condition][place] - before).mean(0)
            means.append(each.mean(0))
            as_large.append((effects.abs() >= own.abs()).double().mean(0))
            for one, effect in zip(drawn, effects, strict=True):
                for at, of in enumerate(self.meter.labels(place, effect.numel())):
                    self.draws.append(
                        {
                            "edit": str(condition),
                            "control": control.name,
                            "drawn": str(one),
                            "metric": self.meter.names[place],
                            "of": of,
                            "effect": float(effect[at]),
                        }
                    )
        self.add(condition, str(control), means, values[condition], as_large=as_large)

    def result(self, values: pd.DataFrame, origin: dict[str, Any]) -> Result:
        """All rows, p-values adjusted."""
        import pandas as pd

        tables = {"values": values}
        if self.draws:
            tables["draws"] = pd.DataFrame(self.draws)
        return Result("measure", adjusted(self.rows), tables, provenance=origin)


def _values(meter: Meter, values: dict[Condition, list[Tensor]]) -> pd.DataFrame:
    """Every prompt's value, one row each."""
    import pandas as pd

    rows = []
    for condition, found in values.items():
        for place, table in enumerate(found):
            labels = meter.labels(place, table.shape[1])
            for prompt, numbers in enumerate(table.tolist()):
                rows += [
                    (str(condition), meter.names[place], of, prompt, number)
                    for of, number in zip(labels, numbers, strict=True)
                ]
    return pd.DataFrame(rows, columns=["edit", "metric", "of", "prompt", "value"])
