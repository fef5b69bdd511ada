"""The final norm of a model as a formula, verified, so that its scale can be held.

y = gain ⊙ C x / s(x) + bias, with s(x) = √(mean((C x)²) + ε). C subtracts the mean over the
dimensions in LayerNorm, and nothing in RMSNorm. With s held at its value for x, the change of y by
a change of x is gain ⊙ C change / s(x), as in direct logit attribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...bridge.offloaded import loaded
from ...errors import ModelError
from ...maths.precision import rounding

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Hook points at the input and the output of the final norm.
FINAL_INPUT, FINAL_OUTPUT = "ln_final.hook_in", "ln_final.hook_out"
#: Names by which norms call their ε.
_EPSILONS = ("variance_epsilon", "eps", "epsilon")


@dataclass(frozen=True, eq=False)
class FinalNorm:
    """The final norm of one model, in float64.

    Attributes:
        gain: What each dimension is multiplied by.
        bias: What is added.
        eps: Added to the variance.
        centred: Whether the mean is subtracted.
    """

    gain: Float[Tensor, "d_model"]
    bias: Float[Tensor, "d_model"]
    eps: float
    centred: bool

    def __call__(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """Return the norm of x."""
        return self.change(x, x) + self.bias

    def change(
        self, x: Float[Tensor, "batch pos d_model"], change: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Return how the norm of x changes by a change of x, with its scale held."""
        scale = (self._centre(x).square().mean(-1, keepdim=True) + self.eps).sqrt()
        return self.gain * self._centre(change) / scale

    def _centre(self, x: Tensor) -> Tensor:
        x = x.to(self.gain)
        return x - x.mean(-1, keepdim=True) if self.centred else x


def read_final_norm(
    model: TransformerBridge,
    x: Float[Tensor, "batch pos d_model"],
    y: Float[Tensor, "batch pos d_model"],
) -> FinalNorm:
    """Return the final norm, of which x and y are the input and the output in one forward pass.

    Raises ModelError unless it is a LayerNorm or an RMSNorm, with gain w or 1 + w, that makes y of
    x within rounding.
    """
    component: Any = model.ln_final.original_component
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    with loaded(component):
        given = [getattr(component, name, None) for name in ("weight", "bias")]
        weight, bias = (
            torch.full_like(y[0, 0], empty, dtype=wide)
            if part is None
            else part.detach().to(y.device, wide).clone()
            for part, empty in zip(given, (1.0, 0.0), strict=True)
        )
    eps = next(
        (float(getattr(component, name)) for name in _EPSILONS if hasattr(component, name)), 0.0
    )
    norms = [
        FinalNorm(gain, bias, eps, centred)
        for gain in (weight, 1 + weight)
        for centred in (False, True)
    ]
    differences = [float((norm(x) - y.to(wide)).abs().max()) for norm in norms]
    best = min(range(len(norms)), key=differences.__getitem__)
    allowed = 16 * rounding(y.dtype) * float(y.abs().max())
    if not differences[best] <= allowed:
        raise ModelError(
            f"the final norm of {model.cfg.architecture} ({type(component).__name__}) is neither a "
            f"LayerNorm nor an RMSNorm: its output differs by {differences[best]:.2g} from the "
            f"nearest of both (allowed {allowed:.2g}), so its scale cannot be held"
        )
    return norms[best]
