"""How much is run for the claims: prompts, their lengths, draws of the controls."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from .rules import KAPPA

#: Fewest tokens of a prompt (*ours*).
TOKENS = 16


@dataclass(frozen=True)
class Settings:
    """Sizes of a run; all *ours*.

    Attributes:
        n_picking: Prompts of natural text on which heads, offsets and directions are picked.
        n_prompts: Other prompts, on which they are measured; as many of random tokens, of repeated
            tokens and of clean/corrupt pairs.
        n_tokens: Length of natural and random prompts, at most the model's context.
        n_effect_tokens: Length of the natural prompts whose predictions are compared.
        n_copied: Tokens of one copy in repeated random tokens; two copies must fit the context.
        n_draws: Draws of each control; 19 are the fewest that give a rank p-value of 0.05.
        n_heads: Most slash heads that are edited together, the strongest first.
        n_offsets: Offsets looked at, from 0; within half of the shortest prompt.
        n_profile: Offsets of a logit profile, from 0.
    """

    n_picking: int = 12
    n_prompts: int = 16
    n_tokens: int = 256
    n_effect_tokens: int = 128
    n_copied: int = 50
    n_draws: int = 19
    n_heads: int = 8
    n_offsets: int = 64
    n_profile: int = 64
    kappa: float = KAPPA

    def fitting(self, n_ctx: int) -> Settings:
        """Return the settings with lengths that fit a context of `n_ctx` tokens."""
        return Settings(
            **{
                **asdict(self),
                "n_tokens": min(self.n_tokens, n_ctx),
                "n_effect_tokens": min(self.n_effect_tokens, n_ctx),
                "n_copied": max(2, min(self.n_copied, (n_ctx - 1) // 2)),
                "n_offsets": min(self.n_offsets, max(2, n_ctx // 2)),
                "n_profile": min(self.n_profile, max(2, n_ctx // 2)),
            }
        )

    def within(self, shortest: int) -> Settings:
        """Return the settings with offsets within half of the shortest prompt.

        At larger offsets few rows are left, and attention to the first token is most of a score.
        """
        most = shortest // 2
        return replace(
            self,
            n_offsets=min(self.n_offsets, most),
            n_profile=min(self.n_profile, most),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return asdict(self)


FULL = Settings()
QUICK = Settings(n_picking=8, n_prompts=8, n_tokens=128, n_effect_tokens=64, n_copied=25, n_heads=8)
