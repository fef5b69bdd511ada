"""Controls that make the same edit of the same heads at other offsets or rotary pairs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from ... import bridge
from ...edits import Edit
from ...errors import ControlError, ModelError
from ...maths.bands import band_pairs
from ..running.conditions import Condition
from ..running.inputs import Batch
from .base import Control, sample

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class OtherOffsets(Control):
    """The same edit of the same heads at as many random other offsets."""

    name: ClassVar[str] = "other-offsets"
    #: Largest offset drawn (*ours*): beyond it, most heads attend very little.
    longest: ClassVar[int] = 16

    def sampler(
        self, model: TransformerBridge, condition: Condition, batches: Sequence[Batch]
    ) -> Callable[[torch.Generator], Condition]:
        """Return a function that draws uniformly from the offsets 1 to 16 that are not edited."""
        last = min(self.longest, max(batch.tokens.shape[1] for batch in batches) - 1)
        used = {offset for edit in condition.edits for offset in _offsets(edit)}
        pool = [offset for offset in range(1, last + 1) if offset not in used]
        edits = [edit for edit in condition.edits if _offsets(edit)]
        if not edits:
            raise ControlError(
                f"{self} cannot be drawn for {condition}: its edits have no offsets; use it with "
                "KnockOut, KeepOnly, ScaleOffsets or PlantSlash"
            )
        n = len(used)
        if len(pool) < n or (len(edits) == 1 and math.comb(len(pool), n) < self.fewest):
            raise ControlError(
                f"{self} cannot be drawn for {condition}: only {len(pool)} of the offsets 1 to "
                f"{last} are not edited, to replace {n}; ask for fewer, or use longer prompts"
            )

        def draw_one(generator: torch.Generator) -> Condition:
            to = dict(zip(sorted(used), sample(pool, n, generator), strict=True))
            return Condition(tuple(_with_offsets(edit, to) for edit in condition.edits))

        return draw_one


def _offsets(edit: Edit) -> tuple[int, ...]:
    """Return the offsets that an edit names, if any."""
    if hasattr(edit, "offsets"):
        return tuple(edit.offsets)
    return (edit.offset,) if hasattr(edit, "offset") else ()


def _with_offsets(edit: Edit, to: dict[int, int]) -> Edit:
    """Return the edit with each offset replaced by its counterpart in `to`."""
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
        """Return a function that draws uniformly from sets of pairs; two bands stay disjoint."""
        if not any(_bands(edit) for edit in condition.edits):
            raise ControlError(
                f"{self} cannot be drawn for {condition}: its edits have no band; use it with "
                "DropBand, FreezeBand, ScaleBand or SwapBands"
            )
        sizes = {
            (edit, field): len(_pairs_of(model, edit, field, self, condition))
            for edit in condition.edits
            for field in _bands(edit)
        }
        layers = bridge.read(model).qk

        def draw_one(generator: torch.Generator) -> Condition:
            edits = []
            for edit in condition.edits:
                fields = _bands(edit)
                n_pairs = layers[edit.layers[0]].require_rotary().n_pairs if fields else 0
                pairs = iter(sample(range(n_pairs), n_pairs, generator))
                bands = {
                    field: _band(itertools.islice(pairs, sizes[edit, field])) for field in fields
                }
                edits.append(dataclasses.replace(edit, **bands))
            return Condition(tuple(edits))

        return draw_one

    def canonical(self, model: TransformerBridge, condition: Condition) -> Condition:
        """Return the condition with bands as lists of pairs, SwapBands' two bands in order."""
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
    """Return the rotary pairs of a band, ascending.

    Raises ControlError unless they are the same in all of the edit's layers.
    """
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
            f"{control} cannot be drawn for {condition}: the band holds other pairs in other "
            "layers; use one edit per layer, or give the band as pairs"
        )
    return list(found.pop())


def _band(pairs: Iterable[int]) -> str:
    """Return the text of a band of these pairs."""
    return "+".join(f"pairs {pair}-{pair}" for pair in sorted(pairs))


def _bands(edit: Edit) -> list[str]:
    """Return the names of an edit's fields that hold bands."""
    return [field for field in ("band", "a", "b") if hasattr(edit, field)]
