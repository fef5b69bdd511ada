"""Metrics that read logits: losses, divergences, agreement, copying, logit differences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import MetricError
from ...maths.repeated_tokens import copy_length


def token_losses(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos-1"]:
    """Return the loss of each token given the tokens before it, in nats."""
    from transformer_lens.utilities.lm_utils import lm_cross_entropy_loss

    return lm_cross_entropy_loss(logits.float(), tokens.long(), per_token=True)


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch"]:
    """Return the mean next-token loss of each prompt, in nats."""
    return token_losses(logits, tokens).double().mean(1)


def loss_by_position(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos-1"]:
    """Return the next-token loss at each position, in nats. All prompts need the same length."""
    return token_losses(logits, tokens).double()


def kl_divergence(
    true: Float[Tensor, "*batch d_vocab"], other: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """Return KL(true ‖ other) of the next-token distributions of two sets of logits, in nats."""
    p, q = true.float().log_softmax(-1), other.float().log_softmax(-1)
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).clamp(min=0)


def kl_to_clean(
    logits: Float[Tensor, "batch pos d_vocab"], clean_logits: Float[Tensor, "batch pos d_vocab"]
) -> Float[Tensor, "batch"]:
    """Return KL(clean ‖ edited) of next-token distributions, mean over positions, in nats."""
    # One prompt at a time, because the log-probabilities of a large vocabulary need much memory.
    pairs = zip(clean_logits, logits, strict=True)
    return torch.stack([kl_divergence(true, other).double().mean() for true, other in pairs])


def top1_agreement(
    logits: Float[Tensor, "batch pos d_vocab"], clean_logits: Float[Tensor, "batch pos d_vocab"]
) -> Float[Tensor, "batch"]:
    """Return how often the likeliest next token equals the clean run's, from 0 to 1."""
    return (logits.argmax(-1) == clean_logits.argmax(-1)).double().mean(1)


def copying_top1(
    logits: Float[Tensor, "batch kept d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch"]:
    """Return how often the likeliest token is the second copy's next token, from 0 to 1.

    Raises PromptError unless the prompts hold the same tokens twice.
    """
    from transformer_lens.utilities.lm_utils import lm_accuracy

    n = copy_length(tokens)
    return lm_accuracy(logits[:, -n:], tokens[:, -n:], per_token=True).double().mean(1)


@dataclass(frozen=True)
class LogitDifference:
    """Logit of the right answer minus the logit of a wrong answer, at one position.

    Attributes:
        right: Token id of the right answer, or one token id per prompt.
        wrong: Token id of the wrong answer, or one token id per prompt.
        position: Position at which the prediction is read; −1 is the last token.
    """

    right: int | tuple[int, ...]
    wrong: int | tuple[int, ...]
    position: int = -1

    def __post_init__(self) -> None:
        for name in ("right", "wrong"):
            given = getattr(self, name)
            given = given.tolist() if hasattr(given, "tolist") else given
            ids = tuple(given) if isinstance(given, (list, tuple)) else given
            if not all(map(_is_integer, ids if isinstance(ids, tuple) else (ids,))):
                raise MetricError(
                    f"LogitDifference: {name} must be a token id, or one per prompt; got {given!r}"
                )
            object.__setattr__(self, name, ids)
        if not _is_integer(self.position):
            raise MetricError(
                f"LogitDifference: position must be an integer; got {self.position!r}"
            )

    def keeps(self, tokens: Int[Tensor, "batch pos"]) -> int:
        """Return the number of last positions whose logits are read."""
        n_pos = tokens.shape[1]
        return n_pos if self.position >= 0 else min(-self.position, n_pos)

    def __call__(
        self,
        logits: Float[Tensor, "batch kept d_vocab"],
        index: Int[Tensor, "batch"],
        n_prompts: int,
    ) -> Float[Tensor, "batch"]:
        """Return the difference, per prompt. Raises MetricError for answers that do not fit."""
        if not -logits.shape[1] <= self.position < logits.shape[1]:
            raise MetricError(
                f"position {self.position} is outside a prompt of {logits.shape[1]} tokens"
            )
        at = logits[:, self.position].double()
        right, wrong = (self._ids(ids, index, n_prompts, at) for ids in (self.right, self.wrong))
        rows = torch.arange(len(at), device=at.device)
        return at[rows, right] - at[rows, wrong]

    def _ids(
        self, ids: int | tuple[int, ...], index: Tensor, n_prompts: int, logits: Tensor
    ) -> Tensor:
        """Return one token id per prompt of the batch, for logits [batch, d_vocab]."""
        each = torch.tensor(ids, device=logits.device)
        if each.ndim:
            if len(each) != n_prompts:
                raise MetricError(
                    f"expected one answer for each of {n_prompts} prompts, or one for all; got "
                    f"{len(each)} answers"
                )
            each = each[index.to(each.device)]
        if int(each.min()) < 0 or int(each.max()) >= logits.shape[1]:
            raise MetricError(
                f"answers must be token ids from 0 to {logits.shape[1] - 1}; got {ids}"
            )
        return each.expand(len(logits))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
