"""Slash scores: the mean attention that a head pays from token i to token i−Δ.

Definition (arXiv 2601.08297, as described in its abstract and authors' page): for one prompt of N
tokens, score(Δ) = 1/(N−Δ) · Σ_{i≥Δ} S[i, i−Δ], with S the causal attention after the softmax.

`slash_scores` is the readable reference. `slash_rows` and `slash_sums` are the fast versions: they
do not copy the T×T matrix, accept queries that are the last rows of a longer key axis (KV cache),
and accept attention whose matrix was never formed (`HasDiagonals`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from .diagonals import diagonal_sums

#: Above this many offsets, summing all diagonals of whole rows is faster than gathering entries.
_MOST_GATHERED_OFFSETS = 96
#: How many rows are then processed at a time.
_ROWS = 256


@runtime_checkable
class HasDiagonals(Protocol):
    """Stands for an attention matrix that was not formed, and can return its diagonals."""

    shape: torch.Size

    def slash_rows(self, offsets: Tensor) -> Tensor:
        """Return the entries i → i−Δ, [batch, head, query, offset]."""
        ...


def slash_scores(
    pattern: Float[Tensor, "batch head pos pos"], offsets: Sequence[int]
) -> Float[Tensor, "batch head offset"]:
    """Return the mean attention along each sub-diagonal: the dense reference.

    `pattern` is the attention after the softmax, of prompts without padding. Scores are float64 in
    [0, 1]; an offset as large as the prompt is long gives NaN. Source: arXiv 2601.08297,
    definition.
    """
    return torch.stack(
        [pattern.double().diagonal(-offset, -2, -1).mean(-1) for offset in offsets], dim=-1
    )


def slash_rows(
    pattern: Float[Tensor, "batch head query key"] | HasDiagonals, offsets: Tensor
) -> Float[Tensor, "batch head query offset"]:
    """Return each query's attention to the key `offset` tokens before it; 0 where there is none.

    Queries are the last rows of the key axis, as in cached decoding. `offsets` is an integer tensor
    [offset] on the pattern's device. Only query × offset entries are copied.
    """
    if not isinstance(pattern, Tensor):
        return pattern.slash_rows(offsets)
    batch, head, n_queries, n_keys = pattern.shape
    index, valid = _diagonal_index(n_queries, n_keys, offsets)
    rows = pattern.gather(-1, index.expand(batch, head, -1, -1))
    return rows.masked_fill(~valid, 0.0)


def slash_sums(
    pattern: Any,
    offsets: Sequence[int],
    real: Bool[Tensor, "batch key"],
) -> Float[Tensor, "batch head offset"]:
    """Return the sum of attention i → i−Δ over all real (unpadded) tokens i and i−Δ.

    `pattern` is [batch, head, query, key], or a `HasDiagonals` that also has `slash_sums`. Queries
    are the last rows of the key axis. The result is float64 on the CPU (summed in float32 on MPS,
    which has no float64).
    """
    n_queries = pattern.shape[-2]
    if not isinstance(pattern, Tensor):
        return pattern.slash_sums(offsets, real[:, -n_queries:]).cpu().double()
    wide = torch.float32 if pattern.device.type == "mps" else torch.float64
    index = torch.tensor(offsets)
    if len(offsets) > _MOST_GATHERED_OFFSETS:
        sums = _all_sums(pattern.detach(), real.to(pattern.device), wide).cpu()
        sums = torch.nn.functional.pad(sums, (0, max(0, int(index.max()) + 1 - sums.shape[-1])))
        return sums[..., index].double()
    rows = real_rows(real, n_queries, index).to(pattern.device)
    entries = slash_rows(pattern.detach(), index.to(pattern.device))
    # Padding may be NaN, which a multiplication by 0 would not remove.
    return entries.masked_fill(~rows[:, None], 0).sum(-2, dtype=wide).cpu().double()


def _all_sums(
    pattern: Float[Tensor, "batch head query key"],
    real: Bool[Tensor, "batch key"],
    dtype: torch.dtype,
) -> Float[Tensor, "batch head key"]:
    """Return the sum over real (unpadded) tokens along every diagonal, some rows at a time."""
    n_queries, n_keys = pattern.shape[-2:]
    past, padded = n_keys - n_queries, not bool(real.all())
    sums = torch.zeros(*pattern.shape[:2], n_keys, dtype=dtype, device=pattern.device)
    for start in range(0, n_queries, _ROWS):
        stop = min(start + _ROWS, n_queries)
        rows = pattern[:, :, start:stop, : past + stop].to(dtype)
        if padded:
            both_real = real[:, past + start : past + stop, None] & real[:, None, : past + stop]
            rows = rows.masked_fill(~both_real[:, None], 0)
        sums[..., : past + stop] += diagonal_sums(rows, past + start)
    return sums


def real_rows(
    real: Bool[Tensor, "batch key"], n_queries: int, offsets: Tensor
) -> Bool[Tensor, "batch query offset"]:
    """Return which queries i count for which offset: i and i−offset are both real tokens."""
    index, valid = _diagonal_index(n_queries, real.shape[1], offsets)
    keys = real[:, index]
    queries = real[:, -n_queries:, None]
    return keys & queries & valid


def _diagonal_index(
    n_queries: int, n_keys: int, offsets: Tensor
) -> tuple[Shaped[Tensor, "query offset"], Bool[Tensor, "query offset"]]:
    """Return the key index of each (query, offset), clamped to 0, and whether that key exists."""
    query = torch.arange(n_keys - n_queries, n_keys, device=offsets.device)
    index = query[:, None] - offsets
    return index.clamp(min=0), index >= 0
