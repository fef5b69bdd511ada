"""Metrics that read attention patterns: slash scores and prefix matching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...data.heads import HeadsLike, heads
from ...errors import MetricError, PromptError
from ...maths.repeated_tokens import prefix_matching
from ...maths.slash_scores import slash_rows
from .logits import _is_integer


@dataclass(frozen=True)
class SlashScores:
    """Slash scores of heads at one offset, per prompt (arXiv 2601.08297).

    Attributes:
        heads: Heads to score; None for all. Heads in later layers than an edit show what it does
            to them.
        offset: Δ ≥ 0, in tokens.
    """

    heads: HeadsLike | None = None
    offset: int = 1

    def __post_init__(self) -> None:
        _fix_heads(self)
        if not _is_integer(self.offset) or self.offset < 0:
            raise MetricError(
                f"SlashScores: offset must be an integer of at least 0; got {self.offset!r}"
            )

    def read(self, pattern: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch head"]:
        """Return the mean attention from token i to token i−Δ, for each head of a layer."""
        if self.offset >= tokens.shape[1]:
            raise PromptError(
                f"offset {self.offset} needs prompts of at least {self.offset + 1} tokens; "
                f"got a prompt of {tokens.shape[1]}"
            )
        offsets = torch.tensor([self.offset], device=pattern.device)
        return slash_rows(pattern, offsets)[:, :, self.offset :, 0].double().mean(-1)


@dataclass(frozen=True)
class PrefixMatching:
    """Prefix-matching (induction) scores of heads, per prompt (Olsson et al., arXiv 2209.11895).

    On repeated tokens: the mean attention from each token of the second copy to the token `lag`
    positions after its first occurrence.

    Attributes:
        heads: Heads to score; None for all.
        lag: 1 for induction heads, which attend to the next token of the first copy; 0 for heads
            that attend to the first occurrence itself.
    """

    heads: HeadsLike | None = None
    lag: int = 1
    repeated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _fix_heads(self)
        if not _is_integer(self.lag) or self.lag < 0:
            raise MetricError(
                f"PrefixMatching: lag must be an integer of at least 0; got {self.lag!r}"
            )

    def read(self, pattern: Any, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch head"]:
        """Return each head's score in a layer. Raises PromptError for prompts without copies."""
        return prefix_matching(pattern, tokens, (self.lag,))[..., 0]


def _fix_heads(metric: Any) -> None:
    """Store a metric's heads as a tuple, so that metrics of the same heads are equal."""
    if metric.heads is not None:
        chosen = heads(metric.heads)
        if not chosen:
            raise MetricError(f"{type(metric).__name__} needs at least one head, or None for all")
        object.__setattr__(metric, "heads", chosen)
