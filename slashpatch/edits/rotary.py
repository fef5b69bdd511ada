"""Edits of rotary bands and frequencies, made before RoPE because rotations commute.

`ShiftSlash`, `DropBand` and `ScaleBand` need the query only. A changed frequency needs keys of the
head's own as well: x_l · e^{i(θ'_l − θ_l)p} before RoPE is x_l · e^{iθ'_l p} after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import bridge
from ..bridge import ModelInfo
from ..errors import BandError, EditError
from ..maths.bands import band_pairs, canonical_band
from .base import Edit

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def _finite(edit: str, field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e30:
        raise EditError(f"{edit}: {field} is a finite number; got {str(value)[:40]}")
    return float(value)


@dataclass(frozen=True, repr=False)
class _RotaryEdit(Edit):
    """Needs a layer with RoPE."""

    def prepare(self, model: TransformerBridge, info: ModelInfo) -> dict[int, Any]:
        """Nothing to keep; raises if a layer has no RoPE, or a band does not fit its pairs."""
        rotaries = {layer: bridge.read(model).qk[layer].require_rotary() for layer in self.layers}
        for layer, rotary in rotaries.items():
            for field in ("band", "a", "b"):
                if hasattr(self, field):
                    try:
                        band_pairs(getattr(self, field), rotary.inv_freq)
                    except BandError as error:
                        raise BandError(f"{self} at layer {layer}: {error}") from None
        return {}

    def _set_band(self, field: str) -> None:
        try:
            object.__setattr__(self, field, canonical_band(getattr(self, field)))
        except BandError as error:
            raise BandError(f"{type(self).__name__}: {error}") from None
