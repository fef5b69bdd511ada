"""Runs of the whole model under edits and under their controls, for claims 7, 8 and 9."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..data.prompts import PromptSet
from ..edits import Edit
from ..effects.controls.heads import MatchedHeads
from ..effects.metrics.by_name import as_metric
from ..effects.running.conditions import Condition
from ..effects.running.evaluate import evaluate
from ..effects.running.evaluation import MetricRunner
from ..effects.running.inputs import batches
from ..errors import ControlError
from .subjects import Subjects

#: How many offsets random ones are drawn from, at least (*ours*): the smallest that are not edited.
_OFFSETS = 24


@dataclass(frozen=True)
class Runs:
    """Values of metrics per prompt: in the clean run, under an edit, and under each control.

    Attributes:
        clean: One tensor a metric; metrics may have different numbers of values.
        edited: Likewise, under the edit.
        draws: By control: the values of each draw.
        refused: By control: why it could not be drawn.
    """

    clean: list[Float[Tensor, "prompt _"]]
    edited: list[Float[Tensor, "prompt _"]]
    draws: dict[str, list[list[Float[Tensor, "prompt _"]]]]
    refused: dict[str, str]


def run(
    on: Subjects,
    prompts: PromptSet,
    metrics: Sequence[Any],
    edits: Sequence[Edit],
    controls: dict[str, Callable[[], list[Condition]]],
) -> Runs:
    """Run the model on prompts clean, under edits that act together, and under each control."""
    drawn: dict[str, list[Condition]] = {}
    refused: dict[str, str] = {}
    for name, draw in controls.items():
        try:
            drawn[name] = draw()
        except ControlError as error:
            refused[name] = str(error)
    condition = Condition(tuple(edits))
    conditions = list(dict.fromkeys([condition, *(c for draws in drawn.values() for c in draws)]))
    runner = MetricRunner(on.model, [as_metric(metric) for metric in metrics])
    clean, *others = evaluate(on.model, runner, prompts, conditions, None, on.progress, on.workers)
    values = dict(zip(conditions, others, strict=True))
    draws = {name: [values[c] for c in of] for name, of in drawn.items()}
    return Runs(clean, values[condition], draws, refused)


def matched_heads(
    on: Subjects, edits: Sequence[Edit], prompts: PromptSet
) -> Callable[[], list[Condition]]:
    """Return a function that draws the same edits at heads of similar output norm."""

    def draw() -> list[Condition]:
        control = MatchedHeads(on.settings.n_draws)
        in_batches = batches(prompts, on.model.cfg.d_vocab, None, on.model.cfg.device)
        return control.draw(on.model, Condition(tuple(edits)), in_batches, on.seed)

    return draw


def other_offsets(
    on: Subjects,
    edit_at: Callable[[dict[int, int]], Sequence[Edit]],
    length: int,
    label: str,
) -> Callable[[], list[Condition]]:
    """Return a function that draws the same edits of the same heads at other offsets.

    `edit_at` makes the edits from the offsets that replace the slashes' own. They are drawn from
    the smallest offsets from 1 that no slash has.
    """

    def draw() -> list[Condition]:
        used = list(on.by_offset())
        free = [offset for offset in range(1, length // 2) if offset not in used]
        pool = torch.tensor(free[: max(_OFFSETS, 3 * len(used))])
        generator = on.generator(label)
        drawn: dict[str, Condition] = {}
        for _ in range(40 * on.settings.n_draws):
            if len(drawn) == on.settings.n_draws or len(pool) < len(used):
                break
            order = torch.randperm(len(pool), generator=generator)[: len(used)]
            new = dict(zip(used, pool[order].tolist(), strict=True))
            condition = Condition(tuple(edit_at(new)))
            drawn.setdefault(str(condition), condition)
        if not drawn:
            raise ControlError(
                f"there are only {len(pool)} other offsets in prompts of {length} tokens, to "
                f"replace {len(used)}"
            )
        return list(drawn.values())

    return draw
