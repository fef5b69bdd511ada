"""Scale, remove or keep single diagonals of the attention pattern."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..bridge import ModelInfo
from ..errors import EditError, OffsetError, PatchError
from ..maths.diagonals import DiagonalChange, has_keys
from ..maths.offsets import as_offsets
from .base import Edit, HookContext

_LARGEST = 1e30


def _log(factor: float) -> float:
    return math.log(factor) if factor > 0 else -math.inf


@dataclass(frozen=True, repr=False)
class _DiagonalEdit(Edit):
    """Acts on diagonals: in the logits when rows are renormalised, else in the pattern.

    Renormalising is exact however little mass remains, because the softmax does it. A row that
    loses all its keys gets a zero pattern, and so a zero output.
    """

    offsets: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            object.__setattr__(self, "offsets", as_offsets(self.offsets))
        except OffsetError as error:
            raise OffsetError(f"{type(self).__name__}: {error}") from None
        if not isinstance(getattr(self, "renormalize", True), bool):
            raise EditError(f"{type(self).__name__}: renormalize is True or False")

    def validate(self, info: ModelInfo) -> None:
        """Raise if the model lacks a head, or its context cannot hold an offset."""
        super().validate(info)
        info.require_offsets(self.offsets)

    def _amounts(self) -> tuple[float, float]:
        """Factors on the attention at `offsets`, and elsewhere; each 0 or more."""
        raise AssertionError("each diagonal edit says what it does")

    def diagonal_changes(self) -> tuple[DiagonalChange, ...]:
        """One change, of the logits when rows are renormalised."""
        own, elsewhere = self._amounts()
        if not getattr(self, "renormalize", True):
            return (DiagonalChange("pattern", self.offsets, own, elsewhere),)
        return (DiagonalChange("scores", self.offsets, _log(own), _log(elsewhere)),)

    def on_scores(
        self, ctx: HookContext, scores: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head query key"]:
        """The edited logits; rows that lost all keys keep theirs and are cleared in the pattern."""
        if not getattr(self, "renormalize", True):
            return scores
        past = ctx.call.cached_columns(scores.shape[-1])
        edited = self.diagonal_changes()[0].on_matrix(scores, past)
        left = has_keys(edited, past)
        ctx.memory["emptied"] = has_keys(scores, past) & ~left
        # A row of nothing but −inf would give NaN, in the forward or in the backward pass; rows of
        # padding had no keys to begin with and stay as they are.
        return torch.where(left[..., None], edited, scores)

    def on_pattern(
        self, ctx: HookContext, pattern: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head query key"]:
        """The edited pattern (not renormalised), or zeros in the rows that lost all keys."""
        if not getattr(self, "renormalize", True):
            past = ctx.call.cached_columns(pattern.shape[-1])
            return self.diagonal_changes()[0].on_matrix(pattern, past)
        if "emptied" not in ctx.memory:
            raise PatchError(
                f"{self}: its hook on the pattern ran without the one on the scores; use all hooks "
                "of slashpatch.hooks, once each"
            )
        return pattern.masked_fill(ctx.memory.pop("emptied")[..., None], 0.0)


@dataclass(frozen=True, repr=False)
class ScaleOffsets(_DiagonalEdit):
    """Multiply the attention that a head pays `offset` tokens back, for each of some offsets.

    Sensible where a slash is to be weakened or strengthened by degrees. With `renormalize` the rest
    of the row grows to fill what was taken, as if the logits had been moved by log(factor); without
    it the head writes less (or more) than one row's worth of values.

    Attributes:
        offsets: One or several Δ.
        factor: From 0 (remove) up; 1 changes nothing.
        renormalize: Whether the softmax renormalises the row (an attention sink takes part).
    """

    factor: float | int
    renormalize: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            isinstance(self.factor, bool)
            or not isinstance(self.factor, (int, float))
            or not abs(self.factor) <= _LARGEST
            or self.factor < 0
        ):
            raise EditError(
                f"ScaleOffsets: factor is a finite number from 0; got {str(self.factor)[:40]}"
            )
        object.__setattr__(self, "factor", float(self.factor))

    def _amounts(self) -> tuple[float, float]:
        return float(self.factor), 1.0


@dataclass(frozen=True, repr=False)
class KnockOut(_DiagonalEdit):
    """Remove diagonals: the head cannot read the token `offset` back. The rest renormalises.

    The sharpest test of a slash: the head keeps everything else that it does. The mass goes to the
    remaining keys, often to the first token.

    Attributes:
        offsets: One or several Δ.
        renormalize: Whether the softmax renormalises the row (an attention sink takes part).
    """

    renormalize: bool = True

    def _amounts(self) -> tuple[float, float]:
        return 0.0, 1.0


@dataclass(frozen=True, repr=False)
class KeepOnly(_DiagonalEdit):
    """Keep some diagonals and remove all other attention: is the slash enough?

    With one offset and `renormalize`, the head becomes a pure "read the token Δ back".

    Attributes:
        offsets: One or several Δ.
        renormalize: Whether the softmax renormalises the row (an attention sink takes part).
    """

    renormalize: bool = True

    def _amounts(self) -> tuple[float, float]:
        return 1.0, 0.0
