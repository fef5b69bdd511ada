"""What a head's logits depend on: shares of their variance that offset and key explain.

The logits i → i−Δ for 0 ≤ Δ < W of the tokens i ≥ W−1, less each row's mean over these offsets: the
softmax ignores what is added to a whole row. The choice of logits and the shares are *ours*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

#: Rows whose logits are computed at a time.
_ROWS = 256


class LogitShares(NamedTuple):
    """Shares of the variance of one head's logits, each row less its mean.

    Attributes:
        position: Share (R²) of the mean by offset.
        token: Share of an effect of each key token, the same for all queries. Even logits without
            any pattern have about 1 / n_offsets of it.
        both: Share of the sum of the two effects, fitted together. What is left of 1 depends on
            query and key together. `position` and `token` may overlap: a trend over offsets is one
            over keys as well.
        curve: Share of the curve Σ A cos(θΔ + φ) of mean query and mean key, with nothing fitted;
            below 0 where it is worse than a flat one. NaN without RoPE.
        query: Share of the logits' whole variance that is the rows' means, which the softmax
            ignores.
        sd: Standard deviation of the logits, each row less its mean.
        n_offsets: Number W of offsets.
    """

    position: float
    token: float
    both: float
    curve: float
    query: float
    sd: float
    n_offsets: int


class BandSums(NamedTuple):
    """Sums over the logits of one prompt, by head.

    Attributes:
        square: Sum of the squared logits, each row less its mean.
        by_offset: Sum over rows; `by_key` over the rows that contain the key.
        row_mean: Sum of the rows' means; `row_square` of their squares.
        n_rows: Number of rows.
    """

    square: Float[Tensor, "head"]
    by_offset: Float[Tensor, "head offset"]
    by_key: Float[Tensor, "head key"]
    row_mean: Float[Tensor, "head"]
    row_square: Float[Tensor, "head"]
    n_rows: int

    def of_head(self, head: int) -> BandSums:
        """Return the sums of one head, as if it were alone."""
        own = slice(head, head + 1)
        return BandSums(
            self.square[own],
            self.by_offset[own],
            self.by_key[own],
            self.row_mean[own],
            self.row_square[own],
            self.n_rows,
        )


def band_logits(
    q: Float[Tensor, "head query d_head"], k: Float[Tensor, "head key d_head"], n_offsets: int
) -> Float[Tensor, "head query offset"]:
    """Return the dot products of each query with the key as far back as each of the offsets.

    The queries are those of the last keys; n_offsets − 1 keys come before the first of them.
    """
    windows = k.unfold(1, n_offsets, 1)  # the key Δ back is last but Δ
    return torch.einsum("hqd,hqdo->hqo", q, windows).flip(-1)


def band_sums(
    q: Float[Tensor, "head pos d_head"],
    k: Float[Tensor, "head pos d_head"],
    n_offsets: int,
    scale: float,
    softcap: float | None = None,
) -> BandSums:
    """Return the sums of one prompt from its rotated queries and keys, some rows at a time."""
    n_heads, n_pos, _ = q.shape
    first = n_offsets - 1
    sums = [torch.zeros(n_heads, *shape, dtype=q.dtype) for shape in ((), (n_offsets,), (n_pos,))]
    means = torch.zeros(2, n_heads, dtype=q.dtype)
    for start in range(first, n_pos, _ROWS):
        stop = min(start + _ROWS, n_pos)
        logits = scale * band_logits(q[:, start:stop], k[:, start - first : stop], n_offsets)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        mean = logits.mean(-1, keepdim=True)
        means += torch.stack([mean.sum((1, 2)), mean.square().sum((1, 2))])
        logits = logits - mean
        sums[0] += logits.square().sum((1, 2))
        sums[1] += logits.sum(1)
        keys = torch.arange(start, stop)[:, None] - torch.arange(n_offsets)
        sums[2].index_add_(1, keys.flatten(), logits.flatten(1))
    square, by_offset, by_key = sums
    return BandSums(square, by_offset, by_key, means[0], means[1], max(0, n_pos - first))


def logit_shares(
    sums: Sequence[BandSums], curves: Float[Tensor, "head offset"]
) -> list[LogitShares]:
    """Return the shares of each head over all prompts.

    `curves` are the predicted logits by offset (NaN: none). Least squares, by the normal equations
    of the two effects, which are the same for all heads. NaN where all logits of a row are equal.
    """
    n_offsets = curves.shape[1]
    n_rows = sum(one.n_rows for one in sums)
    square = torch.stack([one.square for one in sums]).sum(0)
    by_offset = torch.stack([one.by_offset for one in sums]).sum(0)
    means = torch.stack([one.row_mean for one in sums]).sum(0) / n_rows
    row_square = torch.stack([one.row_square for one in sums]).sum(0)
    row_variance = (row_square / n_rows - means.square()).clamp(min=0)
    variance = square / (n_rows * n_offsets)

    position_sum = by_offset.square().sum(-1) / n_rows
    left = n_rows * (torch.eye(n_offsets) - 1 / n_offsets).to(square)
    right, token_sum = by_offset, torch.zeros_like(square)
    designs: dict[int, _Design] = {}
    for one in sums:
        n_keys = one.by_key.shape[1]
        design = designs.setdefault(n_keys, _Design.of(n_keys, n_offsets))
        effect = one.by_key @ design.key_inverse
        token_sum = token_sum + (effect * one.by_key).sum(-1)
        right = right - effect @ design.cross.T
        left = left - design.cross @ design.key_inverse @ design.cross.T
    both_sum = token_sum + torch.einsum("ho,op,hp->h", right, _inverse(left, float(n_rows)), right)

    curve = curves.to(square) - curves.to(square).mean(-1, keepdim=True)
    curve_left = square - 2 * (curve * by_offset).sum(-1) + n_rows * curve.square().sum(-1)
    shares = torch.stack([position_sum, token_sum, both_sum, square - curve_left]) / square
    columns = torch.stack([*shares, row_variance / (row_variance + variance), variance.sqrt()])
    return [
        LogitShares(position, token, both, curve, query, sd, n_offsets)
        for position, token, both, curve, query, sd in columns.T.tolist()
    ]


@dataclass(frozen=True)
class _Design:
    """The normal equations of one prompt's key effects: which rows contain which key.

    Attributes:
        key_inverse: Pseudo-inverse of the matrix of the key effects.
        cross: The matrix between offset and key effects.
    """

    key_inverse: Float[Tensor, "key key"]
    cross: Float[Tensor, "offset key"]

    @classmethod
    def of(cls, n_keys: int, n_offsets: int) -> _Design:
        rows = torch.arange(n_offsets - 1, n_keys)[:, None]
        keys = torch.arange(n_keys)
        has = ((rows - keys >= 0) & (rows - keys < n_offsets)).double()
        count = has.sum(0)
        own = torch.diag(count) - has.T @ has / n_offsets
        offsets = torch.arange(n_offsets)[:, None]
        row = keys + offsets
        cross = ((row >= n_offsets - 1) & (row < n_keys)).double() - count / n_offsets
        return cls(_inverse(own, float(n_offsets)), cross)


def _inverse(matrix: Float[Tensor, "size size"], largest: float) -> Float[Tensor, "size size"]:
    """Return the pseudo-inverse of a positive semidefinite matrix; `largest` tells its scale."""
    values, vectors = torch.linalg.eigh(matrix)
    inverted = torch.where(values > 1e-8 * largest, 1 / values, 0)
    return (vectors * inverted) @ vectors.T
