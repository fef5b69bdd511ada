"""Copying: how well the model predicts the second run through tokens that it has seen once.

Uniform random tokens repeat; only a model that finds the earlier copy can predict the second one.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    tokens = _repeated(model, n_prompts, n_tokens, seed)
    with torch.no_grad():
        losses = model(tokens, return_type="loss", loss_per_token=True)
    return losses[:, -(n_tokens - 1) :].float().mean(1).cpu()


def copied_lags(
    model: TransformerBridge,
    lags: Sequence[int] = (1, 2, 3),
    n_prompts: int = 8,
    n_tokens: int = 100,
    seed: int = 0,
) -> Float[Tensor, "prompt lag"]:
    """How often the likeliest token is the one `lag` places on in the first copy, per prompt.

    Over positions of the second copy whose continuation lies in it. A model that copies says the
    next token: lag 1. Chance is one over the vocabulary. Raises PromptError as `copying_losses`
    does, or for a lag that is not from 1 to n_tokens − 1. *Ours*.
    """
    if not lags or not all(1 <= lag < n_tokens for lag in lags):
        raise PromptError(f"lags are integers from 1 to {n_tokens - 1}; got {list(lags)}")
    tokens = _repeated(model, n_prompts, n_tokens, seed)
    with torch.no_grad():
        guesses = model(tokens)[:, -n_tokens:].argmax(-1)
    second = tokens[:, -n_tokens:]
    rates = [
        (guesses[:, :-lag] == second[:, lag:]).double().mean(1)  # the copies are the same
        for lag in lags
    ]
    return torch.stack(rates, dim=1).cpu()


def _repeated(model: TransformerBridge, n_prompts: int, n_tokens: int, seed: int) -> Tensor:
    if n_prompts < 1 or n_tokens < 2 or 2 * n_tokens >= model.cfg.n_ctx:
        raise PromptError(
            f"expected at least 1 prompt, and 2 to {(model.cfg.n_ctx - 1) // 2} tokens so that two "
            f"copies fit the context; got {n_prompts} prompts of {n_tokens} tokens"
        )
    return repeated_random_tokens(model, n_prompts, n_tokens, seed).to(model.cfg.device)
