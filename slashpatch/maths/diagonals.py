"""Diagonals of an attention matrix: products, sums, and changes of single diagonals.

A diagonal holds the entries (i, i−Δ) of all query tokens i for one offset Δ. With a KV cache the
queries are the last rows of a longer key axis; `past` is the number of key columns before them.
"""

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
    """A change of some diagonals (i, i−Δ) of a head's scores or pattern.

    Attributes:
        stage: "scores": the number is added to the logits (−inf removes a diagonal); "pattern": it
            multiplies the attention after the softmax (0 removes a diagonal).
        offsets: The offsets Δ of the diagonals that get `amount`.
        amount: The number for these diagonals.
        elsewhere: The number for all other diagonals: either the one that changes nothing (0 for
            scores, 1 for the pattern) or the one that removes them (−inf and 0).
    """

    stage: str
    offsets: tuple[int, ...]
    amount: float
    elsewhere: float

    @property
    def removes_the_rest(self) -> bool:
        """Whether the change removes all diagonals but those of `offsets`."""
        return self.elsewhere == (-math.inf if self.stage == "scores" else 0.0)

    def on_matrix(
        self, matrix: Float[Tensor, "*batch query key"], past: int
    ) -> Float[Tensor, "*batch query key"]:
        """Return a changed copy; row r and column past + r of the matrix are the same token."""
        rest = self.removes_the_rest
        changed = torch.full_like(matrix, self.elsewhere) if rest else matrix.clone()
        for offset in self.offsets:
            diagonal = matrix.diagonal(past - offset, -2, -1)
            new = diagonal + self.amount if self.stage == "scores" else diagonal * self.amount
            changed.diagonal(past - offset, -2, -1).copy_(new)
        return changed

    def at(self, offsets: Int[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Return the number (`amount` or `elsewhere`) that applies at each offset."""
        changed = torch.tensor(self.offsets, device=offsets.device)
        return torch.where(torch.isin(offsets, changed), self.amount, self.elsewhere)


def total_at(
    changes: Sequence[DiagonalChange], stage: str, offsets: Int[Tensor, "*any"]
) -> Float[Tensor, "*any"]:
    """Return the combined effect of all changes of one stage at each offset.

    For scores this is the sum to add to the logits, for the pattern the product of the factors.
    """
    total = torch.full(offsets.shape, 0.0 if stage == "scores" else 1.0, device=offsets.device)
    for change in changes:
        if change.stage == stage:
            total = total + change.at(offsets) if stage == "scores" else total * change.at(offsets)
    return total


def has_keys(scores: Float[Tensor, "*batch query key"], past: int) -> Bool[Tensor, "*batch query"]:
    """Return for each query row whether any key is left that is neither in the future nor masked.

    Masked keys have a score of −inf or of a dtype's lowest number (see `MASKED`).
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
    """Return q_i · k_{i−Δ} for Δ = first, …, first + width − 1; 0 where token i−Δ does not exist.

    Queries are the last rows of the key axis. Each block of queries is multiplied with only the
    keys that these offsets reach, and the diagonals are a strided view of that product.
    """
    n_queries, n_keys = q.shape[-2], k.shape[-2]
    past, reach = n_keys - n_queries, block + width - 1
    start = past - first - (width - 1)  # column of the first query's leftmost key
    n_blocks = -(-n_queries // block)
    stop = start + (n_blocks - 1) * block + reach
    kept = k[..., max(start, 0) : max(min(stop, n_keys), 0), :]
    left = min(max(-start, 0), stop - start)
    needed = (n_blocks - 1) * block + reach
    k = torch.nn.functional.pad(kept, (0, 0, left, needed - left - kept.shape[-2]))
    q = torch.nn.functional.pad(q, (0, 0, 0, n_blocks * block - n_queries))
    windows = k.unfold(-2, reach, block).mT.contiguous()
    products = q.unflatten(-2, (n_blocks, block)) @ windows.mT
    # In row r of a block, key i−Δ is in column r + (first + width − 1 − Δ), so a stride of one row
    # plus one column stays on a diagonal.
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
    """Return Σ_i q_i · k_{i−Δ} for Δ = 0, …, n_offsets − 1.

    Blocks of `block` queries are concatenated along the axis that a matrix product sums over, so
    the sum over tokens happens inside the product and no [query, offset] tensor is formed. `chunk`
    queries are processed at a time, to bound memory.
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
    """Return v_{i−offset} for each query i; 0 where that token does not exist.

    Queries are the last rows of the key axis.
    """
    past = v.shape[-2] - n_queries
    part = v[..., max(past - offset, 0) : max(v.shape[-2] - offset, 0), :]
    return torch.nn.functional.pad(part, (0, 0, n_queries - part.shape[-2], 0))


def diagonal_sums(
    rows: Float[Tensor, "batch head query key"], past: int
) -> Float[Tensor, "batch head offset"]:
    """Return the sum along every diagonal, for Δ = 0, …, past + query − 1.

    Row r is the token of key column past + r, so that key = past + query. Entries in the future are
    never read. Strided views are summed; nothing of the matrix's size is copied.
    """
    batch, head, n_queries, n_keys = rows.shape
    rows = rows.contiguous()
    # Diagonals that start in the first row: column c of the view is the one of Δ = past − c.
    whole = rows.as_strided(
        (batch, head, n_queries, past + 1),
        (*rows.stride()[:2], n_keys + 1, 1),
        rows.storage_offset(),
    ).sum(-2)
    # Diagonals that start in the first column, below those: Δ = past + 1, …
    corner = rows.new_zeros(batch, head, n_queries, 2 * n_queries)
    corner[..., n_queries:] = rows[..., :n_queries].tril(-1)
    # Entry (r, c) of the corner moves to column n_queries + c − r of the view.
    below = corner.as_strided(
        (batch, head, n_queries, n_queries),
        (*corner.stride()[:2], 2 * n_queries + 1, 1),
        corner.storage_offset(),
    ).sum(-2)
    return torch.cat([whole.flip(-1), below[..., 1:].flip(-1)], dim=-1)
