"""The edits that `check` tries on a model: one of each class, and those that say nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor

from .. import bridge
from ..bridge import ModelInfo
from ..bridge.qk import LayerQK
from ..edits import (
    AblateHeads,
    DropBand,
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
    fit_rank_one,
)
from ..heads import Head

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: What makes an edit, and the one that stands for it in generation.
Maker = Callable[[], tuple[Edit, Edit]]
_ROTARY = (ShiftSlash, DropBand, ScaleBand, FreezeBand, SwapBands, SetFrequencies, PlantSlash)


def edits(
    model: TransformerBridge, turned: Sequence[LayerQK], tokens: Int[Tensor, "batch pos"]
) -> list[tuple[str, Maker]]:
    """One edit of each class by name, on heads of the first and last layer that it can act on.

    `turned` are the layers with RoPE that could be read. Without one the rotary edits act on the
    first and last layer all the same, so that what refuses them can be told.
    """
    a = bridge.read(model)
    own = (Head(0, a.n_heads - 1), Head(a.n_layers - 1, 0))
    made: dict[str, Callable[[], Edit]] = {
        "AblateHeads": lambda: AblateHeads(own),
        "ScaleOffsets": lambda: ScaleOffsets(own, [0, 1], 3.0),
        "KnockOut": lambda: KnockOut(own, [0, 2]),
        "KeepOnly": lambda: KeepOnly(own, [0, 1]),
    }
    if turned:
        first, last = (qk.require_rotary() for qk in (turned[0], turned[-1]))
        n = min(first.n_pairs, last.n_pairs)
        theta = tuple((0.5 * first.inv_freq).tolist())
        at = (Head(turned[0].layer, a.n_heads - 1), Head(turned[-1].layer, 0))
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
            del made["SwapBands"]  # there is nothing to exchange
    else:
        made |= dict.fromkeys((one.__name__ for one in _ROTARY), lambda: ShiftSlash(own, 1))
    same: dict[str, Maker] = {
        name: lambda make=make: (make(), make())  # type: ignore[misc]
        for name, make in made.items()
    }

    def rank_one() -> tuple[Edit, Edit]:
        return RankOne(own), RankOne(own, basis=fit_rank_one(model, own, tokens.cpu()))

    return [*same.items(), ("RankOne", rank_one)]


def identities(a: ModelInfo, turned: Sequence[LayerQK]) -> list[Edit]:
    """Edits that change nothing."""
    head = Head(a.n_layers - 1, 0)
    found: list[Edit] = [ScaleOffsets(head, [0, 1], 1.0), RankOne(head, rank=a.d_head)]
    if turned:
        head = Head(turned[-1].layer, 0)
        found += [
            ShiftSlash(head, 0),
            ScaleBand(head, "pairs 0", 1.0),
            SwapBands(head, "pairs 0", "pairs 0"),
        ]
    return found
