"""Metrics of attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import MetricError, PromptError
from ..heads import HeadsLike, heads
from ..maths.slash_scores import slash_rows
from .logit_metrics import _is_integer, copy_length


@dataclass(frozen=True)
class SlashScores:
    """Slash score of heads at one offset (arXiv 2601.08297, definition), per prompt.

    Attributes:
        heads: Whose scores; None for all. Heads downstream of an edit show what it does to them.
        offset: Δ.
    """

    heads: HeadsLike | None = None
    offset: int = 1

    def __post_init__(self) -> None:
        _fix_heads(self)
        if not _is_integer(self.offset) or self.offset < 0:
            raise MetricError(f"SlashScores: offset is an integer from 0; got {self.offset!r}")

    def read(self, pattern: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch head"]:
        """Mean attention i → i−Δ of each head of a layer."""
        if self.offset >= tokens.shape[1]:
            raise PromptError(
                f"offset {self.offset} needs prompts of at least {self.offset + 1} tokens; "
                f"got one of {tokens.shape[1]}"
            )
        offsets = torch.tensor([self.offset], device=tokens.device)
        return slash_rows(pattern, offsets)[:, :, self.offset :, 0].double().mean(-1)


@dataclass(frozen=True)
class PrefixMatching:
    """Induction score of heads, per prompt (Olsson et al., arXiv 2209.11895).

    On repeated tokens: the mean attention from a token of the second copy to the one `lag` places
    after its first occurrence.

    Attributes:
        heads: Whose scores; None for all.
        lag: 1 is what an induction head matches; 0 the token itself.
    """

    heads: HeadsLike | None = None
    lag: int = 1
    repeated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _fix_heads(self)
        if not _is_integer(self.lag) or self.lag < 0:
            raise MetricError(f"PrefixMatching: lag is an integer from 0; got {self.lag!r}")

    def read(self, pattern: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch head"]:
        """Mean attention of each head of a layer. Raises PromptError for prompts without copies."""
        return matched(pattern, tokens, (self.lag,))[..., 0]


def _fix_heads(metric: Any) -> None:
    """Heads as a tuple, so that equal metrics are equal."""
    if metric.heads is not None:
        found = heads(metric.heads)
        if not found:
            raise MetricError(f"{type(metric).__name__} needs at least one head, or None for all")
        object.__setattr__(metric, "heads", found)


def matched(
    pattern: Any, tokens: Int[Tensor, "batch pos"], lags: Sequence[int]
) -> Float[Tensor, "batch head lag"]:
    """Mean attention from the second copy to `lag` places after each token's first occurrence."""
    n = copy_length(tokens)
    if not all(0 <= lag < n for lag in lags):
        raise PromptError(f"lags of copies of {n} tokens are 0 to {n - 1}; got {list(lags)}")
    offsets = torch.tensor([n - lag for lag in lags], device=tokens.device)
    return slash_rows(pattern, offsets)[:, :, -n:].double().mean(2)
