"""Changes to the diagonals of an attention matrix: on the matrix itself, or by offset."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .precision import MASKED


@dataclass(frozen=True)
class DiagonalChange:
    """One number for each diagonal (i, i−Δ), and one for all others.

    Attributes:
        stage: "scores": numbers are added to the logits (−inf removes); "pattern": they multiply
            the attention after the softmax.
        offsets: The Δ that get `amount`.
        amount: Of those.
        elsewhere: Of every other diagonal: what changes nothing, or what removes.
    """

    stage: str
    offsets: tuple[int, ...]
    amount: float
    elsewhere: float

    @property
    def removes_the_rest(self) -> bool:
        """Whether only `offsets` are left."""
        return self.elsewhere == (-math.inf if self.stage == "scores" else 0.0)

    def on_matrix(
        self, matrix: Float[Tensor, "*batch query key"], past: int
    ) -> Float[Tensor, "*batch query key"]:
        """A changed copy; query row r is the token in column past + r."""
        rest = self.removes_the_rest
        changed = torch.full_like(matrix, self.elsewhere) if rest else matrix.clone()
        for offset in self.offsets:
            diagonal = matrix.diagonal(past - offset, -2, -1)
            new = diagonal + self.amount if self.stage == "scores" else diagonal * self.amount
            changed.diagonal(past - offset, -2, -1).copy_(new)
        return changed

    def at(self, offsets: Int[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """The number of each offset, float64."""
        own = torch.tensor(self.offsets, device=offsets.device)
        return torch.where(torch.isin(offsets, own), self.amount, self.elsewhere)


def total_at(
    changes: Sequence[DiagonalChange], stage: str, offsets: Int[Tensor, "*any"]
) -> Float[Tensor, "*any"]:
    """What the changes of one stage do together: a sum of logits, or a product of factors."""
    total = torch.full(offsets.shape, 0.0 if stage == "scores" else 1.0, device=offsets.device)
    for change in changes:
        if change.stage == stage:
            total = total + change.at(offsets) if stage == "scores" else total * change.at(offsets)
    return total


def has_keys(scores: Float[Tensor, "*batch query key"], past: int) -> Bool[Tensor, "*batch query"]:
    """Whether a row has a key left: one that is neither in the future nor masked.

    Masked keys carry a dtype's lowest number or −inf.
    """
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(past)
    masked = scores <= MASKED
    return (visible & ~masked).any(-1)


def band_of_products(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch head key d_head"],
    first: int,
    width: int,
    block: int = 32,
) -> Float[Tensor, "batch head query width"]:
    """q_i · k_{i−Δ} for Δ from `first` on, `width` of them; 0 where there is no such key.

    Queries are the last rows of the key axis. A block of queries meets just the keys in its reach
    by one matrix product, of which the diagonals are then a view.
    """
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    past, reach = n_keys - n_queries, block + width - 1
    start = past - first - (width - 1)  # the leftmost key of the first query
    n_blocks = -(-n_queries // block)
    stop = start + (n_blocks - 1) * block + reach
    kept = k[..., max(start, 0) : max(min(stop, n_keys), 0), :]
    left = min(max(-start, 0), stop - start)
    needed = (n_blocks - 1) * block + reach
    k = torch.nn.functional.pad(kept, (0, 0, left, needed - left - kept.shape[-2]))
    q = torch.nn.functional.pad(q, (0, 0, 0, n_blocks * block - n_queries))
    windows = k.unfold(-2, reach, block).mT.contiguous()
    products = q.unflatten(-2, (n_blocks, block)) @ windows.mT
    # Row r of a block meets key i−Δ in column r + (first + width − 1 − Δ): step by one row and one
    # column at once.
    products = products.contiguous()
    view = products.as_strided(
        (*products.shape[:3], block, width),
        (*products.stride()[:3], reach + 1, 1),
        products.storage_offset(),
    )
    return view.flip(-1).flatten(2, 3)[:, :, :n_queries]


def lagged_products(
    q: Float[Tensor, "batch head pos d_head"],
    k: Float[Tensor, "batch head pos d_head"],
    n_offsets: int,
    block: int = 64,
    chunk: int = 1024,
) -> Float[Tensor, "batch head offset"]:
    """Σ_i q_i · k_{i−Δ} for Δ from 0 to n_offsets − 1.

    Blocks of queries lie behind one another along the axis that the matrix product sums over, so
    no product of a single pair is kept. A chunk of queries is taken at a time.
    """
    total = torch.zeros(*q.shape[:2], n_offsets, dtype=q.dtype, device=q.device)
    reach = block + n_offsets - 1
    for start in range(0, q.shape[2], chunk):
        part = q[:, :, start : start + chunk]
        n_blocks = -(-part.shape[2] // block)
        missing = n_blocks * block - part.shape[2]
        first = start - (n_offsets - 1)
        keys = k[:, :, max(first, 0) : start + chunk]
        keys = torch.nn.functional.pad(keys, (0, 0, max(-first, 0), missing))
        part = torch.nn.functional.pad(part, (0, 0, 0, missing))
        left = part.unflatten(2, (n_blocks, block)).transpose(2, 3).flatten(3)
        right = keys.unfold(2, reach, block).permute(0, 1, 4, 2, 3).flatten(3)
        products = left @ right.mT  # [batch, head, block, reach]
        view = products.as_strided(
            (*products.shape[:3], n_offsets), (*products.stride()[:2], reach + 1, 1)
        )
        total += view.sum(2).flip(-1)
    return total


def shifted(
    v: Float[Tensor, "batch head key d_head"], offset: int, n_queries: int
) -> Float[Tensor, "batch head query d_head"]:
    """v_{i−offset} for each query i, the last rows of the key axis; 0 where there is none."""
    past = v.shape[-2] - n_queries
    part = v[..., max(past - offset, 0) : max(v.shape[-2] - offset, 0), :]
    return torch.nn.functional.pad(part, (0, 0, n_queries - part.shape[-2], 0))


def diagonal_sums(
    rows: Float[Tensor, "batch head query key"], past: int
) -> Float[Tensor, "batch head offset"]:
    """Sum over rows of entries (i, i−Δ), for every Δ from 0 to past + query − 1.

    Row r is the token in column past + r, and key = past + query. Entries in the future are not
    read. Views of the matrix are summed; nothing of its size is copied.
    """
    batch, head, n_queries, n_keys = rows.shape
    rows = rows.contiguous()
    # Column c of the view is the diagonal of Δ = past − c, whole for c from 0 to past.
    whole = rows.as_strided(
        (batch, head, n_queries, past + 1),
        (*rows.stride()[:2], n_keys + 1, 1),
        rows.storage_offset(),
    ).sum(-2)
    # Below lies a triangle whose diagonals start in column 0: Δ = past + 1, ...
    corner = rows.new_zeros(batch, head, n_queries, 2 * n_queries)
    corner[..., n_queries:] = rows[..., :n_queries].tril(-1)
    # Entry (r, c) of the corner is at column n_queries + c − r after the shift.
    below = corner.as_strided(
        (batch, head, n_queries, n_queries),
        (*corner.stride()[:2], 2 * n_queries + 1, 1),
        corner.storage_offset(),
    ).sum(-2)
    return torch.cat([whole.flip(-1), below[..., 1:].flip(-1)], dim=-1)
