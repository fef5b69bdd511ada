"""The keys that each token attends to most, from an attention pattern's rows.

Rows are taken a block at a time, so that no query × key matrix is formed where the pattern has
none: either from a pattern tensor, or from an object with `pattern_blocks` that stands for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .slash_scores import slash_rows

#: How many rows of a pattern tensor are processed at a time.
_ROWS = 256


class Rows(NamedTuple):
    """What `top_keys` keeps of each row of a pattern.

    Attributes:
        keys: The keys with the largest weights, largest first; −1 where a row has no more of them.
        weights: Their weights, float32; 0 where there is no key.
        diagonals: Attention i → i−Δ, float32; 0 where there is no such key.
    """

    keys: Int[Tensor, "batch head query top"]
    weights: Float[Tensor, "batch head query top"]
    diagonals: Float[Tensor, "batch head query offset"]


def top_keys(pattern: Any, heads: Sequence[int], top: int, offsets: Sequence[int]) -> Rows:
    """Return the `top` largest entries of each row of some heads' pattern, and some diagonals.

    `pattern` is [batch, head, query, key], whose queries are the last rows of the key axis, or has
    `pattern_blocks`. Only keys with a weight above 0 are listed, and none after the query; of equal
    weights the earlier key comes first. *Ours*.
    """
    whole = isinstance(pattern, Tensor)
    blocks = _blocks(pattern, heads) if whole else pattern.pattern_blocks(heads)
    parts = []
    for first_key, block in blocks:
        past = block.shape[-1] - block.shape[-2]
        block = block.float().tril(past)
        keys, weights = _largest(block, top)
        keys = torch.where(keys < 0, keys, keys + first_key)
        diagonals = slash_rows(block, torch.tensor(offsets, device=block.device))
        parts.append((keys, weights, diagonals))
    return Rows(*(torch.cat(part, dim=2) for part in zip(*parts, strict=True)))


def _blocks(pattern: Tensor, heads: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """Yield blocks of rows of a pattern tensor as `EditedAttention.pattern_blocks` does."""
    n_queries, n_keys = pattern.shape[-2:]
    for start in range(0, n_queries, _ROWS):
        stop = min(start + _ROWS, n_queries)
        yield 0, pattern[:, list(heads), start:stop, : n_keys - n_queries + stop].detach()


def _largest(
    rows: Float[Tensor, "batch head row key"], top: int
) -> tuple[Int[Tensor, "batch head row top"], Float[Tensor, "batch head row top"]]:
    """Return index and value of the `top` largest positive entries of each row.

    The largest come first, and of equal ones that with the lower index. Where there are fewer, the
    index is −1 and the value 0.
    """
    kept = min(top, rows.shape[-1])
    values, index = rows.topk(min(top + 1, rows.shape[-1]), dim=-1)
    # `topk` chooses at will among equal entries; a stable sort takes the first ones.
    last, next_one = values[..., kept - 1], values[..., -1]
    values, index = values[..., :kept], index[..., :kept]
    crowded = (next_one == last) & (last > 0)
    if rows.shape[-1] > top and bool(crowded.any()):
        ordered = rows[crowded].sort(dim=-1, descending=True, stable=True)
        values[crowded], index[crowded] = (part[:, :kept] for part in ordered)
    index, order = index.sort(dim=-1)
    values, by_value = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    index = index.gather(-1, by_value)
    none = values <= 0  # NaN, which a caller may want to find, stays
    spare = (0, top - kept)
    return (
        torch.nn.functional.pad(index.masked_fill(none, -1), spare, value=-1),
        torch.nn.functional.pad(values.masked_fill(none, 0), spare),
    )
