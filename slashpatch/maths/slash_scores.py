"""Slash scores: the mean attention that a head pays from token i to token i−Δ.

Definition (arXiv 2601.08297, as described in its abstract and authors' page): for one prompt of N
tokens, score(Δ) = 1/(N−Δ) · Σ_{i≥Δ} S[i, i−Δ], with S the causal attention after the softmax.

`slash_scores` is the readable reference. `slash_rows` and `slash_sums` serve the hot path: no copy
of a T×T matrix, queries that sit at the end of a longer key axis (KV cache), and attention that was
never formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from .diagonals import diagonal_sums

#: More offsets than this are summed along whole rows, so many rows at a time.
_WHOLE_ROWS = 96
_ROWS = 256


@runtime_checkable
class HasDiagonals(Protocol):
    """An attention matrix that is not formed, and whose diagonals are known."""

    shape: torch.Size

    def slash_rows(self, offsets: Tensor) -> Tensor:
        """Entries i → i−Δ, [batch, head, query, offset]."""
        ...


def slash_scores(
    pattern: Float[Tensor, "batch head pos pos"], offsets: Sequence[int]
) -> Float[Tensor, "batch head offset"]:
    """Mean attention along each sub-diagonal: the dense reference, written for reading.

    `pattern` is the attention after the softmax, of unpadded prompts. Scores lie in [0, 1], in
    float64. An offset that the prompt cannot hold gives NaN. Source: arXiv 2601.08297, definition.
    """
    return torch.stack(
        [pattern.double().diagonal(-offset, -2, -1).mean(-1) for offset in offsets], dim=-1
    )


def slash_rows(
    pattern: Float[Tensor, "batch head query key"] | HasDiagonals, offsets: Tensor
) -> Float[Tensor, "batch head query offset"]:
    """Attention of each query to the key `offset` tokens before it; 0 where there is no such key.

    Queries are the last rows of the key axis, as in cached decoding. `offsets` is an integer tensor
    [offset] on the pattern's device. One gather of query × offset entries; nothing T×T is copied.
    What stands for a pattern that was not formed is asked for its diagonals.
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
    """Sums of attention i → i−Δ over real tokens i and i−Δ, in float64, on the CPU.

    `pattern` is [batch, head, query, key], or stands for it. (MPS has no float64: there the sum is
    float32.) Queries are the last rows of the key axis.
    """
    n_queries = pattern.shape[-2]
    if not isinstance(pattern, Tensor):
        return pattern.slash_sums(offsets, real[:, -n_queries:]).cpu().double()
    wide = torch.float32 if pattern.device.type == "mps" else torch.float64
    wanted = torch.tensor(offsets)
    if len(offsets) > _WHOLE_ROWS:
        sums = _all_sums(pattern.detach(), real.to(pattern.device), wide).cpu()
        sums = torch.nn.functional.pad(sums, (0, max(0, int(wanted.max()) + 1 - sums.shape[-1])))
        return sums[..., wanted].double()
    rows = real_rows(real, n_queries, wanted).to(pattern.device)
    taken = slash_rows(pattern.detach(), wanted.to(pattern.device))
    # Padding may hold anything, NaN included: it is left out, not multiplied by zero.
    return taken.masked_fill(~rows[:, None], 0).sum(-2, dtype=wide).cpu().double()


def _all_sums(
    pattern: Float[Tensor, "batch head query key"],
    real: Bool[Tensor, "batch key"],
    dtype: torch.dtype,
) -> Float[Tensor, "batch head key"]:
    """Sums over real tokens along every diagonal, some rows at a time."""
    n_queries, n_keys = pattern.shape[-2:]
    past, padded = n_keys - n_queries, not bool(real.all())
    sums = torch.zeros(*pattern.shape[:2], n_keys, dtype=dtype, device=pattern.device)
    for start in range(0, n_queries, _ROWS):
        stop = min(start + _ROWS, n_queries)
        rows = pattern[:, :, start:stop, : past + stop].to(dtype)
        if padded:
            seen = real[:, past + start : past + stop, None] & real[:, None, : past + stop]
            rows = rows.masked_fill(~seen[:, None], 0)
        sums[..., : past + stop] += diagonal_sums(rows, past + start)
    return sums


def real_rows(
    real: Bool[Tensor, "batch key"], n_queries: int, offsets: Tensor
) -> Bool[Tensor, "batch query offset"]:
    """Which rows count for which offset: query i and key i−offset exist and are no padding."""
    index, valid = _diagonal_index(n_queries, real.shape[1], offsets)
    keys = real[:, index]
    queries = real[:, -n_queries:, None]
    return keys & queries & valid


def _diagonal_index(
    n_queries: int, n_keys: int, offsets: Tensor
) -> tuple[Shaped[Tensor, "query offset"], Bool[Tensor, "query offset"]]:
    """Key index of (query, offset), and whether that key exists."""
    query = torch.arange(n_keys - n_queries, n_keys, device=offsets.device)
    index = query[:, None] - offsets
    return index.clamp(min=0), index >= 0
