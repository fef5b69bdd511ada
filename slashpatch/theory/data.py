"""The two tasks: sequences as embeddings, and what is to be said where."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
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

    In training tokens are uniform over those that it sees. Out of distribution (*ours*): over
    those that it never sees, the segment's uniform and the others by Zipf's law; pass settings of
    another length to change that too.
    """
    weights = torch.zeros(n, settings.vocabulary, dtype=torch.float32)
    chosen = slice(settings.seen, None) if out_of_distribution else slice(settings.seen)
    weights[:, chosen] = 1
    own = torch.multinomial(weights, settings.segment, generator=generator)
    if out_of_distribution:
        weights[:, chosen] = 1 / torch.arange(1, weights[0, chosen].numel() + 1)
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
    x = torch.zeros(*tokens.shape, settings.vocabulary + 2, dtype=torch.float32)
    x.scatter_(-1, tokens[..., None], 1.0)
    x[..., -1] = settings.cone
    return x


def _places(
    settings: Settings, n: int, generator: torch.Generator
) -> tuple[Int[Tensor, "batch 1"], Int[Tensor, "batch 1"]]:
    """Where the two rounds of a sequence begin: somewhere, and after a random gap."""
    half = settings.least_length // 2
    slack = settings.length - 2 * half
    first = (torch.rand(n, generator=generator, dtype=torch.float64) * (slack + 1)).long()
    gap = torch.rand(n, generator=generator, dtype=torch.float64) * (slack - first + 1)
    return first[:, None], (first + half + gap.long())[:, None]


def _copying(
    settings: Settings,
    own: Int[Tensor, "batch segment"],
    others: Int[Tensor, "batch pos"],
    generator: torch.Generator,
) -> Examples:
    """Other tokens, the segment, a random gap, the segment again, other tokens."""
    n, size = own.shape
    first, second = _places(settings, n, generator)
    steps = torch.arange(size)
    tokens = others.scatter(1, first + steps, own).scatter(1, second + steps, own)
    asked = torch.arange(size - settings.offset)
    rows = torch.arange(n)[:, None]
    keys = torch.zeros(n, settings.length, settings.length, dtype=torch.bool)
    keys[rows, second + asked, first + asked + settings.offset] = True
    targets = torch.zeros(n, settings.length, dtype=torch.long)
    targets[rows, second + asked] = own[:, settings.offset :]
    return Examples(embed(settings, tokens), keys, targets)


def _regression(
    settings: Settings,
    own: Int[Tensor, "batch segment"],
    others: Int[Tensor, "batch pos"],
    generator: torch.Generator,
) -> Examples:
    """Blocks of an x, other tokens, and its label; a gap; all of them again in another order."""
    n, size = own.shape
    labels = torch.randn(n, size, generator=generator, dtype=torch.float32)
    order = torch.rand(n, size, generator=generator).argsort(1)
    steps = torch.arange(size) * (settings.offset + 1)
    first, second = (place + steps for place in _places(settings, n, generator))
    rows = torch.arange(n)[:, None]
    again = own.gather(1, order)
    x = embed(settings, others.scatter(1, first, own).scatter(1, second, again))
    for starts, values in ((first, labels), (second, labels.gather(1, order))):
        x[rows, starts + settings.offset, : settings.vocabulary] = 0
        x[rows, starts + settings.offset, settings.vocabulary] = values
    keys = torch.zeros(n, settings.length, settings.length, dtype=torch.bool)
    keys[rows, second, first.gather(1, order) + settings.offset] = True
    targets = torch.zeros(n, settings.length, dtype=torch.float32)
    targets[rows, second] = labels.gather(1, order)
    return Examples(x, keys, targets)
