"""Base class of the edits of rotary bands and frequencies.

They act before RoPE, because rotations commute. `ShiftSlash`, `DropBand` and `ScaleBand` change the
queries alone. Other frequencies θ' need changed keys as well (per-head keys):
x_l · e^{i(θ'_l − θ_l)p} before RoPE is x_l · e^{iθ'_l p} after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..bridge import ModelInfo
from ..errors import BandError
from ..maths.bands import band_pairs, canonical_band
from .base import Edit

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, repr=False)
class _RotaryEdit(Edit):
    """Base of the edits that need layers with RoPE."""

    def prepare(self, model: TransformerBridge, info: ModelInfo) -> dict[int, Any]:
        """Check that the layers have RoPE and that the bands fit their pairs; return no state."""
        rotaries = {layer: info.qk[layer].require_rotary() for layer in self.layers}
        for layer, rotary in rotaries.items():
            for field in ("band", "a", "b"):
                if hasattr(self, field):
                    try:
                        band_pairs(getattr(self, field), rotary.inv_freq)
                    except BandError as error:
                        raise BandError(f"{self} at layer {layer}: {error}") from None
        return {}

    def _set_band(self, field: str) -> None:
        """Replace a band given by the user by its canonical text. Raises BandError."""
        try:
            object.__setattr__(self, field, canonical_band(getattr(self, field)))
        except BandError as error:
            raise BandError(f"{type(self).__name__}: {error}") from None
