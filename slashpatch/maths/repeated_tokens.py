"""Prompts that hold the same tokens twice: how well the second copy is predicted and attended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import PromptError
from .slash_scores import slash_rows


def copy_length(tokens: Int[Tensor, "batch pos"]) -> int:
    """Return the length of one copy, in prompts that hold the same tokens twice.

    One further token, such as BOS, may come first. Raises PromptError for other prompts.
    """
    n = tokens.shape[1] // 2
    if n < 2 or not torch.equal(tokens[:, -n:], tokens[:, -2 * n : -n]):
        raise PromptError(
            "copying metrics need prompts that hold the same tokens twice over; leave the prompts "
            "out to get such ones, or choose another metric"
        )
    return n


def prefix_matching(
    pattern: Any, tokens: Int[Tensor, "batch pos"], lags: Sequence[int]
) -> Float[Tensor, "batch head lag"]:
    """Return the mean attention from the second copy to `lag` after each first occurrence.

    Raises PromptError for prompts without copies, and for lags outside a copy. Source: Olsson et
    al., arXiv 2209.11895.
    """
    n = copy_length(tokens)
    if not all(0 <= lag < n for lag in lags):
        raise PromptError(
            f"lags in copies of {n} tokens must be from 0 to {n - 1}; got {list(lags)}"
        )
    offsets = torch.tensor([n - lag for lag in lags], device=pattern.device)
    return slash_rows(pattern, offsets)[:, :, -n:].double().mean(2)


def copying_loss(
    logits: Float[Tensor, "batch kept d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch"]:
    """Return the mean loss on the second copy of repeated tokens, without its first, in nats.

    Chance is log d_vocab. *Ours*, after the usual induction test (Olsson et al., arXiv
    2209.11895). Raises PromptError.
    """
    n = copy_length(tokens)
    predicted, targets = logits[:, -n:-1].float(), tokens[:, -n + 1 :].long()
    losses = torch.nn.functional.cross_entropy(predicted.mT, targets, reduction="none")
    return losses.double().mean(1)
