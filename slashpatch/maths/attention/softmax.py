"""Softmax attention of one layer whose matrix is never formed.

Outputs come from flash attention with the log-sum-exp of each row, or from blocks of rows where
that cannot be exact (windows, soft-capping, masks of other kinds, few queries after many keys).
From the log-sum-exp, any entry of the pattern is one dot product away:
S[i, i−Δ] = exp(logit(i, i−Δ) − LSE_i).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..diagonals import band_of_products, lagged_products
from .flash import flash_attention
from .mask import Mask

#: Entries that a block of rows may hold, over prompts and heads.
BLOCK_ENTRIES = 2**23
#: Rows of a band of diagonals at a time: what fits the cache.
_CHUNK = 512


class Attention:
    """Attention of one layer in one pass, from rotated queries and keys of every query head.

    logit = scale · q·k, soft-capped if `softcap` says so; a sink is one more logit of each row,
    whose share is written nowhere. `way` says how `result` came about: "flash" or "blocks".
    """

    def __init__(
        self,
        q: Float[Tensor, "batch head query d_head"],
        k: Float[Tensor, "batch head key d_head"],
        v: Float[Tensor, "batch head key d_head"],
        mask: Mask,
        scale: float,
        softcap: float | None = None,
        sinks: Float[Tensor, "head"] | None = None,
    ) -> None:
        self.q, self.k, self.v = q, k, v
        self.mask = mask
        self.scale = scale
        self.softcap = softcap
        self.sinks = sinks
        self.way = ""
        self._base: tuple[Tensor, Tensor] | None = None

    def set_keys(self, heads: Sequence[int], keys: Float[Tensor, "batch key own d_head"]) -> None:
        """Give some heads rotated keys of their own."""
        self.k = self.k.clone()
        self.k[:, list(heads)] = keys.transpose(1, 2).to(self.k.dtype)
        self._base = None

    def set_sinks(self, sinks: Float[Tensor, "head"]) -> None:
        """Let a sink take part in each row."""
        self.sinks = sinks
        self._base = None

    def logit_sums(
        self, n_offsets: int, real: Bool[Tensor, "batch key"]
    ) -> Float[Tensor, "batch head offset"] | None:
        """Sum of logits i → i−Δ for Δ < n_offsets over real tokens i and i−Δ, or None.

        None where the sum of products would not tell: soft-capped, masked by more than causality,
        or with keys before the first query.
        """
        if self.softcap is not None or self.mask.past or not self.mask.plain:
            return None
        q, k = wide(self.q.detach()), wide(self.k.detach())
        if not bool(real.all()):
            padding = ~real.to(q.device)[:, None, :, None]
            q, k = q.masked_fill(padding, 0), k.masked_fill(padding, 0)
        return self.scale * lagged_products(q, k, n_offsets)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Rows in runs that stay in the processor's cache."""
        for start in range(0, self.mask.n_queries, _CHUNK):
            yield start, min(start + _CHUNK, self.mask.n_queries)

    def own_logits(
        self, heads: Sequence[int], offsets: Sequence[int], start: int, stop: int
    ) -> Float[Tensor, "batch own row offset"]:
        """Unchanged logits i → i−Δ of some rows, float32 or wider; −inf without a key to read."""
        past = self.mask.past
        q = wide(self.of(self.q, heads)[:, :, start:stop].detach())
        first = max(0, past + start - offsets[-1])
        k = wide(self.of(self.k, heads)[:, :, first : past + stop].detach())
        parts = []
        for band in _bands(offsets):
            found = band_of_products(q, k, band[0], band[-1] - band[0] + 1)
            if len(band) < found.shape[-1]:
                found = found[..., [offset - band[0] for offset in band]]
            parts.append(found)
        logits = self._capped(torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0])
        if self.mask.plain and self.mask.real is None:
            stop = min(stop, max(start, offsets[-1] - past))  # later rows have all these keys
        rows = torch.arange(start, stop, device=q.device)
        columns = rows[:, None] + past - torch.tensor(offsets, device=q.device)
        seen = self.mask.at(rows[None, None, :, None], columns[None, None])
        logits[:, :, : stop - start].masked_fill_(~seen, -math.inf)
        return logits

    def _capped(self, products: Tensor) -> Tensor:
        logits = products * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits)

    def result(
        self,
    ) -> tuple[Float[Tensor, "batch head query d_head"], Float[Tensor, "batch head query"]]:
        """Output and log-sum-exp of each row, the sink included; computed once."""
        if self._base is None:
            self._base = self._by_flash() or self._by_blocks()
        return self._base

    def _by_flash(self) -> tuple[Tensor, Tensor] | None:
        mask = self.mask
        if not mask.plain or mask.past or self.softcap is not None or mask.spans is None:
            return None
        if self.sinks is not None and self.under_gradients():
            return None  # the log-sum-exp, and so the sink's share, carries none
        if len(mask.spans) == 1 and (0, mask.n_keys) in mask.spans:
            found = flash_attention(self.q, self.k, self.v, self.scale)
            if found is None:
                return None
            out, lse = found
        else:
            out = self.v.new_zeros(*self.q.shape[:3], self.v.shape[-1])
            lse = wide(self.q.new_empty(0)).new_full(self.q.shape[:3], math.inf)
            for (start, stop), prompts in mask.spans.items():
                if stop == start:
                    continue
                q, k, v = (x[prompts, :, start:stop] for x in (self.q, self.k, self.v))
                found = flash_attention(q, k, v, self.scale)
                if found is None:
                    return None
                out[prompts, :, start:stop], lse[prompts, :, start:stop] = found
        if self.sinks is not None:
            own = lse
            lse = torch.logaddexp(lse, self.sinks.detach().to(lse)[:, None])
            out = out * (own - lse).nan_to_num(0).exp()[..., None].to(out.dtype)
        self.way = "flash"
        return out, lse

    def _by_blocks(self) -> tuple[Tensor, Tensor]:
        heads = range(self.q.shape[1])
        outs, lses = [], []
        for rows, reach in self.blocks():
            logits = self.dense(heads, rows[None, None], reach)
            lse = self.log_sum(logits, heads)
            outs.append((logits - lse[..., None]).exp() @ wide(self.v[..., slice(*reach), :]))
            lses.append(lse)
        self.way = "blocks"
        return torch.cat(outs, dim=-2), torch.cat(lses, dim=-1)

    def blocks(self) -> list[tuple[Tensor, tuple[int, int]]]:
        """Rows of each block, and the key columns (start, stop) that they may read."""
        mask = self.mask
        size = max(16, min(512, BLOCK_ENTRIES // (mask.batch * self.q.shape[1] * mask.n_keys)))
        found = []
        for start in range(0, mask.n_queries, size):
            stop = min(start + size, mask.n_queries)
            first = 0 if mask.window is None else mask.past + start - mask.window + 1
            last = mask.past + stop if mask.causal else mask.n_keys
            rows = torch.arange(start, stop, device=self.q.device)
            found.append((rows, (max(first, 0), last)))
        return found

    def dense(
        self, heads: Sequence[int], rows: Int[Tensor, "#batch #own row"], reach: tuple[int, int]
    ) -> Float[Tensor, "batch own row key"]:
        """Unchanged logits of some rows over the key columns `reach`; −inf where masked."""
        q, k = self.of(self.q, heads), self.of(self.k, heads)[..., slice(*reach), :]
        if rows.shape[0] == rows.shape[1] == 1:
            q = q[:, :, rows[0, 0]]
        else:
            q = q.gather(2, rows[..., None].expand(*rows.shape, q.shape[-1]))
        logits = self._capped(wide(q) @ wide(k).mT)
        columns = torch.arange(*reach, device=q.device)
        return logits.masked_fill(
            ~self.mask.at(rows[..., None], columns[None, None, None]), -math.inf
        )

    def log_sum(self, logits: Tensor, heads: Sequence[int]) -> Tensor:
        """Log-sum-exp of whole rows, the sink included; +inf for a row without keys."""
        lse = logits.logsumexp(-1)
        empty = lse == -math.inf
        if logits.requires_grad:  # a row of −inf alone would have a gradient of NaN
            lse = logits.masked_fill(empty.detach()[..., None], 0).logsumexp(-1)
        if self.sinks is not None:
            lse = torch.logaddexp(lse, self.of(self.sinks[None], heads)[0].to(lse)[:, None])
        return lse.masked_fill(empty, math.inf)

    def under_gradients(self) -> bool:
        """Whether autograd follows this attention."""
        parts = (self.q, self.k, self.v, self.sinks)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in parts)

    def of(self, x: Tensor, heads: Sequence[int]) -> Tensor:
        """The part of some heads, on axis 1; a view where that is all of them."""
        return x if len(heads) == x.shape[1] else x[:, list(heads)]


def _bands(offsets: Sequence[int], gap: int = 64) -> list[list[int]]:
    """Offsets in runs without a gap larger than `gap`."""
    found: list[list[int]] = []
    for offset in offsets:
        if found and offset - found[-1][-1] <= gap:
            found[-1].append(offset)
        else:
            found.append([offset])
    return found


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def widest(device: torch.device) -> torch.dtype:
    """float64, but on MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64
