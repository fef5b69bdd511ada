"""Turn any head into a slash head, with constant queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..bridge import ModelInfo
from ..errors import EditError, ModelError
from ..maths.offsets import as_offsets
from .base import HookContext, finite_number
from .rotary import _RotaryEdit

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, repr=False)
class PlantSlash(_RotaryEdit):
    """Replace the heads' queries and keys by a constant direction that peaks at an offset.

    Before RoPE every key has the same direction, with 1 in every rotary pair; every query has that
    direction rotated by −`offset` tokens. RoPE then gives the logit strength · mean_l cos(θ_l (Δ −
    offset)) at every offset Δ. This builds both conditions of arXiv 2601.08297 by hand: rank-one
    queries and keys, and all frequencies (*ours*). The head's attention no longer depends on the
    tokens; its values and output projection stay.

    Attributes:
        offset: The offset at which the logit peaks, in tokens.
        strength: The logit at the peak. A longer prompt has more keys to outweigh and needs a
            larger value; 10 is enough for hundreds of tokens.
    """

    offset: Any
    strength: float | int = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        offsets = as_offsets(self.offset)
        if len(offsets) != 1:
            raise EditError(f"PlantSlash: expected one offset; got {self.offset!r}")
        object.__setattr__(self, "offset", offsets[0])
        object.__setattr__(self, "strength", finite_number("PlantSlash", "strength", self.strength))

    def validate(self, info: ModelInfo) -> None:
        """Raise if the model lacks one of the heads, or the offset exceeds its context."""
        super().validate(info)
        info.require_offsets(self.offset)

    def prepare(self, model: TransformerBridge, info: ModelInfo) -> dict[int, Any]:
        """Check that each layer's logits depend on the offset alone; return no state."""
        super().prepare(model, info)
        for layer in self.layers:
            if not info.qk[layer].relative:
                raise ModelError(
                    f"{self}: layer {layer} norms queries and keys after RoPE with a weight for "
                    "each dimension, so the logits of constant queries and keys depend on the "
                    "positions and not on the offset alone"
                )
        return {}

    def on_query(
        self, ctx: HookContext, q: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Return the constant direction, rotated by −`offset` tokens."""
        rotary = ctx.rotary
        ctx.set_theta("query", rotary.inv_freq.expand(len(ctx.heads), -1))
        amplitude = self.strength / (abs(rotary.scale) * rotary.n_pairs * rotary.gain**2)
        constant = amplitude * _ones(ctx, q)
        return rotary.rotate_by(constant, -self.offset * rotary.inv_freq.to(q.device))

    def on_key(
        self, ctx: HookContext, k: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Return the constant direction."""
        # The planted slash uses the layer's own frequencies, whatever earlier edits set.
        ctx.set_theta("key", ctx.rotary.inv_freq.expand(len(ctx.heads), -1))
        return _ones(ctx, k)


def _ones(ctx: HookContext, x: Tensor) -> Tensor:
    """Return a tensor like `x` with 1 in the real part of every rotary pair, 0 elsewhere."""
    real, imag, rest = ctx.rotary.split(x)
    return ctx.rotary.join(torch.ones_like(real), torch.zeros_like(imag), torch.zeros_like(rest))
