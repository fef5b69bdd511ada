"""The edits that `check` tries on a model: one of each class, and identities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor

from .. import bridge
from ..bridge import ModelInfo
from ..bridge.qk import LayerQK
from ..data.heads import Head
from ..edits import (
    AblateHeads,
    DropBand,
    DropDirection,
    Edit,
    FreezeBand,
    KeepOnly,
    KnockOut,
    PlantSlash,
    RankOne,
    ScaleBand,
    ScaleOffsets,
    SetFrequencies,
    ShiftSlash,
    SwapBands,
    fit_axis,
    fit_rank_one,
)

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: A function that makes an edit, and the edit to use in its place with a KV cache.
Maker = Callable[[], tuple[Edit, Edit]]
_ROTARY = (ShiftSlash, DropBand, ScaleBand, FreezeBand, SwapBands, SetFrequencies, PlantSlash)


def edits(
    model: TransformerBridge, rope_layers: Sequence[LayerQK], tokens: Int[Tensor, "batch pos"]
) -> list[tuple[str, Maker]]:
    """Return one edit of each class, by name, on heads of the first and last layer that allow it.

    `rope_layers` are the layers with RoPE. If there are none, the rotary edits are made for layers
    without RoPE, so that the report contains their refusal. `tokens` are for fitting a basis.
    """
    info = bridge.read(model)
    heads = (Head(0, info.n_heads - 1), Head(info.n_layers - 1, 0))
    made: dict[str, Callable[[], Edit]] = {
        "AblateHeads": lambda: AblateHeads(heads),
        "ScaleOffsets": lambda: ScaleOffsets(heads, [0, 1], 3.0),
        "KnockOut": lambda: KnockOut(heads, [0, 2]),
        "KeepOnly": lambda: KeepOnly(heads, [0, 1]),
    }
    if rope_layers:
        first, last = (qk.require_rotary() for qk in (rope_layers[0], rope_layers[-1]))
        n = min(first.n_pairs, last.n_pairs)
        theta = tuple((0.5 * first.inv_freq).tolist())
        at = (Head(rope_layers[0].layer, info.n_heads - 1), Head(rope_layers[-1].layer, 0))
        made |= {
            "ShiftSlash": lambda: ShiftSlash(at, 1),
            "DropBand": lambda: DropBand(at, "pairs 0"),
            "ScaleBand": lambda: ScaleBand(at, "pairs 0", 3.0),
            "FreezeBand": lambda: FreezeBand(at, "pairs 0"),
            "SwapBands": lambda: SwapBands(at, "pairs 0", f"pairs {n - 1}"),
            "SetFrequencies": lambda: SetFrequencies(at[0], theta),
            "PlantSlash": lambda: PlantSlash(at, 2),
        }
        if n == 1:
            del made["SwapBands"]  # a single rotary pair has no other to swap with
    else:
        made |= dict.fromkeys((edit.__name__ for edit in _ROTARY), lambda: ShiftSlash(heads, 1))
    same: dict[str, Maker] = {
        name: lambda make=make: (make(), make())  # type: ignore[misc]
        for name, make in made.items()
    }

    def rank_one() -> tuple[Edit, Edit]:
        return RankOne(heads), RankOne(heads, basis=fit_rank_one(model, heads, tokens.cpu()))

    def drop_direction() -> tuple[Edit, Edit]:
        edit = DropDirection(heads, direction=fit_axis(model, heads, tokens.cpu()))
        return edit, edit

    return [*same.items(), ("RankOne", rank_one), ("DropDirection", drop_direction)]


def identities(info: ModelInfo, rope_layers: Sequence[LayerQK]) -> list[Edit]:
    """Return edits that must not change the logits."""
    head = Head(info.n_layers - 1, 0)
    edits: list[Edit] = [ScaleOffsets(head, [0, 1], 1.0), RankOne(head, rank=info.d_head)]
    if rope_layers:
        head = Head(rope_layers[-1].layer, 0)
        edits += [
            ShiftSlash(head, 0),
            ScaleBand(head, "pairs 0", 1.0),
            SwapBands(head, "pairs 0", "pairs 0"),
        ]
    return edits
