"""Copying: how well the model predicts the second run through tokens that it has seen once.

Uniform random tokens repeat; only a model that finds the earlier copy can predict the second one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import PromptError
from ..prompts import repeated_random_tokens

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def copying_losses(
    model: TransformerBridge, n_prompts: int = 8, n_tokens: int = 100, seed: int = 0
) -> Float[Tensor, "prompt"]:
    """Mean next-token loss on the second copy of `n_tokens` random tokens, per prompt, in nats.

    The model as it is, patches included. Chance is the log of the vocabulary size. The first token
    of the second copy is left out: nothing announces it. *Ours*, after the usual induction test
    (Olsson et al., arXiv 2209.11895). Raises PromptError for fewer than 2 tokens, or more than the
    context holds twice.
    """
    if n_prompts < 1 or n_tokens < 2 or 2 * n_tokens >= model.cfg.n_ctx:
        raise PromptError(
            f"expected at least 1 prompt, and 2 to {(model.cfg.n_ctx - 1) // 2} tokens so that two "
            f"copies fit the context; got {n_prompts} prompts of {n_tokens} tokens"
        )
    tokens = repeated_random_tokens(model, n_prompts, n_tokens, seed).to(model.cfg.device)
    with torch.no_grad():
        losses = model(tokens, return_type="loss", loss_per_token=True)
    return losses[:, -(n_tokens - 1) :].float().mean(1).cpu()
