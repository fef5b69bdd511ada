"""Measure how much rounding changes a model's logits."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..edits import Edit
from ..maths.precision import MASKED, rounding
from ..patching.patch import patch

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Hook points of each layer whose values are multiplied by random factors 1 ± eps.
_ROUNDED = ("hook_resid_pre", "attn.hook_q", "attn.hook_k", "attn.hook_v",
            "attn.hook_attn_scores", "attn.hook_z")  # fmt: skip
#: Random draws of all factors.
N_DRAWS = 4
#: How many times the largest change of the random draws is allowed. *Ours*.
_ALLOWED = 4


def patched(
    model: TransformerBridge, edit: Edit | None
) -> contextlib.AbstractContextManager[object]:
    """Return a context in which the edit acts, if there is one."""
    return contextlib.nullcontext() if edit is None else patch(model, edit)


def rounding_limit(
    model: TransformerBridge,
    tokens: Int[Tensor, "batch pos"],
    logits: Float[Tensor, "batch pos d_vocab"],
    edit: Edit | None,
    generator: torch.Generator,
    n_draws: int = N_DRAWS,
) -> float:
    """Return how much rounding may change a logit of `tokens`, whose logits are `logits`.

    The largest change over `n_draws` passes with random rounding errors, plus eps of the largest
    logit, times four (*ours*). In mixtures of experts, rounding may change a token's choice of
    experts in some of the draws only.
    """
    eps = rounding(next(model.original_model.parameters()).dtype)

    def jitter(x: Tensor, hook: Any) -> Tensor:
        noise = torch.rand(x.shape, generator=generator) * 2 - 1
        rounded = x * (1 + eps * noise.to(x.device)).to(x.dtype)
        return torch.where(x <= MASKED, x, rounded)

    names = [f"blocks.{layer}.{name}" for layer in range(model.cfg.n_layers) for name in _ROUNDED]
    available = model.hook_dict
    hooks = [(name, jitter) for name in names if name in available]
    largest = 0.0
    for _ in range(n_draws):
        with torch.no_grad(), patched(model, edit):
            changed = model.run_with_hooks(tokens, fwd_hooks=hooks)
        largest = max(largest, float((changed.double() - logits.double()).abs().max()))
    return _ALLOWED * (largest + eps * float(logits.abs().max()))
