"""Make any head a slash head, out of one constant direction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import bridge
from ..errors import EditError, ModelError
from ..maths.offsets import as_offsets
from .base import HookContext
from .rotary import _finite, _RotaryEdit


@dataclass(frozen=True, repr=False)
class PlantSlash(_RotaryEdit):
    """Replace the head's queries and keys by one constant direction that peaks at an offset.

    Every pair of every key is the same number, and every query is that number turned back by
    `offset` tokens, so that logit(Δ) = strength · mean_l cos(θ_l (Δ − offset)): both conditions of
    arXiv 2601.08297, rank one and all frequencies, built by hand (*ours*). What the head reads no
    longer depends on any token; its values and output stay.

    Attributes:
        offset: Where the logit peaks, in tokens.
        strength: The logit there; offsets elsewhere lie below. A longer prompt has more keys to
            outweigh, so it needs more (10 is enough for hundreds of tokens).
    """

    offset: Any
    strength: float | int = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        offsets = as_offsets(self.offset)
        if len(offsets) != 1:
            raise EditError(f"PlantSlash: one offset, got {self.offset!r}")
        object.__setattr__(self, "offset", offsets[0])
        object.__setattr__(self, "strength", _finite("PlantSlash", "strength", self.strength))

    def validate(self, info: Any) -> None:
        """Raise if the model lacks a head, or its context cannot hold the offset."""
        super().validate(info)
        info.require_offsets(self.offset)

    def prepare(self, model: Any, info: Any) -> dict[int, Any]:
        """Nothing to keep; raises where logits depend on more than the offset."""
        found = super().prepare(model, info)
        for layer in self.layers:
            if not bridge.read(model).qk[layer].relative:
                raise ModelError(
                    f"{self}: layer {layer} norms queries and keys after RoPE with a weight for "
                    "each dimension, so no constant direction peaks at an offset wherever it stands"
                )
        return found

    def on_query(
        self, ctx: HookContext, q: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """The constant direction, turned back by the offset."""
        rotary = ctx.rotary
        ctx.set_theta("query", rotary.inv_freq.expand(len(ctx.heads), -1))
        amplitude = self.strength / (abs(rotary.scale) * rotary.n_pairs * rotary.gain**2)
        constant = amplitude * _ones(ctx, q)
        return rotary.rotate_by(constant, -self.offset * rotary.inv_freq.to(q.device))

    def on_key(
        self, ctx: HookContext, k: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """The constant direction."""
        # What is planted has the layer's own frequencies, whatever edits came before.
        ctx.set_theta("key", ctx.rotary.inv_freq.expand(len(ctx.heads), -1))
        return _ones(ctx, k)


def _ones(ctx: HookContext, x: Tensor) -> Tensor:
    """1 in the real part of every pair, 0 elsewhere."""
    real, imag, rest = ctx.rotary.split(x)
    return ctx.rotary.join(torch.ones_like(real), torch.zeros_like(imag), torch.zeros_like(rest))
