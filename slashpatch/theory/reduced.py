"""The expected loss if every token had the mean query and the mean key (copying; *ours*).

Then layer 1 attends by offset alone, layer 2's matching matrix is a multiple of the identity, and
the loss depends on the logit at each offset and on that multiple. docs/theory-prediction.md derives
each step.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .data import starts
from .settings import Settings

#: Pairs of start positions over which the loss is averaged.
_N_STARTS = 64
_GOLDEN = (math.sqrt(5) - 1) / 2


def pattern(profile: Float[Tensor, "offset"]) -> Float[Tensor, "query key"]:
    """Return the causal attention pattern with logit profile(Δ) at offset Δ."""
    n = len(profile)
    offsets = torch.arange(n)[:, None] - torch.arange(n)
    logits = profile[offsets.clamp(min=0)]
    return logits.masked_fill(offsets < 0, -torch.inf).softmax(-1)


class ReducedLoss:
    """The expected loss as a function of layer 1's profile and layer 2's matching strength.

    The average over the start positions of a segment's two copies is over 64 pairs, spread evenly
    by the golden ratio over their distribution. The average over all other tokens is taken inside
    the logarithm of the softmax's denominator.

    Args:
        settings: The settings of a training run on the copying task.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        counted = torch.arange(_N_STARTS, dtype=torch.float64)
        first, second = starts(settings, (counted + 0.5) / _N_STARTS, (counted + 0.5) * _GOLDEN % 1)
        asked = torch.arange(settings.segment - settings.offset)
        self.earlier = first[:, None] + asked
        self.queries = second[:, None] + asked
        steps = torch.arange(settings.segment)
        self.copies = torch.stack([first[:, None] + steps, second[:, None] + steps])
        positions = torch.arange(settings.length)
        self.visible = positions <= self.queries[..., None]
        self.other = torch.ones(_N_STARTS, settings.length, dtype=torch.float64)
        for copy in self.copies:
            self.other.scatter_(1, copy, 0.0)

    def __call__(
        self, profile: Float[Tensor, "offset"], matching: Float[Tensor, ""]
    ) -> Float[Tensor, ""]:
        """Return the loss in nats. Layer 2 scores a token's own copies by `matching`."""
        settings = self.settings
        copied = pattern(profile).T  # [position copied from, position copied to]
        scores = matching * (copied[self.earlier] + copied[self.queries])
        weights = scores.masked_fill(~self.visible, -torch.inf).softmax(-1)
        logits = settings.output_scale * weights
        segment = self._at(logits, self.copies[0]) + self._at(logits, self.copies[1])
        n_other = settings.seen - settings.segment
        unseen = settings.vocabulary - settings.seen
        # Each other position holds each other token with probability 1/n_other.
        stays = torch.tensor((n_other - 1) / n_other, dtype=torch.float64).log()
        grows = torch.logaddexp(stays, logits - math.log(n_other)) * self.other[:, None]
        parts = [segment, (math.log(n_other) + grows.sum(-1))[..., None]]
        parts.append(torch.full_like(parts[1], math.log(unseen)))
        partition = torch.cat(parts, -1).logsumexp(-1)
        asked = torch.arange(self.queries.shape[1])
        right = segment[:, asked, asked + settings.offset]
        return (partition - right).mean()

    @staticmethod
    def _at(
        logits: Float[Tensor, "start asked pos"], positions: Int[Tensor, "start segment"]
    ) -> Float[Tensor, "start asked segment"]:
        return logits.gather(-1, positions[:, None].expand(-1, logits.shape[1], -1))

    def gradient(
        self, profile: Float[Tensor, "offset"], matching: float
    ) -> tuple[Float[Tensor, "offset"], float]:
        """Return the derivatives of the loss by the profile and by the matching strength."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = profile.detach().clone().requires_grad_(True)
            strength = torch.tensor(matching, dtype=torch.float64, requires_grad=True)
            by_profile, by_matching = torch.autograd.grad(self(leaf, strength), (leaf, strength))
        return by_profile, float(by_matching)
