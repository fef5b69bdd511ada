"""Claim 6: rank-one queries and keys come from the axis of the cone of the attention's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import bridge
from ..data.heads import Head
from ..edits import Axis, DropDirection, fit_axis
from ..edits.drop_direction import random_direction
from ..maths.cone import without_component
from ..maths.rank import r1
from .edited_scores import Plan, Scores, by_layer
from .measured import Measured, beyond, mean
from .subjects import Subjects

_CHANGES = "equal changes"


class Cone:
    """The tests of the cone: an axis fitted on the picking prompts, and random directions.

    Attributes:
        axis: The axis of the layers of the slash heads; None before `add`.
    """

    def __init__(self) -> None:
        self.axis: Axis | None = None

    def add(self, on: Subjects, plan: Plan) -> None:
        """Add the edits that drop the axis, and those that change inputs as much elsewhere."""
        on.info.projections  # noqa: B018  refuses models whose queries cannot be computed again
        self.axis = fit_axis(on.model, on.heads, [*on.picking.tokens], seed=on.seed)
        plan.add("axis removed", [DropDirection(on.heads, direction=self.axis)], on.slashes)
        for draw in range(on.settings.n_draws):
            edit = DropDirection(
                on.heads, direction=self.axis, control="same_size", draw=_seeded(on, draw)
            )
            plan.add(f"{_CHANGES} #{draw}", [edit], on.slashes)

    def read(self, scores: Scores) -> list[Measured]:
        """Return the tests of claim 6."""
        assert self.axis is not None
        on = scores.on
        inputs = _inputs(on, sorted(by_layer(on.slashes)))
        tests = [
            mean("cone", _cosines(self.axis, inputs), on.seed),
            scores.kept("axis removed", "axis removed"),
            scores.against("axis beyond random directions", "axis removed", _CHANGES, sign=-1),
        ]
        for part in ("q", "k"):
            clean = _mean_r1(on, inputs, part, None, 0)
            dropped = clean - _mean_r1(on, inputs, part, self.axis, -1)
            draws = [
                clean - _mean_r1(on, inputs, part, self.axis, draw)
                for draw in range(on.settings.n_draws)
            ]
            left = float((clean - dropped).mean())
            detail = f"from {float(clean.mean()):.2f} to {left:.2f}"
            tests += [
                mean(f"r1 {part} without axis", dropped, on.seed, detail),
                beyond(f"r1 {part} beyond random directions", dropped, torch.stack(draws), on.seed),
            ]
        return tests


def _seeded(on: Subjects, draw: int) -> int:
    """Return the number of a draw among those of all seeds."""
    return (on.seed * on.settings.n_draws + draw) % 2**63


def _inputs(on: Subjects, layers: Sequence[int]) -> list[dict[int, Float[Tensor, "pos d_model"]]]:
    """Return the attention inputs of some layers, for each prompt."""
    found = []
    for tokens in on.natural.tokens:
        kept: dict[int, Tensor] = {}

        def keep(x: Tensor, hook: Any, kept: dict[int, Tensor] = kept) -> None:
            kept[hook.layer()] = x.detach()[0].clone()

        hooks = [(on.info.hook(layer, "input"), keep) for layer in layers]
        cut = tokens[: on.settings.n_effect_tokens]
        with torch.no_grad():
            bridge.run_for_hooks(on.model, cut[None].to(on.model.cfg.device), hooks)
        found.append(kept)
    return found


def _cosines(axis: Axis, inputs: list[dict[int, Tensor]]) -> Float[Tensor, "prompt"]:
    """Return the mean cosine of the inputs to the axis, per prompt, mean over layers."""
    rows = []
    for of_prompt in inputs:
        of_layers = []
        for layer, x in of_prompt.items():
            wide = x.double().cpu()
            of_layers.append(((wide @ axis.of(layer).double()) / wide.norm(dim=-1)).mean())
        rows.append(torch.stack(of_layers).mean())
    return torch.stack(rows)


def _mean_r1(
    on: Subjects, inputs: list[dict[int, Tensor]], part: str, axis: Axis | None, draw: int
) -> Float[Tensor, "prompt"]:
    """Return r1 of the slash heads' queries or keys, per prompt, mean over heads.

    `axis` None: as they are. Else without the axis (draw −1), or changed as much along the random
    direction of a draw.
    """
    group = on.info.n_heads // on.info.n_kv_heads if part == "k" else 1
    rows = []
    for of_prompt in inputs:
        values = []
        for layer, heads in by_layer(on.slashes).items():
            x = of_prompt[layer][None]
            if axis is not None:
                u = axis.of(layer)
                w = u if draw < 0 else random_direction(u, layer, _seeded(on, draw))
                x = without_component(x, u, w)
            values += _r1_of(on, layer, part, x, [Head(layer, h.head // group) for h in heads])
        rows.append(torch.stack(values).mean())
    return torch.stack(rows)


def _r1_of(
    on: Subjects, layer: int, part: str, x: Float[Tensor, "1 pos d_model"], heads: list[Head]
) -> list[Float[Tensor, ""]]:
    project = getattr(on.info.projections[layer], part)
    with torch.no_grad():
        made = project(x, torch.arange(x.shape[1])[None])[0].double().cpu()
    return [r1(made[:, head.head].mT @ made[:, head.head]) for head in heads]
