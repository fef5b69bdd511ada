"""The two tasks: sequences as embeddings, and what is to be said where."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .settings import Settings


@dataclass(frozen=True)
class Examples:
    """Some sequences of one task.

    `x` is embeddings: semantic parts [vocabulary], a label, the common direction. `keys` marks, for
    each position that is asked, where the answer stands; rows without a mark are not asked.
    `targets` are token ids or labels, anything where nothing is asked.
    """

    x: Float[Tensor, "batch pos d_model"]
    keys: Bool[Tensor, "batch pos pos"]
    targets: Tensor

    @property
    def asked(self) -> Bool[Tensor, "batch pos"]:
        """Positions whose prediction counts."""
        return self.keys.any(-1)


def seeded(seed: int, *labels: object) -> torch.Generator:
    """A generator of its own for each label, so that adding a draw does not move another."""
    key = ":".join(map(str, (seed, *labels))).encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "little"))


def sample(
    settings: Settings, n: int, generator: torch.Generator, out_of_distribution: bool = False
) -> Examples:
    """n sequences of the task.

    In training tokens are uniform over those that it sees. Out of distribution (*ours*): all
    tokens, with Zipf's weights whose most frequent are those never seen; pass settings of another
    length to change that too.
    """
    weights = torch.zeros(n, settings.vocabulary)
    if out_of_distribution:
        weights[:] = 1 / torch.arange(settings.vocabulary, 0, -1)
    else:
        weights[:, : settings.seen] = 1
    own = torch.multinomial(weights, settings.segment, generator=generator)
    # Nothing of a segment comes elsewhere, so that each question has one answer.
    others = torch.multinomial(
        weights.scatter(1, own, 0), settings.length, replacement=True, generator=generator
    )
    build = _copying if settings.task == "copying" else _regression
    return build(settings, own, others, generator)


def embed(
    settings: Settings, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_model"]:
    """Semantic part (orthonormal) + cone × one common direction."""
    x = torch.zeros(*tokens.shape, settings.vocabulary + 2)
    x.scatter_(-1, tokens[..., None], 1.0)
    x[..., -1] = settings.cone
    return x


def _copying(
    settings: Settings,
    own: Int[Tensor, "batch segment"],
    others: Int[Tensor, "batch pos"],
    generator: torch.Generator,
) -> Examples:
    """Other tokens, the segment, a random gap, the segment again, other tokens."""
    n, size = own.shape
    slack = settings.length - 2 * size
    first = (torch.rand(n, generator=generator) * (slack + 1)).long()
    gap = (torch.rand(n, generator=generator) * (slack - first + 1)).long()
    second = first + size + gap
    steps = torch.arange(size)
    tokens = others.scatter(1, first[:, None] + steps, own).scatter(1, second[:, None] + steps, own)
    asked = torch.arange(size - settings.offset)
    rows = torch.arange(n)[:, None]
    queries = second[:, None] + asked
    answers = first[:, None] + asked + settings.offset
    keys = torch.zeros(n, settings.length, settings.length, dtype=torch.bool)
    keys[rows, queries, answers] = True
    targets = torch.zeros(n, settings.length, dtype=torch.long)
    targets[rows, queries] = own[:, settings.offset :]
    return Examples(embed(settings, tokens), keys, targets)


def _regression(
    settings: Settings,
    own: Int[Tensor, "batch segment"],
    others: Int[Tensor, "batch pos"],
    generator: torch.Generator,
) -> Examples:
    """Blocks of an x, other tokens, and its label; then all of them again in another order."""
    n, size = own.shape
    block = settings.offset + 1
    labels = torch.randn(n, size, generator=generator)
    order = torch.rand(n, size, generator=generator).argsort(1)
    starts = repeat(torch.arange(2 * size) * block, "block -> batch block", batch=n)
    again = torch.cat([torch.arange(size).expand(n, -1), order], dim=1)
    rows = torch.arange(n)[:, None]
    x = embed(settings, others.scatter(1, starts, own.gather(1, again)))
    place = starts + settings.offset
    x[rows, place, : settings.vocabulary] = 0
    x[rows, place, settings.vocabulary] = labels.gather(1, again)
    keys = torch.zeros(n, settings.length, settings.length, dtype=torch.bool)
    queries, answers = starts[:, size:], place.gather(1, order)
    keys[rows, queries, answers] = True
    targets = torch.zeros(n, settings.length)
    targets[rows, queries] = labels.gather(1, order)
    return Examples(x, keys, targets)
