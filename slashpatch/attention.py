"""Softmax attention of one layer whose matrix is never formed.

Outputs come from flash attention with the log-sum-exp of each row, or from blocks of rows where
that cannot be exact (windows, soft-capping, masks of other kinds, few queries after many keys).
From the log-sum-exp, any entry of the pattern is one dot product away:
S[i, i−Δ] = exp(logit(i, i−Δ) − LSE_i).

Changes to diagonals are closed form (ours): O' = (O + Σ_Δ (g−1) p_Δ v_{i−Δ}) / (1 + Σ_Δ (g−1) p_Δ)
with g the factor on exp(logit). Rows whose denominator is small are computed afresh.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .diagonals import (
    DiagonalChange,
    band_of_products,
    diagonal_sums,
    lagged_products,
    shifted,
    total_at,
)
from .flash import flash_attention

#: Entries that a block of rows may hold, over prompts and heads.
_BLOCK_ENTRIES = 2**23
#: Rows of a band of diagonals at a time: what fits the cache.
_CHUNK = 512
#: Below this share of a row that an edit leaves, dividing by it would lose digits.
_SMALL = 0.25
#: A larger addition to a logit may overflow as a factor.
_LARGEST_AMOUNT = 40.0
#: More offsets than this are cheaper by whole rows.
_MOST_OFFSETS = 96


@dataclass(frozen=True)
class Mask:
    """Which keys each new token may read: a rule instead of a matrix.

    Keys are the tokens from `first_key` on; the new tokens are the last `n_queries` of them.

    Attributes:
        allows: From index tensors (prompt, query token, key token) that broadcast, whether the key
            may be read; padding apart.
        causal: Whether no key after the query is ever allowed.
        window: Keys from this many tokens back are not allowed; None without a window.
        plain: Whether every key up to the query is allowed, padding apart.
        real: Key columns that are no padding, or None when all are.
    """

    allows: Callable[[Tensor, Tensor, Tensor], Tensor]
    batch: int
    n_queries: int
    n_keys: int
    first_key: int
    causal: bool
    window: int | None
    plain: bool
    real: Bool[Tensor, "batch key"] | None
    device: torch.device

    @property
    def past(self) -> int:
        """Key columns before the first new token."""
        return self.n_keys - self.n_queries

    def at(
        self,
        rows: Int[Tensor, "#batch #head row 1"],
        columns: Int[Tensor, "#batch #head #row col"],
    ) -> Bool[Tensor, "batch #head row col"]:
        """Whether row `rows` may read key column `columns`; index tensors that broadcast."""
        prompt = torch.arange(self.batch, device=rows.device)[:, None, None, None]
        inside = (columns >= 0) & (columns < self.n_keys)
        kept = columns.clamp(0, self.n_keys - 1)
        query, key = rows + self.past + self.first_key, kept + self.first_key
        allowed = inside & self.allows(prompt, query, key)
        if self.real is not None:
            allowed = allowed & self.real.to(rows.device)[prompt, kept]
        return allowed.expand(self.batch, -1, -1, -1)

    @cached_property
    def spans(self) -> dict[tuple[int, int], list[int]] | None:
        """Prompts by the columns (start, stop) of their tokens; None if one has a gap."""
        if self.real is None:
            return {(0, self.n_keys): list(range(self.batch))}
        found: dict[tuple[int, int], list[int]] = {}
        counts, firsts = self.real.sum(1).tolist(), self.real.int().argmax(1).tolist()
        for prompt, (count, first) in enumerate(zip(counts, firsts, strict=True)):
            if not bool(self.real[prompt, first : first + count].all()):
                return None
            found.setdefault((first, first + count), []).append(prompt)
        return found


def causal_mask(
    n_queries: int, n_keys: int, batch: int = 1, real: Tensor | None = None, device: str = "cpu"
) -> Mask:
    """Plain causal attention of the last `n_queries` of `n_keys` tokens."""
    return Mask(
        lambda prompt, query, key: key <= query,
        batch,
        n_queries,
        n_keys,
        0,
        True,
        None,
        True,
        real,
        torch.device(device),
    )


class Attention:
    """Attention of one layer in one pass, from rotated queries and keys of every query head.

    Changes and keys of a head's own are noted first; `output`, `weights` and `offset_sums` take
    them into account. logit = scale · q·k, soft-capped if `softcap` says so; a sink is one more
    logit of each row, whose share is written nowhere.
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
        self._changes: dict[int, tuple[DiagonalChange, ...]] = {}
        self._base: tuple[Tensor, Tensor] | None = None
        self._edited: tuple[Tensor, Tensor] | None = None

    def change(self, heads: Sequence[int], change: DiagonalChange) -> None:
        """Change diagonals of some heads, after the changes noted so far."""
        for head in heads:
            self._changes[head] = (*self._changes.get(head, ()), change)
        self._edited = None

    def set_keys(self, heads: Sequence[int], keys: Float[Tensor, "batch key own d_head"]) -> None:
        """Give some heads rotated keys of their own."""
        self.k = self.k.clone()
        self.k[:, list(heads)] = keys.transpose(1, 2).to(self.k.dtype)
        self._base = self._edited = None

    def output(self) -> Float[Tensor, "batch head query d_head"]:
        """Each head's output, in the dtype of the values."""
        return self._after_changes()[0].to(self.v.dtype)

    def logits(self, offsets: Sequence[int]) -> Float[Tensor, "batch head query offset"]:
        """Logits i → i−Δ, changed; −inf where there is no key to read."""
        return torch.cat([self._logits(offsets, *rows) for rows in self._chunks()], dim=-2)

    def weights(self, offsets: Sequence[int]) -> Float[Tensor, "batch head query offset"]:
        """Attention i → i−Δ after the softmax and after all changes; 0 where there is no key."""
        return torch.cat([self._weights(offsets, *rows) for rows in self._chunks()], dim=-2)

    def _logits(self, offsets: Sequence[int], start: int, stop: int) -> Tensor:
        every = range(self.q.shape[1])
        return self._changed_at(self._own_logits(every, offsets, start, stop), "scores", offsets)

    def _weights(self, offsets: Sequence[int], start: int, stop: int) -> Tensor:
        lse = self._after_changes()[1].detach()
        found = self._logits(offsets, start, stop).sub_(lse[:, :, start:stop, None])
        # A weight is at most 1, whatever the two roundings of its logit say.
        return self._changed_at(found.clamp_(max=0).exp_(), "pattern", offsets)

    def logit_sums(
        self, n_offsets: int, real: Bool[Tensor, "batch key"]
    ) -> Float[Tensor, "batch head offset"] | None:
        """Sum of logits i → i−Δ for Δ < n_offsets over real tokens i and i−Δ, or None.

        None where the sum of products would not tell: soft-capped, changed, masked by more than
        causality, or with keys before the first query.
        """
        if self._changes or self.softcap is not None or self.mask.past or not self.mask.plain:
            return None
        q, k = _wide(self.q.detach()), _wide(self.k.detach())
        if not bool(real.all()):
            padding = ~real.to(q.device)[:, None, :, None]
            q, k = q.masked_fill(padding, 0), k.masked_fill(padding, 0)
        return self.scale * lagged_products(q, k, n_offsets)

    def weight_sums(
        self, offsets: Sequence[int], rows: Bool[Tensor, "batch query"] | None
    ) -> Float[Tensor, "batch head offset"]:
        """Sum of `weights` over the queries that `rows` names, float64 (float32 on MPS)."""
        if len(offsets) <= _MOST_OFFSETS:
            shape = (*self.q.shape[:2], len(offsets))
            total = torch.zeros(shape, dtype=_widest(self.q.device), device=self.q.device)
            for start, stop in self._chunks():
                found = self._weights(offsets, start, stop)
                if rows is not None:
                    found.masked_fill_(~rows[:, None, start:stop, None].to(found.device), 0)
                total += found.sum(-2, dtype=total.dtype)
            return total
        sums = self._all_sums(rows)
        sums = torch.nn.functional.pad(sums, (0, max(0, max(offsets) + 1 - sums.shape[-1])))
        return sums[..., torch.tensor(offsets, device=sums.device)]

    def matrix(self, stage: str) -> Float[Tensor, "batch head query key"]:
        """The whole changed matrix of "scores" or "pattern": the dense reference."""
        every = torch.arange(self.mask.n_queries, device=self.q.device)[None, None]
        logits = self._dense(range(self.q.shape[1]), every, (0, self.mask.n_keys))
        past = self.mask.past
        for heads, changes in self._groups():
            part = logits[:, heads]
            for change in changes:
                part = change.on_matrix(part, past) if change.stage == "scores" else part
            logits[:, heads] = part
        if stage == "scores":
            return logits
        lse = self._log_sum(logits, range(self.q.shape[1]))
        pattern = (logits - lse[..., None]).exp()
        for heads, changes in self._groups():
            part = pattern[:, heads]
            for change in changes:
                part = change.on_matrix(part, past) if change.stage == "pattern" else part
            pattern[:, heads] = part
        return pattern

    # --- without changes ---------------------------------------------------------------------

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """Rows in runs that stay in the processor's cache."""
        for start in range(0, self.mask.n_queries, _CHUNK):
            yield start, min(start + _CHUNK, self.mask.n_queries)

    def _own_logits(
        self, heads: Sequence[int], offsets: Sequence[int], start: int, stop: int
    ) -> Float[Tensor, "batch own row offset"]:
        """Unchanged logits i → i−Δ of some rows, float32 or wider; −inf without a key to read."""
        past = self.mask.past
        q = _wide(self._of(self.q, heads)[:, :, start:stop].detach())
        first = max(0, past + start - offsets[-1])
        k = _wide(self._of(self.k, heads)[:, :, first : past + stop].detach())
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

    def _without_changes(self) -> tuple[Tensor, Tensor]:
        if self._base is None:
            self._base = self._by_flash() or self._by_blocks()
        return self._base

    def _by_flash(self) -> tuple[Tensor, Tensor] | None:
        mask = self.mask
        if not mask.plain or mask.past or self.softcap is not None or mask.spans is None:
            return None
        if len(mask.spans) == 1 and (0, mask.n_keys) in mask.spans:
            found = flash_attention(self.q, self.k, self.v, self.scale)
            if found is None:
                return None
            out, lse = found
        else:
            out = self.v.new_zeros(*self.q.shape[:3], self.v.shape[-1])
            lse = _wide(self.q.new_empty(0)).new_full(self.q.shape[:3], math.inf)
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
        for rows, reach in self._blocks():
            logits = self._dense(heads, rows[None, None], reach)
            lse = self._log_sum(logits, heads)
            outs.append((logits - lse[..., None]).exp() @ _wide(self.v[..., slice(*reach), :]))
            lses.append(lse)
        self.way = "blocks"
        return torch.cat(outs, dim=-2), torch.cat(lses, dim=-1)

    def _blocks(self, n_heads: int | None = None) -> list[tuple[Tensor, tuple[int, int]]]:
        """Rows of each block, and the key columns (start, stop) that they may read."""
        mask, n_heads = self.mask, n_heads or self.q.shape[1]
        size = max(16, min(512, _BLOCK_ENTRIES // (mask.batch * n_heads * mask.n_keys)))
        found = []
        for start in range(0, mask.n_queries, size):
            stop = min(start + size, mask.n_queries)
            first = 0 if mask.window is None else mask.past + start - mask.window + 1
            last = mask.past + stop if mask.causal else mask.n_keys
            rows = torch.arange(start, stop, device=self.q.device)
            found.append((rows, (max(first, 0), last)))
        return found

    def _dense(
        self, heads: Sequence[int], rows: Int[Tensor, "#batch #own row"], reach: tuple[int, int]
    ) -> Float[Tensor, "batch own row key"]:
        """Unchanged logits of some rows over the key columns `reach`; −inf where masked."""
        q, k = self._of(self.q, heads), self._of(self.k, heads)[..., slice(*reach), :]
        if rows.shape[0] == rows.shape[1] == 1:
            q = q[:, :, rows[0, 0]]
        else:
            q = q.gather(2, rows[..., None].expand(*rows.shape, q.shape[-1]))
        logits = self._capped(_wide(q) @ _wide(k).mT)
        columns = torch.arange(*reach, device=q.device)
        return logits.masked_fill(
            ~self.mask.at(rows[..., None], columns[None, None, None]), -math.inf
        )

    def _log_sum(self, logits: Tensor, heads: Sequence[int]) -> Tensor:
        """Log-sum-exp of whole rows, the sink included; +inf for a row without keys."""
        if logits.requires_grad:  # a row of −inf alone would have a gradient of NaN
            empty = (logits == -math.inf).all(-1)
            filled = logits.masked_fill(empty[..., None], 0)
            lse = filled.logsumexp(-1).masked_fill(empty, -math.inf)
        else:
            lse = logits.logsumexp(-1)
        if self.sinks is not None:
            lse = torch.logaddexp(lse, self._of(self.sinks[None], heads)[0].to(lse)[:, None])
        return lse.masked_fill(lse == -math.inf, math.inf)

    def _of(self, x: Tensor, heads: Sequence[int]) -> Tensor:
        return x if len(heads) == x.shape[1] else x[:, list(heads)]

    # --- with changes ------------------------------------------------------------------------

    def _groups(self) -> list[tuple[list[int], tuple[DiagonalChange, ...]]]:
        """Heads that share their changes."""
        found: dict[tuple[DiagonalChange, ...], list[int]] = {}
        for head, changes in sorted(self._changes.items()):
            found.setdefault(changes, []).append(head)
        return [(heads, changes) for changes, heads in found.items()]

    def _changed_at(self, at: Tensor, stage: str, offsets: Sequence[int]) -> Tensor:
        every = torch.tensor(offsets, device=at.device)
        for heads, changes in self._groups():
            total = total_at(changes, stage, every).to(at.dtype)
            part = at[:, heads]
            at[:, heads] = part + total if stage == "scores" else part * total
        return at

    def _after_changes(self) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp after all changes."""
        if self._edited is None:
            out, lse = self._without_changes()
            if self._changes:
                out, lse = out.clone(), lse.clone()
            for heads, changes in self._groups():
                part = self._group(heads, changes, out[:, heads], lse[:, heads])
                out[:, heads], lse[:, heads] = part[0].to(out.dtype), part[1]
            self._edited = out, lse
        return self._edited

    def _group(
        self, heads: list[int], changes: tuple[DiagonalChange, ...], out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        offsets = tuple(sorted({offset for change in changes for offset in change.offsets}))
        # Gradients would miss the log-sum-exp; low precision would be divided by small numbers.
        narrow = self.q.dtype in (torch.float16, torch.bfloat16)
        graph = torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v))
        at = torch.tensor(offsets, device=self.q.device)
        on_scores, on_pattern = (
            total_at(changes, stage, at).to(lse.dtype) for stage in ("scores", "pattern")
        )
        far = len(offsets) > _MOST_OFFSETS or float(on_scores.max()) > _LARGEST_AMOUNT
        if far or narrow or graph:
            every = torch.arange(self.mask.n_queries, device=self.q.device)
            return self._afresh(heads, changes, every[None, None])
        only = [stage for stage in ("scores", "pattern") if _rest_removed(changes, stage)]
        outs, lses = [], []
        for start, stop in self._chunks():
            own_out, own_lse = out[:, :, start:stop], lse[:, :, start:stop]
            logits = self._own_logits(heads, offsets, start, stop)
            changed = logits + on_scores
            if "scores" in only:
                new_lse = self._log_sum(changed, heads)
                share = (changed - new_lse[..., None]).exp()
                new_out = self._mix(share, heads, offsets, start, stop)
            else:
                added = (logits - own_lse[..., None]).exp() * on_scores.exp().sub(1)
                left = 1 + added.sum(-1)
                new_lse = own_lse + left.log()
                mixed = self._mix(added, heads, offsets, start, stop)
                new_out = (own_out + mixed) / left[..., None]
                small = (left < _SMALL) & own_lse.isfinite()
                if bool(small.any()):
                    new_out, new_lse = self._replace(heads, changes, small, new_out, new_lse, start)
            if any(change.stage == "pattern" for change in changes):
                share = (changed - new_lse[..., None]).exp()
                if "pattern" in only:
                    new_out = self._mix(share * on_pattern, heads, offsets, start, stop)
                else:
                    taken = share * (on_pattern - 1)
                    new_out = new_out + self._mix(taken, heads, offsets, start, stop)
            outs.append(new_out)
            lses.append(new_lse)
        return torch.cat(outs, dim=-2), torch.cat(lses, dim=-1)

    def _mix(
        self,
        weights: Float[Tensor, "batch own row offset"],
        heads: Sequence[int],
        offsets: Sequence[int],
        start: int,
        stop: int,
    ) -> Float[Tensor, "batch own row d_head"]:
        """Σ_Δ weight_Δ · v_{i−Δ} of some rows."""
        v = _wide(self._of(self.v, heads)[:, :, : self.mask.past + stop])
        total = v.new_zeros(*weights.shape[:3], v.shape[-1])
        for column, offset in enumerate(offsets):
            total.addcmul_(weights[..., column, None], shifted(v, offset, stop - start))
        return total

    def _replace(
        self,
        heads: list[int],
        changes: tuple[DiagonalChange, ...],
        chosen: Bool[Tensor, "batch own row"],
        out: Tensor,
        lse: Tensor,
        start: int,
    ) -> tuple[Tensor, Tensor]:
        """Rows that `chosen` names, counted from `start`, afresh; before changes of the pattern."""
        most = int(chosen.sum(-1).max())
        rows = chosen.int().topk(most, dim=-1).indices
        scores = tuple(change for change in changes if change.stage == "scores")
        new_out, new_lse = self._afresh(heads, scores, rows + start)
        keep = chosen.gather(-1, rows)  # heads with fewer such rows get others too
        wide = rows[..., None].expand(*rows.shape, out.shape[-1])
        new_out = torch.where(keep[..., None], new_out.to(out.dtype), out.gather(2, wide))
        new_lse = torch.where(keep, new_lse, lse.gather(2, rows))
        return out.scatter(2, wide, new_out), lse.scatter(2, rows, new_lse)

    def _afresh(
        self,
        heads: list[int],
        changes: tuple[DiagonalChange, ...],
        rows: Int[Tensor, "#batch #own row"],
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of some rows, by dense rows, a few at a time."""
        mask, n_rows = self.mask, rows.shape[-1]
        size = max(1, _BLOCK_ENTRIES // (mask.batch * len(heads) * mask.n_keys))
        v = _wide(self._of(self.v, heads))
        columns = torch.arange(mask.n_keys, device=rows.device)
        outs, lses = [], []
        for start in range(0, n_rows, size):
            part = rows[..., start : start + size]
            logits = self._dense(heads, part, (0, mask.n_keys))
            offsets = part[..., None] + mask.past - columns
            logits = logits + total_at(changes, "scores", offsets).to(logits.dtype)
            lse = self._log_sum(logits, heads)
            weights = (logits - lse[..., None]).exp()
            if any(change.stage == "pattern" for change in changes):
                weights = weights * total_at(changes, "pattern", offsets).to(weights.dtype)
            outs.append(weights @ v)
            lses.append(lse)
        return torch.cat(outs, dim=-2), torch.cat(lses, dim=-1)

    def _all_sums(self, rows: Tensor | None) -> Float[Tensor, "batch head offset"]:
        """Sums of the changed pattern along every diagonal, by blocks of rows."""
        mask, heads = self.mask, range(self.q.shape[1])
        lse = self._after_changes()[1].detach()
        if rows is not None:
            lse = lse.masked_fill(~rows.to(lse.device)[:, None], math.inf)
        q, k = _wide(self.q.detach()), _wide(self.k.detach())
        sums = torch.zeros(
            mask.batch, len(heads), mask.n_keys, dtype=_widest(q.device), device=q.device
        )
        simple = mask.plain and mask.real is None
        for block, _ in self._blocks():
            first, last = int(block[0]), int(block[-1]) + 1
            n_keys = mask.past + last
            if simple:
                # Entries in the future are never read, so they need no mask.
                logits = self._capped(q[:, :, first:last] @ k[:, :, :n_keys].mT)
            else:
                logits = self._dense(heads, block[None, None], (0, n_keys)).detach()
            past = mask.past + first
            for own, changes in self._groups():
                part = logits[:, own]
                for change in changes:
                    part = change.on_matrix(part, past) if change.stage == "scores" else part
                logits[:, own] = part
            pattern = logits.sub_(lse[:, :, first:last, None]).exp_()
            for own, changes in self._groups():
                part = pattern[:, own]
                for change in changes:
                    part = change.on_matrix(part, past) if change.stage == "pattern" else part
                pattern[:, own] = part
            found = diagonal_sums(pattern, past)
            sums[..., : found.shape[-1]] += found
        return sums


def _rest_removed(changes: Sequence[DiagonalChange], stage: str) -> bool:
    return any(change.removes_the_rest for change in changes if change.stage == stage)


def _bands(offsets: Sequence[int], gap: int = 64) -> list[list[int]]:
    """Offsets in runs without a gap larger than `gap`."""
    found: list[list[int]] = []
    for offset in offsets:
        if found and offset - found[-1][-1] <= gap:
            found[-1].append(offset)
        else:
            found.append([offset])
    return found


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _widest(device: torch.device) -> torch.dtype:
    """float64, but on MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64
