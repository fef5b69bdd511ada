"""The two training tasks: sequences of embeddings, with targets at some positions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .settings import Settings


@dataclass(frozen=True)
class Examples:
    """A batch of sequences of one task.

    Attributes:
        x: Embeddings. The first [vocabulary] dimensions are the token (one-hot), then one dimension
            for a label and one for the common direction.
        keys: [query, key], True where the query's position has a target and the key's position
            holds the answer. Positions without a target have no True.
        targets: The token id (copying) or label (regression) to predict; arbitrary at positions
            without a target.
    """

    x: Float[Tensor, "batch pos d_model"]
    keys: Bool[Tensor, "batch pos pos"]
    targets: Tensor

    @property
    def asked(self) -> Bool[Tensor, "batch pos"]:
        """Positions with a target."""
        return self.keys.any(-1)


def seeded(seed: int, *labels: object) -> torch.Generator:
    """Return a generator for a seed and labels; draws with other labels do not affect it."""
    key = ":".join(map(str, (seed, *labels))).encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key).digest()[:7], "little"))


def sample(
    settings: Settings, n: int, generator: torch.Generator, out_of_distribution: bool = False
) -> Examples:
    """Return n sequences of the task.

    Tokens are uniform over the first half of the vocabulary. Out of distribution (*ours*), they
    are from the second half, which training never uses: the segment's tokens are uniform, all
    others follow Zipf's law. To change the length too, pass settings of another length.
    """
    weights = torch.zeros(n, settings.vocabulary, dtype=torch.float32)
    chosen = slice(settings.seen, None) if out_of_distribution else slice(settings.seen)
    weights[:, chosen] = 1
    segment = torch.multinomial(weights, settings.segment, generator=generator)
    if out_of_distribution:
        weights[:, chosen] = 1 / torch.arange(1, weights[0, chosen].numel() + 1)
    # Tokens of the segment do not occur elsewhere, so that each target has one answer.
    others = torch.multinomial(
        weights.scatter(1, segment, 0), settings.length, replacement=True, generator=generator
    )
    build = _copying if settings.task == "copying" else _regression
    return build(settings, segment, others, generator)


def embed(
    settings: Settings, tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch pos d_model"]:
    """Return token embeddings: a one-hot vector plus `cone` times one common direction."""
    x = torch.zeros(*tokens.shape, settings.vocabulary + 2, dtype=torch.float32)
    x.scatter_(-1, tokens[..., None], 1.0)
    x[..., -1] = settings.cone
    return x


def starts(
    settings: Settings, u_first: Float[Tensor, "batch"], u_gap: Float[Tensor, "batch"]
) -> tuple[Int[Tensor, "batch"], Int[Tensor, "batch"]]:
    """Return start positions of a sequence's two halves, from numbers uniform in [0, 1).

    The first is uniform over all that leave room, and so is the gap after it.
    """
    half = settings.least_length // 2
    slack = settings.length - 2 * half
    first = (u_first * (slack + 1)).long()
    return first, first + half + (u_gap * (slack - first + 1)).long()


def _drawn_starts(
    settings: Settings, n: int, generator: torch.Generator
) -> tuple[Int[Tensor, "batch 1"], Int[Tensor, "batch 1"]]:
    """Return the random start positions of a sequence's two halves, with a random gap between."""
    u_first, u_gap = (torch.rand(n, generator=generator, dtype=torch.float64) for _ in range(2))
    first, second = starts(settings, u_first, u_gap)
    return first[:, None], second[:, None]


def _copying(
    settings: Settings,
    segment: Int[Tensor, "batch segment"],
    others: Int[Tensor, "batch pos"],
    generator: torch.Generator,
) -> Examples:
    """Return sequences: other tokens, the segment, a random gap, the segment again, other tokens.

    At each position of the second segment, the target is the token `offset` positions further on.
    """
    n, size = segment.shape
    first, second = _drawn_starts(settings, n, generator)
    steps = torch.arange(size)
    tokens = others.scatter(1, first + steps, segment).scatter(1, second + steps, segment)
    asked = torch.arange(size - settings.offset)
    rows = torch.arange(n)[:, None]
    keys = torch.zeros(n, settings.length, settings.length, dtype=torch.bool)
    keys[rows, second + asked, first + asked + settings.offset] = True
    targets = torch.zeros(n, settings.length, dtype=torch.long)
    targets[rows, second + asked] = segment[:, settings.offset :]
    return Examples(embed(settings, tokens), keys, targets)


def _regression(
    settings: Settings,
    segment: Int[Tensor, "batch segment"],
    others: Int[Tensor, "batch pos"],
    generator: torch.Generator,
) -> Examples:
    """Return sequences of blocks, a random gap, and the same blocks in another order.

    A block is a token x, `offset` − 1 other tokens, and a label. At the second occurrence of x, the
    target is its label.
    """
    n, size = segment.shape
    labels = torch.randn(n, size, generator=generator, dtype=torch.float32)
    order = torch.rand(n, size, generator=generator).argsort(1)
    steps = torch.arange(size) * (settings.offset + 1)
    first, second = (start + steps for start in _drawn_starts(settings, n, generator))
    rows = torch.arange(n)[:, None]
    reordered = segment.gather(1, order)
    x = embed(settings, others.scatter(1, first, segment).scatter(1, second, reordered))
    for starts, values in ((first, labels), (second, labels.gather(1, order))):
        x[rows, starts + settings.offset, : settings.vocabulary] = 0
        x[rows, starts + settings.offset, settings.vocabulary] = values
    keys = torch.zeros(n, settings.length, settings.length, dtype=torch.bool)
    keys[rows, second, first.gather(1, order) + settings.offset] = True
    targets = torch.zeros(n, settings.length, dtype=torch.float32)
    targets[rows, second] = labels.gather(1, order)
    return Examples(x, keys, targets)
