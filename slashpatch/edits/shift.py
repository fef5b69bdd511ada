"""Move a slash to another offset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from .base import HookContext
from .rotary import _finite, _RotaryEdit

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, repr=False)
class ShiftSlash(_RotaryEdit):
    """Move every logit of the head from offset Δ to Δ + `by`: the slash moves, its shape does not.

    q_l · e^{−iθ_l·by}. What an offset beyond the prompt would have had comes into view at small
    offsets; a part of the head that is not rotated stays where it is. Needs the query only.

    Attributes:
        by: Tokens; may be negative or fractional.
    """

    by: float | int

    def __post_init__(self) -> None:
        super().__post_init__()
        by = _finite("ShiftSlash", "by", self.by)
        object.__setattr__(self, "by", int(by) if by.is_integer() else by)

    def on_query(
        self, ctx: HookContext, q: Float[Tensor, "batch pos head d_head"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Queries turned back by `by` tokens."""
        return ctx.rotary.rotate_by(q, -self.by * ctx.theta("query").to(q.device))
