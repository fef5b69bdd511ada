"""Metrics of logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import MetricError, PromptError


def token_losses(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos-1"]:
    """Loss of each token given those before it, in nats."""
    from transformer_lens.utilities.lm_utils import lm_cross_entropy_loss

    return lm_cross_entropy_loss(logits.float(), tokens.long(), per_token=True)


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch"]:
    """Mean next-token loss, in nats."""
    return token_losses(logits, tokens).double().mean(1)


def loss_by_position(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos-1"]:
    """Next-token loss of the prediction made at each position, in nats. Prompts of one length."""
    return token_losses(logits, tokens).double()


def kl_divergence(
    true: Float[Tensor, "*of d_vocab"], other: Float[Tensor, "*of d_vocab"]
) -> Float[Tensor, "*of"]:
    """KL(true ‖ other) of the next-token distributions of two sets of logits, in nats, from 0."""
    p, q = true.float().log_softmax(-1), other.float().log_softmax(-1)
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).clamp(min=0)


def kl_to_clean(
    logits: Float[Tensor, "batch pos d_vocab"], clean_logits: Float[Tensor, "batch pos d_vocab"]
) -> Float[Tensor, "batch"]:
    """Mean over positions of KL(clean ‖ this) of the next-token distribution, in nats."""
    # One prompt at a time: the logarithms of a large vocabulary are what takes memory here.
    pairs = zip(clean_logits, logits, strict=True)
    return torch.stack([kl_divergence(true, other).double().mean() for true, other in pairs])


def top1_agreement(
    logits: Float[Tensor, "batch pos d_vocab"], clean_logits: Float[Tensor, "batch pos d_vocab"]
) -> Float[Tensor, "batch"]:
    """How often the likeliest next token is the clean run's, from 0 to 1."""
    return (logits.argmax(-1) == clean_logits.argmax(-1)).double().mean(1)


def copy_length(tokens: Int[Tensor, "batch pos"]) -> int:
    """Length of one copy in prompts that are tokens twice over, after a first token or none.

    Raises PromptError for other prompts.
    """
    n = tokens.shape[1] // 2
    if n < 2 or not torch.equal(tokens[:, -n:], tokens[:, -2 * n : -n]):
        raise PromptError(
            "this metric is of copying: it needs prompts that are the same tokens twice over, such "
            "as slashpatch.prompts.repeated_random_tokens makes"
        )
    return n


def copying_loss(
    logits: Float[Tensor, "batch kept d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch"]:
    """Mean loss on the second copy of repeated tokens but its first, in nats.

    Chance is the log of d_vocab. *Ours*, after the usual induction test (Olsson et al., arXiv
    2209.11895). Raises PromptError.
    """
    n = copy_length(tokens)
    return token_losses(logits[:, -n:], tokens[:, -n:]).double().mean(1)


def copying_top1(
    logits: Float[Tensor, "batch kept d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch"]:
    """How often the likeliest token is the next one of the second copy. Raises PromptError."""
    from transformer_lens.utilities.lm_utils import lm_accuracy

    n = copy_length(tokens)
    return lm_accuracy(logits[:, -n:], tokens[:, -n:], per_token=True).double().mean(1)


@dataclass(frozen=True)
class LogitDifference:
    """Logit of one answer minus that of another, at one position.

    Attributes:
        right: Token id of the answer, or one for each prompt.
        wrong: Token id of the other answer, or one for each prompt.
        position: Where the prediction is read; −1 is the last token.
    """

    right: int | tuple[int, ...]
    wrong: int | tuple[int, ...]
    position: int = -1

    def __post_init__(self) -> None:
        for name in ("right", "wrong"):
            given = getattr(self, name)
            given = given.tolist() if hasattr(given, "tolist") else given
            ids = tuple(given) if isinstance(given, (list, tuple)) else given
            if not all(_is_integer(one) for one in (ids if isinstance(ids, tuple) else (ids,))):
                raise MetricError(
                    f"LogitDifference: {name} is a token id, or one for each prompt; got {given!r}"
                )
            object.__setattr__(self, name, ids)
        if not _is_integer(self.position):
            raise MetricError(f"LogitDifference: position is an integer; got {self.position!r}")

    def __call__(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        index: Int[Tensor, "batch"],
        n_prompts: int,
    ) -> Float[Tensor, "batch"]:
        """The difference, per prompt. Raises MetricError for answers that do not fit."""
        if not -logits.shape[1] <= self.position < logits.shape[1]:
            raise MetricError(
                f"position {self.position} is outside a prompt of {logits.shape[1]} tokens"
            )
        here = logits[:, self.position].double()
        right, wrong = (self._ids(ids, index, n_prompts, here) for ids in (self.right, self.wrong))
        rows = torch.arange(len(here), device=here.device)
        return here[rows, right] - here[rows, wrong]

    def _ids(
        self, ids: int | tuple[int, ...], index: Tensor, n_prompts: int, here: Tensor
    ) -> Tensor:
        each = torch.tensor(ids, device=here.device)
        if each.ndim:
            if len(each) != n_prompts:
                raise MetricError(
                    f"expected an answer for each of {n_prompts} prompts, or one for all; got "
                    f"{len(each)}"
                )
            each = each[index.to(each.device)]
        if int(each.min()) < 0 or int(each.max()) >= here.shape[1]:
            raise MetricError(f"answers are token ids from 0 to {here.shape[1] - 1}; got {ids}")
        return each.expand(len(here))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
