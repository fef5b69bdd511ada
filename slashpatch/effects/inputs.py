"""Prompts of a measurement, and the batches that they are run in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from ..data.prompts import PromptSet, as_path, prompt_set, repeated_random_tokens
from ..errors import PromptError
from .metrics import Metric, needs_copies

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


#: Bytes of logits that one pass may make, and that the clean run's may take while they wait.
_LOGIT_BYTES = 256 * 2**20


def prompts_for(
    model: TransformerBridge,
    metrics: Sequence[Metric],
    prompts: Any,
    *,
    max_tokens: int | None,
    **options: Any,
) -> PromptSet:
    """The prompts given; else repeated random tokens where a metric needs them, or natural text.

    `max_tokens`, at most the model's context, is the length of prompts that are made here or of
    pieces of a file; texts and tokens of the user's are taken whole. `options` are those of
    `prompt_set`. Raises PromptError; a prompt of one token has no next one.
    """
    if prompts is not None and as_path(prompts) is None:
        max_tokens = None
    elif max_tokens is not None:
        max_tokens = min(max_tokens, model.cfg.n_ctx)
    if prompts is None and any(map(needs_copies, metrics)) and not options.get("random_tokens"):
        n_tokens = ((max_tokens or model.cfg.n_ctx) - 1) // 2
        found = repeated(model, options["n_prompts"], n_tokens, options["seed"])
    else:
        found = prompt_set(model, prompts, max_tokens=max_tokens, **options)
    if min(len(tokens) for tokens in found.tokens) < 2:
        raise PromptError("a prompt has one token only; nothing is predicted there")
    return found


def repeated(model: TransformerBridge, n_prompts: int, n_tokens: int, seed: int) -> PromptSet:
    """`n_tokens` random tokens twice over. Raises PromptError where two copies do not fit."""
    if n_prompts < 1 or n_tokens < 2 or 2 * n_tokens >= model.cfg.n_ctx:
        raise PromptError(
            f"expected at least 1 prompt, and 2 to {(model.cfg.n_ctx - 1) // 2} tokens so that two "
            f"copies fit the context; got {n_prompts} prompts of {n_tokens} tokens"
        )
    rows = repeated_random_tokens(model, n_prompts, n_tokens, seed)
    return PromptSet(tuple(rows), f"random tokens twice over, seed {seed}")


@dataclass(frozen=True)
class Batch:
    """Prompts of one length that go through the model together."""

    index: Int[Tensor, "batch"]
    tokens: Int[Tensor, "batch pos"]
    n_prompts: int

    def repeated(self, n: int) -> Batch:
        """The same prompts n times over."""
        return replace(self, index=self.index.repeat(n), tokens=self.tokens.repeat(n, 1))


def batches(prompts: PromptSet, d_vocab: int, batch_size: int | None, device: Any) -> list[Batch]:
    """Prompts by length, as many together as memory for their logits allows. Nothing is padded."""
    lengths: dict[int, list[int]] = {}
    for index, tokens in enumerate(prompts.tokens):
        lengths.setdefault(len(tokens), []).append(index)
    found = []
    for length, indices in sorted(lengths.items()):
        most = batch_size or max(1, _LOGIT_BYTES // (4 * d_vocab * length))
        for chunk in torch.tensor(indices).split(most):
            rows = torch.stack([prompts.tokens[index] for index in chunk.tolist()])
            found.append(Batch(chunk, rows.to(device), len(prompts.tokens)))
    return found
