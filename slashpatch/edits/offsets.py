"""Scale, remove or keep single diagonals of the attention pattern."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..errors import EditError, OffsetError, PatchError
from ..slash import as_offsets
from .base import Edit, Site

if TYPE_CHECKING:
    from ..anatomy import Anatomy


def scale_diagonals(
    matrix: Float[Tensor, "*batch query key"], offsets: Sequence[int], past: int, factor: float
) -> Float[Tensor, "*batch query key"]:
    """Multiply entries (i, i−Δ) by `factor`; query row r is token past + r."""
    scaled = matrix.clone()
    for offset in offsets:
        scaled.diagonal(past - offset, -2, -1).mul_(factor)
    return scaled


def keep_diagonals(
    matrix: Float[Tensor, "*batch query key"], offsets: Sequence[int], past: int, fill: float
) -> Float[Tensor, "*batch query key"]:
    """`fill` everywhere but at entries (i, i−Δ); query row r is token past + r."""
    kept = torch.full_like(matrix, fill)
    for offset in offsets:
        kept.diagonal(past - offset, -2, -1).copy_(matrix.diagonal(past - offset, -2, -1))
    return kept


def add_to_diagonals(
    scores: Float[Tensor, "*batch query key"], offsets: Sequence[int], past: int, amount: float
) -> Float[Tensor, "*batch query key"]:
    """Add `amount` (−inf removes) to entries (i, i−Δ); query row r is token past + r."""
    moved = scores.clone()
    for offset in offsets:
        moved.diagonal(past - offset, -2, -1).add_(amount)
    return moved


def has_keys(scores: Float[Tensor, "*batch query key"], past: int) -> Bool[Tensor, "*batch query"]:
    """Whether a row has a key left: one that is neither in the future nor masked.

    Masked keys carry the dtype's lowest number or −inf.
    """
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(past)
    masked = scores <= torch.finfo(scores.dtype).min / 2
    return (visible & ~masked).any(-1)


_LARGEST = 1e30


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

    def validate(self, anatomy: Anatomy) -> None:
        """Raise if the model lacks a head, or its context cannot hold an offset."""
        super().validate(anatomy)
        anatomy.require_offsets(self.offsets)

    def _edit_scores(self, scores: Tensor, past: int) -> Tensor:
        raise AssertionError("each diagonal edit says what it does to the logits")

    def _edit_pattern(self, pattern: Tensor, past: int) -> Tensor:
        raise AssertionError("each diagonal edit says what it does to the pattern")

    def on_scores(
        self, site: Site, scores: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head query key"]:
        """The edited logits; rows that lost all keys keep theirs and are cleared in the pattern."""
        if not getattr(self, "renormalize", True):
            return scores
        past = site.call.cached_columns(scores.shape[-1])
        edited = self._edit_scores(scores, past)
        left = has_keys(edited, past)
        site.memory["emptied"] = has_keys(scores, past) & ~left
        # A row of nothing but −inf would give NaN, in the forward or in the backward pass; rows of
        # padding had no keys to begin with and stay as they are.
        return torch.where(left[..., None], edited, scores)

    def on_pattern(
        self, site: Site, pattern: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head query key"]:
        """The edited pattern (not renormalised), or zeros in the rows that lost all keys."""
        if not getattr(self, "renormalize", True):
            return self._edit_pattern(pattern, site.call.cached_columns(pattern.shape[-1]))
        if "emptied" not in site.memory:
            raise PatchError(
                f"{self}: its hook on the pattern ran without the one on the scores; use all hooks "
                "of slashpatch.hooks, once each"
            )
        return pattern.masked_fill(site.memory.pop("emptied")[..., None], 0.0)


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

    def _edit_scores(self, scores: Tensor, past: int) -> Tensor:
        amount = math.log(self.factor) if self.factor > 0 else -math.inf
        return add_to_diagonals(scores, self.offsets, past, amount)

    def _edit_pattern(self, pattern: Tensor, past: int) -> Tensor:
        return scale_diagonals(pattern, self.offsets, past, self.factor)


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

    def _edit_scores(self, scores: Tensor, past: int) -> Tensor:
        return add_to_diagonals(scores, self.offsets, past, -math.inf)

    def _edit_pattern(self, pattern: Tensor, past: int) -> Tensor:
        return scale_diagonals(pattern, self.offsets, past, 0.0)


@dataclass(frozen=True, repr=False)
class KeepOnly(_DiagonalEdit):
    """Keep some diagonals and remove all other attention: is the slash enough?

    With one offset and `renormalize`, the head becomes a pure "read the token Δ back".

    Attributes:
        offsets: One or several Δ.
        renormalize: Whether the softmax renormalises the row (an attention sink takes part).
    """

    renormalize: bool = True

    def _edit_scores(self, scores: Tensor, past: int) -> Tensor:
        return keep_diagonals(scores, self.offsets, past, -math.inf)

    def _edit_pattern(self, pattern: Tensor, past: int) -> Tensor:
        return keep_diagonals(pattern, self.offsets, past, 0.0)
