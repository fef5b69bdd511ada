"""Scale or drop the contribution of a band of rotary pairs to the attention logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..maths.bands import band_mask
from .base import HookContext, finite_number
from .rotary import _RotaryEdit


@dataclass(frozen=True, repr=False)
class ScaleBand(_RotaryEdit):
    """Multiply the contribution of a band of rotary pairs to the logits by a factor.

    Content and position of these pairs are scaled together; the softmax becomes sharper or flatter.

    Attributes:
        band: high, medium, low, `pairs 0-7`, `share 0-0.25` (by frequency, the highest first),
            `wavelength 8-64` (in tokens), or several of these joined by +.
        factor: Any finite number; 1 changes nothing, 0 drops the band.
    """

    band: Any
    factor: float | int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_band("band")
        object.__setattr__(self, "factor", finite_number("ScaleBand", "factor", self.factor))

    def on_query(
        self, ctx: HookContext, q: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Return the queries with the band's pairs multiplied by `factor`."""
        return _scaled(q, ctx, self.band, self.factor)


@dataclass(frozen=True, repr=False)
class DropBand(_RotaryEdit):
    """Remove the contribution of a band of rotary pairs to the logits, content and position both.

    Tells which frequencies carry a slash. The softmax also becomes flatter, because a part of each
    logit is gone, so compare with dropping other bands of as many pairs.

    Attributes:
        band: high, medium, low, `pairs 0-7`, `share 0-0.25` (by frequency, the highest first),
            `wavelength 8-64` (in tokens), or several of these joined by +.
    """

    band: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_band("band")

    def on_query(
        self, ctx: HookContext, q: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Return the queries with the band's pairs set to zero."""
        return _scaled(q, ctx, self.band, 0.0)


def _scaled(q: Tensor, ctx: HookContext, band: str, factor: float) -> Tensor:
    """Return the queries with a band's pairs multiplied by `factor`."""
    assert ctx.qk is not None
    # Bands are defined on the frequencies of short prompts, also where RoPE follows the length.
    rotary = ctx.qk.require_rotary()
    gain = torch.ones(rotary.n_pairs, dtype=q.dtype, device=q.device)
    gain[band_mask(band, rotary.inv_freq).to(q.device)] = factor
    real, imag, rest = rotary.split(q)
    return rotary.join(real * gain, imag * gain, rest)
