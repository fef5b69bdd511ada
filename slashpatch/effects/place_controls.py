"""Controls that move an edit to other offsets or rotary pairs of the same heads."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from .. import bridge
from ..edits import Edit
from ..errors import ControlError, ModelError
from ..maths.bands import band_pairs
from .conditions import Condition
from .control import Control, _sample
from .inputs import Batch

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class OtherOffsets(Control):
    """The same edit of the same heads at other offsets, as many of them."""

    name: ClassVar[str] = "other-offsets"
    #: From 1; beyond it a head's attention is mostly nothing.
    most: ClassVar[int] = 16

    def sampler(
        self, model: TransformerBridge, condition: Condition, batches: Sequence[Batch]
    ) -> Callable[[torch.Generator], Condition]:
        """Uniform over offsets 1 to 16 that no edit of the condition names."""
        last = min(self.most, max(batch.tokens.shape[1] for batch in batches) - 1)
        used = {offset for edit in condition.edits for offset in _offsets(edit)}
        pool = [offset for offset in range(1, last + 1) if offset not in used]
        edits = [edit for edit in condition.edits if _offsets(edit)]
        if not edits:
            raise ControlError(
                f"{self} cannot be drawn for {condition}: it names no offset; use it with "
                "KnockOut, KeepOnly, ScaleOffsets or PlantSlash"
            )
        n = len(used)
        if len(pool) < n or (len(edits) == 1 and math.comb(len(pool), n) < self.n):
            raise ControlError(
                f"{self} cannot be drawn for {condition}: offsets 1 to {last} "
                f"leave {len(pool)} others for {n}; ask for fewer, or use longer prompts"
            )

        def one(generator: torch.Generator) -> Condition:
            to = dict(zip(sorted(used), _sample(pool, n, generator), strict=True))
            return Condition(tuple(_with_offsets(edit, to) for edit in condition.edits))

        return one


def _offsets(edit: Edit) -> tuple[int, ...]:
    if hasattr(edit, "offsets"):
        return tuple(edit.offsets)
    return (edit.offset,) if hasattr(edit, "offset") else ()


def _with_offsets(edit: Edit, to: dict[int, int]) -> Edit:
    if hasattr(edit, "offsets"):
        return dataclasses.replace(edit, offsets=tuple(to[o] for o in edit.offsets))  # type: ignore
    if hasattr(edit, "offset"):
        return dataclasses.replace(edit, offset=to[edit.offset])  # type: ignore[call-arg]
    return edit


class RandomPairs(Control):
    """The same edit of the same heads on random rotary pairs, as many as the band has."""

    name: ClassVar[str] = "random-pairs"

    def sampler(
        self, model: TransformerBridge, condition: Condition, batches: Sequence[Batch]
    ) -> Callable[[torch.Generator], Condition]:
        """Uniform over sets of pairs that are not the band itself; two bands stay disjoint."""
        if not any(_bands(edit) for edit in condition.edits):
            raise ControlError(
                f"{self} cannot be drawn for {condition}: it names no band; use it with DropBand, "
                "FreezeBand, ScaleBand or SwapBands"
            )
        sizes = {
            (edit, field): len(_pairs_of(model, edit, field, self, condition))
            for edit in condition.edits
            for field in _bands(edit)
        }
        layers = bridge.read(model).qk

        def one(generator: torch.Generator) -> Condition:
            edits = []
            for edit in condition.edits:
                fields = _bands(edit)
                n_pairs = layers[edit.layers[0]].require_rotary().n_pairs if fields else 0
                pairs = iter(_sample(range(n_pairs), n_pairs, generator))
                bands = {
                    field: _band(itertools.islice(pairs, sizes[edit, field])) for field in fields
                }
                edits.append(dataclasses.replace(edit, **bands))
            return Condition(tuple(edits))

        return one

    def canonical(self, model: TransformerBridge, condition: Condition) -> Condition:
        """Bands pair by pair; two that are exchanged in one order."""
        edits = []
        for edit in condition.edits:
            fields = _bands(edit)
            bands = [_pairs_of(model, edit, field, self, condition) for field in fields]
            given = dict(zip(fields, map(_band, sorted(bands)), strict=True))
            edits.append(dataclasses.replace(edit, **given) if given else edit)
        return Condition(tuple(edits))


def _pairs_of(
    model: TransformerBridge, edit: Edit, field: str, control: Control, condition: Condition
) -> list[int]:
    """The rotary pairs of a band, ascending; the same ones in all the edit's layers."""
    layers = bridge.read(model).qk
    try:
        found = {
            tuple(sorted(band_pairs(getattr(edit, field), layers[layer].require_rotary().inv_freq)))
            for layer in edit.layers
        }
    except ModelError as error:
        raise ControlError(f"{control} cannot be drawn for {condition}: {error}") from error
    if len(found) > 1:
        raise ControlError(
            f"{control} cannot be drawn for {condition}: the band is of other pairs in other "
            "layers; give each layer an edit of its own, or name pairs"
        )
    return list(found.pop())


def _band(pairs: Iterable[int]) -> str:
    return "+".join(f"pairs {pair}-{pair}" for pair in sorted(pairs))


def _bands(edit: Edit) -> list[str]:
    return [field for field in ("band", "a", "b") if hasattr(edit, field)]
