"""Edits of the attention pattern's sub-diagonals: scale, knock out, or keep only some offsets."""

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
from .base import Edit, HookContext, finite_number


def _log(factor: float) -> float:
    return math.log(factor) if factor > 0 else -math.inf


@dataclass(frozen=True, repr=False)
class _DiagonalEdit(Edit):
    """Base of the edits that multiply sub-diagonals of the attention by factors.

    With renormalisation the edit adds log(factor) to the logits, so that the softmax renormalises
    the row, exactly even where little attention remains; without, it multiplies the pattern. A row
    that loses all its keys gets a zero pattern, and so a zero output.
    """

    offsets: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            object.__setattr__(self, "offsets", as_offsets(self.offsets))
        except OffsetError as error:
            raise OffsetError(f"{type(self).__name__}: {error}") from None
        if not isinstance(self._renormalizes, bool):
            raise EditError(f"{type(self).__name__}: renormalize must be True or False")

    @property
    def _renormalizes(self) -> bool:
        # The subclasses declare the field, because it has a default and must come last.
        return getattr(self, "renormalize", True)

    def validate(self, info: ModelInfo) -> None:
        """Raise if the model lacks one of the heads, or an offset exceeds its context."""
        super().validate(info)
        info.require_offsets(self.offsets)

    def _factors(self) -> tuple[float, float]:
        """Return the factors (≥ 0) on the attention at `offsets` and at all other offsets."""
        raise AssertionError("each diagonal edit defines its factors")

    def diagonal_changes(self) -> tuple[DiagonalChange, ...]:
        """Return one change: of the logits if rows are renormalised, else of the pattern."""
        factor, elsewhere = self._factors()
        if not self._renormalizes:
            return (DiagonalChange("pattern", self.offsets, factor, elsewhere),)
        return (DiagonalChange("scores", self.offsets, _log(factor), _log(elsewhere)),)

    def on_scores(
        self, ctx: HookContext, scores: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head query key"]:
        """Return the edited logits; rows that lose all keys are left to `on_pattern`."""
        if not self._renormalizes:
            return scores
        past = ctx.call.cached_columns(scores.shape[-1])
        edited = self.diagonal_changes()[0].on_matrix(scores, past)
        keeps_keys = has_keys(edited, past)
        ctx.memory["emptied"] = has_keys(scores, past) & ~keeps_keys
        # The softmax of a row of −inf gives NaN, in the forward or in the backward pass, so rows
        # that lose all keys keep their logits here. Padding had no keys before, and stays as it is.
        return torch.where(keeps_keys[..., None], edited, scores)

    def on_pattern(
        self, ctx: HookContext, pattern: Float[Tensor, "batch head query key"]
    ) -> Float[Tensor, "batch head query key"]:
        """Return the edited pattern; if renormalised, rows that `on_scores` left no keys are 0."""
        if not self._renormalizes:
            past = ctx.call.cached_columns(pattern.shape[-1])
            return self.diagonal_changes()[0].on_matrix(pattern, past)
        if "emptied" not in ctx.memory:
            raise PatchError(
                f"{self}: its hook on the pattern ran, but its hook on the scores did not; attach "
                "all hooks that slashpatch.hooks returned, once each"
            )
        return pattern.masked_fill(ctx.memory.pop("emptied")[..., None], 0.0)


@dataclass(frozen=True, repr=False)
class ScaleOffsets(_DiagonalEdit):
    """Multiply a head's attention from each token i to the token i−Δ, for one or several offsets Δ.

    Use it to weaken or strengthen a slash by degrees. With `renormalize`, log(factor) is added to
    the logits, and the softmax shares the difference among the other keys of the row; without, the
    row of the pattern no longer sums to one.

    Attributes:
        offsets: One or several Δ ≥ 0, in tokens.
        factor: 0 or more; 0 removes the attention, 1 changes nothing.
        renormalize: Whether the softmax renormalises the row (attention sinks included).
    """

    factor: float | int
    renormalize: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        factor = finite_number("ScaleOffsets", "factor", self.factor)
        if factor < 0:
            raise EditError(f"ScaleOffsets: factor must be 0 or more; got {factor}")
        object.__setattr__(self, "factor", factor)

    def _factors(self) -> tuple[float, float]:
        return float(self.factor), 1.0


@dataclass(frozen=True, repr=False)
class KnockOut(_DiagonalEdit):
    """Knock out a head's attention from each token i to the token i−Δ, for one or several offsets.

    The sharpest test of a slash, because the rest of the head stays. With `renormalize`, the
    attention goes to the remaining keys, often to the first token.

    Attributes:
        offsets: One or several Δ ≥ 0, in tokens.
        renormalize: Whether the softmax renormalises the row (attention sinks included).
    """

    renormalize: bool = True

    def _factors(self) -> tuple[float, float]:
        return 0.0, 1.0


@dataclass(frozen=True, repr=False)
class KeepOnly(_DiagonalEdit):
    """Keep a head's attention to the tokens at some offsets Δ, and knock out all the rest.

    Tests whether the slash alone is enough. With one offset and `renormalize`, each token i attends
    to the token i−Δ alone.

    Attributes:
        offsets: One or several Δ ≥ 0, in tokens.
        renormalize: Whether the softmax renormalises the row (attention sinks included).
    """

    renormalize: bool = True

    def _factors(self) -> tuple[float, float]:
        return 1.0, 0.0
