"""Shift a head's attention to other offsets."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from .base import HookContext, finite_number
from .rotary import _RotaryEdit


@dataclass(frozen=True, repr=False)
class ShiftSlash(_RotaryEdit):
    """Move every logit of a head from offset Δ to Δ + `by`: the slash moves and keeps its shape.

    Rotates the queries alone, q_l · e^{−iθ_l·by}. Offsets below a positive `by` get the logits that
    negative offsets would have had. Dimensions that RoPE does not rotate keep their contribution.

    Attributes:
        by: Shift in tokens; may be negative or fractional.
    """

    by: float | int

    def __post_init__(self) -> None:
        super().__post_init__()
        by = finite_number("ShiftSlash", "by", self.by)
        object.__setattr__(self, "by", int(by) if by.is_integer() else by)

    def on_query(
        self, ctx: HookContext, q: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Return the queries rotated by −`by` tokens."""
        return ctx.rotary.rotate_by(q, -self.by * ctx.theta("query").to(q.device))
