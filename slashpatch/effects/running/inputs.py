"""The prompts of a measurement, and their batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from ...data.prompts import PromptSet, as_path, prompt_set, repeated_random_tokens
from ...errors import PromptError
from ..metrics.by_name import Metric, needs_copies

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


#: Bytes that the logits of one forward pass may take; bounds the batch size.
_LOGIT_BYTES = 256 * 2**20


def prompts_for(
    model: TransformerBridge,
    metrics: Sequence[Metric],
    prompts: Any,
    *,
    max_tokens: int | None,
    default: int = 128,
    **options: Any,
) -> PromptSet:
    """Return the prompts of a measurement.

    Without `prompts`, they are repeated random tokens if a metric needs copies, and natural text
    otherwise. `max_tokens` is the length of generated prompts and of the pieces of a file; None:
    `default`, or the context if that is shorter. The user's texts and token ids are never cut.
    `options` are passed on to `prompt_set`. Raises PromptError, also for prompts of a single token
    and for a length beyond the context.
    """
    n_ctx = model.cfg.n_ctx
    if max_tokens is not None and max_tokens > n_ctx:
        raise PromptError(f"max_tokens is at most the model's context of {n_ctx}; got {max_tokens}")
    length = min(default, n_ctx) if max_tokens is None else max_tokens
    if prompts is None and any(map(needs_copies, metrics)) and not options.get("random_tokens"):
        n_tokens = (length - 1) // 2
        chosen = repeated(model, options["n_prompts"], n_tokens, options["seed"])
    else:
        cut = length if prompts is None or as_path(prompts) is not None else None
        chosen = prompt_set(model, prompts, max_tokens=cut, **options)
    if min(len(tokens) for tokens in chosen.tokens) < 2:
        raise PromptError("a prompt has one token only, so there is no next token to predict")
    return chosen


def repeated(model: TransformerBridge, n_prompts: int, n_tokens: int, seed: int) -> PromptSet:
    """Return prompts of `n_tokens` random tokens, twice over.

    Raises PromptError if two copies exceed the context, or for fewer than 2 tokens or 1 prompt.
    """
    if n_prompts < 1 or n_tokens < 2 or 2 * n_tokens >= model.cfg.n_ctx:
        raise PromptError(
            f"expected at least 1 prompt, and 2 to {(model.cfg.n_ctx - 1) // 2} tokens so that two "
            f"copies fit the context; got {n_prompts} prompts of {n_tokens} tokens"
        )
    rows = repeated_random_tokens(model, n_prompts, n_tokens, seed)
    return PromptSet(tuple(rows), f"random tokens twice over, seed {seed}")


@dataclass(frozen=True)
class Batch:
    """Prompts of equal length that are run in one forward pass.

    Attributes:
        index: Indices of the prompts in the measurement.
        tokens: Their token ids.
        n_prompts: Number of prompts in the whole measurement.
    """

    index: Int[Tensor, "batch"]
    tokens: Int[Tensor, "batch pos"]
    n_prompts: int

    def repeated(self, n: int) -> Batch:
        """Return a batch with the same prompts n times over."""
        return replace(self, index=self.index.repeat(n), tokens=self.tokens.repeat(n, 1))


def batches(
    prompts: PromptSet,
    d_vocab: int,
    batch_size: int | None,
    device: Any,
    chosen: Sequence[int] | None = None,
) -> list[Batch]:
    """Return batches of prompts of equal length, so that nothing is padded.

    Without `batch_size`, a batch is as large as memory for its logits allows. `chosen` are indices
    of the prompts to use; None: all.
    """
    lengths: dict[int, list[int]] = {}
    for index in range(len(prompts.tokens)) if chosen is None else sorted(chosen):
        lengths.setdefault(len(prompts.tokens[index]), []).append(index)
    made = []
    for length, indices in sorted(lengths.items()):
        size = batch_size or max(1, _LOGIT_BYTES // (4 * d_vocab * length))
        for chunk in torch.tensor(indices).split(size):
            tokens = torch.stack([prompts.tokens[index] for index in chunk.tolist()])
            made.append(Batch(chunk, tokens.to(device), len(prompts.tokens)))
    return made
