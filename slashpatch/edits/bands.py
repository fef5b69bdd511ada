"""Scale or drop what a band of rotary pairs contributes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..maths.bands import band_mask
from .base import HookContext
from .rotary import _finite, _RotaryEdit

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, repr=False)
class ScaleBand(_RotaryEdit):
    """Multiply what a band of pairs contributes to the logit: the softmax sharpens or flattens.

    Attributes:
        band: high, medium, low, `pairs 0-7`, `wavelength 8-64`, or several joined by +.
        factor: Finite; 1 changes nothing, 0 drops the band.
    """

    band: Any
    factor: float | int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_band("band")
        object.__setattr__(self, "factor", _finite("ScaleBand", "factor", self.factor))

    def on_query(
        self, ctx: HookContext, q: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Queries with the band's pairs scaled."""
        return _scaled(q, ctx, self.band, self.factor)


@dataclass(frozen=True, repr=False)
class DropBand(_RotaryEdit):
    """Remove what a band of pairs contributes to the logit, content and position both.

    Says which frequencies carry a slash; the softmax also flattens, because a part of the logit is
    gone, so compare with dropping other bands of as many pairs.

    Attributes:
        band: high, medium, low, `pairs 0-7`, `wavelength 8-64`, or several joined by +.
    """

    band: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_band("band")

    def on_query(
        self, ctx: HookContext, q: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Queries with the band's pairs at zero."""
        return _scaled(q, ctx, self.band, 0.0)


def _scaled(q: Tensor, ctx: HookContext, band: str, factor: float) -> Tensor:
    assert ctx.qk is not None
    rotary = ctx.qk.require_rotary()  # bands are of its own θ, whatever the prompt's length
    gain = torch.ones(rotary.n_pairs, dtype=q.dtype, device=q.device)
    gain[band_mask(band, rotary.inv_freq).to(q.device)] = factor
    real, imag, rest = rotary.split(q)
    return rotary.join(real * gain, imag * gain, rest)
