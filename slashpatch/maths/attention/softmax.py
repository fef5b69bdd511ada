"""Softmax attention of one layer, without forming its query × key matrix.

The output and the log-sum-exp LSE_i of each row come from flash attention, or from blocks of rows
where flash attention is not exact or not available: sliding windows, soft-capping, masks that are
not causal, new tokens after cached ones. With LSE_i, any entry of the pattern costs one dot
product: S[i, i−Δ] = exp(logit(i, i−Δ) − LSE_i).
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

#: Largest number of logits in a block of rows, over all prompts and heads.
BLOCK_ENTRIES = 2**23
#: Rows processed at a time when diagonals are computed, so that they stay in the CPU cache.
_CHUNK = 512


class Attention:
    """Attention of one layer in one forward pass.

    Attributes:
        q: Queries after RoPE.
        k: Keys after RoPE, one for each query head also under grouped-query attention.
        v: Values, one for each query head.
        mask: Which keys each query may attend to.
        scale: Factor on q·k.
        softcap: Gemma 2's cap c on logits, c · tanh(logit / c); None without a cap.
        sinks: One more logit in each row's softmax, whose weight reads no value (GPT-OSS); None
            without sinks.
        computed_by: How `result` was computed: "flash" or "blocks" (of rows); "" before.
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
        self.computed_by = ""
        self._result: tuple[Tensor, Tensor] | None = None

    def set_keys(self, heads: Sequence[int], keys: Float[Tensor, "batch key head d_head"]) -> None:
        """Replace the keys of some heads by per-head keys, after RoPE."""
        self.k = self.k.clone()
        self.k[:, list(heads)] = keys.transpose(1, 2).to(self.k.dtype)
        self._forget_result()

    def set_sinks(self, sinks: Float[Tensor, "head"]) -> None:
        """Add a sink to the softmax of each row."""
        self.sinks = sinks
        self._forget_result()

    def _forget_result(self) -> None:
        self._result = None

    def logit_sums(
        self, n_offsets: int, real: Bool[Tensor, "batch key"]
    ) -> Float[Tensor, "batch head offset"] | None:
        """Return the sum of logits i → i−Δ over real (unpadded) tokens, for Δ < n_offsets.

        None where a sum of products q·k is not the answer: with soft-capping, with a mask that is
        not just causal, or with cached keys.
        """
        if self.softcap is not None or self.mask.past or not self.mask.plain:
            return None
        q, k = at_least_float32(self.q.detach()), at_least_float32(self.k.detach())
        if not bool(real.all()):
            padding = ~real.to(q.device)[:, None, :, None]
            q, k = q.masked_fill(padding, 0), k.masked_fill(padding, 0)
        return self.scale * lagged_products(q, k, n_offsets)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of consecutive rows that fit the CPU cache."""
        for start in range(0, self.mask.n_queries, _CHUNK):
            yield start, min(start + _CHUNK, self.mask.n_queries)

    def unchanged_logits(
        self, heads: Sequence[int], offsets: Sequence[int], start: int, stop: int
    ) -> Float[Tensor, "batch head row offset"]:
        """Return logits i → i−Δ of some rows, before any edit; −inf where no key may be read.

        `offsets` must be sorted. The result is float32 or wider.
        """
        past = self.mask.past
        q = at_least_float32(self.of_heads(self.q, heads)[:, :, start:stop].detach())
        first = max(0, past + start - offsets[-1])
        k = at_least_float32(self.of_heads(self.k, heads)[:, :, first : past + stop].detach())
        parts = []
        for band in _bands(offsets):
            products = band_of_products(q, k, band[0], band[-1] - band[0] + 1)
            if len(band) < products.shape[-1]:
                products = products[..., [offset - band[0] for offset in band]]
            parts.append(products)
        logits = self._capped(torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0])
        if self.mask.plain and self.mask.real is None:
            stop = min(stop, max(start, offsets[-1] - past))  # all later rows have these keys
        rows = torch.arange(start, stop, device=q.device)
        columns = rows[:, None] + past - torch.tensor(offsets, device=q.device)
        allowed = self.mask.at(rows[None, None, :, None], columns[None, None])
        logits[:, :, : stop - start].masked_fill_(~allowed, -math.inf)
        return logits

    def _capped(self, products: Tensor) -> Tensor:
        logits = products * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits)

    def result(
        self,
    ) -> tuple[Float[Tensor, "batch head query d_head"], Float[Tensor, "batch head query"]]:
        """Return the output and the log-sum-exp of each row (sinks included); computed once."""
        if self._result is None:
            self._result = self._by_flash() or self._by_blocks()
        return self._result

    def _by_flash(self) -> tuple[Tensor, Tensor] | None:
        mask = self.mask
        if not mask.plain or mask.past or self.softcap is not None or mask.spans is None:
            return None
        if self.sinks is not None and self.under_gradients():
            return None  # gradients do not flow through the log-sum-exp, nor through the sink
        if len(mask.spans) == 1 and (0, mask.n_keys) in mask.spans:
            result = flash_attention(self.q, self.k, self.v, self.scale)
            if result is None:
                return None
            out, lse = result
        else:
            out = self.v.new_zeros(*self.q.shape[:3], self.v.shape[-1])
            lse = at_least_float32(self.q.new_empty(0)).new_full(self.q.shape[:3], math.inf)
            for (start, stop), prompts in mask.spans.items():
                if stop == start:
                    continue
                q, k, v = (x[prompts, :, start:stop] for x in (self.q, self.k, self.v))
                result = flash_attention(q, k, v, self.scale)
                if result is None:
                    return None
                out[prompts, :, start:stop], lse[prompts, :, start:stop] = result
        if self.sinks is not None:
            without_sink = lse
            lse = torch.logaddexp(lse, self.sinks.detach().to(lse)[:, None])
            out = out * (without_sink - lse).nan_to_num(0).exp()[..., None].to(out.dtype)
        self.computed_by = "flash"
        return out, lse

    def _by_blocks(self) -> tuple[Tensor, Tensor]:
        heads = range(self.q.shape[1])
        outs, lses = [], []
        for rows, reach in self.blocks():
            logits = self.dense_logits(heads, rows[None, None], reach)
            lse = self.log_sum_exp(logits, heads)
            outs.append(
                (logits - lse[..., None]).exp() @ at_least_float32(self.v[..., slice(*reach), :])
            )
            lses.append(lse)
        self.computed_by = "blocks"
        return torch.cat(outs, dim=-2), torch.cat(lses, dim=-1)

    def blocks(self) -> list[tuple[Tensor, tuple[int, int]]]:
        """Return blocks of rows, each with the key columns (start, stop) that it may attend to."""
        mask = self.mask
        size = max(16, min(512, BLOCK_ENTRIES // (mask.batch * self.q.shape[1] * mask.n_keys)))
        blocks = []
        for start in range(0, mask.n_queries, size):
            stop = min(start + size, mask.n_queries)
            first = 0 if mask.window is None else mask.past + start - mask.window + 1
            last = mask.past + stop if mask.causal else mask.n_keys
            rows = torch.arange(start, stop, device=self.q.device)
            blocks.append((rows, (max(first, 0), last)))
        return blocks

    def dense_logits(
        self, heads: Sequence[int], rows: Int[Tensor, "#batch #head row"], reach: tuple[int, int]
    ) -> Float[Tensor, "batch head row key"]:
        """Return unedited logits of some rows over key columns `reach`; −inf where masked."""
        q, k = self.of_heads(self.q, heads), self.of_heads(self.k, heads)[..., slice(*reach), :]
        if rows.shape[0] == rows.shape[1] == 1:
            q = q[:, :, rows[0, 0]]
        else:
            q = q.gather(2, rows[..., None].expand(*rows.shape, q.shape[-1]))
        logits = self._capped(at_least_float32(q) @ at_least_float32(k).mT)
        columns = torch.arange(*reach, device=q.device)
        return logits.masked_fill(
            ~self.mask.at(rows[..., None], columns[None, None, None]), -math.inf
        )

    def log_sum_exp(self, logits: Tensor, heads: Sequence[int]) -> Tensor:
        """Return the log-sum-exp of whole rows, sinks included; +inf for a row without keys."""
        lse = logits.logsumexp(-1)
        empty = lse == -math.inf
        if logits.requires_grad:  # the gradient of a row of −inf would be NaN
            lse = logits.masked_fill(empty.detach()[..., None], 0).logsumexp(-1)
        if self.sinks is not None:
            lse = torch.logaddexp(lse, self.of_heads(self.sinks[None], heads)[0].to(lse)[:, None])
        return lse.masked_fill(empty, math.inf)

    def under_gradients(self) -> bool:
        """Return whether autograd records this attention."""
        parts = (self.q, self.k, self.v, self.sinks)
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in parts)

    def of_heads(self, x: Tensor, heads: Sequence[int]) -> Tensor:
        """Return some heads of a tensor with heads on axis 1; the tensor itself for all heads."""
        return x if len(heads) == x.shape[1] else x[:, list(heads)]


def _bands(offsets: Sequence[int], gap: int = 64) -> list[list[int]]:
    """Split sorted offsets where two neighbours are more than `gap` apart."""
    bands: list[list[int]] = []
    for offset in offsets:
        if bands and offset - bands[-1][-1] <= gap:
            bands[-1].append(offset)
        else:
            bands.append([offset])
    return bands


def at_least_float32(x: Tensor) -> Tensor:
    """Return a half-precision tensor as float32; others unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which sums are kept: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
