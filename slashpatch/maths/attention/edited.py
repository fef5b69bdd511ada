"""Attention with edited diagonals, without forming its query × key matrix.

Closed form (ours): O' = (O + Σ_Δ (g−1) p_Δ v_{i−Δ}) / (1 + Σ_Δ (g−1) p_Δ), where p_Δ is the
attention i → i−Δ and g the factor on exp(logit). Rows with a small denominator are recomputed from
their logits. So are all rows in half precision, and where gradients are needed, because gradients
do not flow through the log-sum-exp.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..diagonals import DiagonalChange, diagonal_sums, shifted, total_at
from .row_changes import change_rows, rest_removed
from .softmax import BLOCK_ENTRIES, Attention, at_least_float32, sum_dtype

#: Where an edit leaves less than this share of a row's weight, dividing by it would lose digits.
_SMALL = 0.25
#: exp() of a larger addition to a logit may overflow.
_LARGEST_AMOUNT = 40.0
#: Above this many offsets, computing whole rows is faster than single diagonals.
_MOST_OFFSETS = 96


class EditedAttention(Attention):
    """Attention with changes of some heads' diagonals (`change`) or keys (`set_keys`).

    Record these first; `output`, `logits` and the rest take them into account.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._changes: dict[int, tuple[DiagonalChange, ...]] = {}
        self._edited: tuple[Tensor, Tensor] | None = None

    def copy(self) -> EditedAttention:
        """Return a copy to which further changes can be made; the unchanged result is shared."""
        self.result()
        copied = copy.copy(self)
        copied._changes = dict(self._changes)
        return copied

    def change(self, heads: Sequence[int], change: DiagonalChange) -> None:
        """Record a change of some heads' diagonals, to be applied after those recorded before."""
        for head in heads:
            self._changes[head] = (*self._changes.get(head, ()), change)
        self._edited = None

    def _forget_result(self) -> None:
        super()._forget_result()
        self._edited = None

    def logit_sums(
        self, n_offsets: int, real: Bool[Tensor, "batch key"]
    ) -> Float[Tensor, "batch head offset"] | None:
        """Return the sums of `Attention.logit_sums`, or None where diagonals are changed."""
        return None if self._changes else super().logit_sums(n_offsets, real)

    def output(self) -> Float[Tensor, "batch head query d_head"]:
        """Return each head's output z, in the dtype of the values."""
        return self._after_changes()[0].to(self.v.dtype)

    def logits(self, offsets: Sequence[int]) -> Float[Tensor, "batch head query offset"]:
        """Return the changed logits i → i−Δ; −inf where that key is masked or does not exist.

        A row in which the changes remove every key keeps its unchanged logits, as it does where an
        edit works on the matrix.
        """
        if self._changes:
            return self._with_emptied_rows(offsets)
        return torch.cat([self._logits(offsets, *rows) for rows in self.chunks()], dim=-2)

    def weights(self, offsets: Sequence[int]) -> Float[Tensor, "batch head query offset"]:
        """Return attention i → i−Δ after the softmax and all changes; 0 where there is no key."""
        return torch.cat([self._weights(offsets, *rows) for rows in self.chunks()], dim=-2)

    def _logits(self, offsets: Sequence[int], start: int, stop: int) -> Tensor:
        heads = range(self.q.shape[1])
        return self._changed_at(
            self.unchanged_logits(heads, offsets, start, stop), "scores", offsets
        )

    def _with_emptied_rows(self, offsets: Sequence[int]) -> Tensor:
        """Return changed logits, but unchanged ones in rows where the changes remove every key."""
        lse, before = self._after_changes()[1], self.result()[1]
        emptied = ((lse == math.inf) & (before < math.inf))[..., None]
        heads = range(self.q.shape[1])
        return torch.cat(
            [
                torch.where(
                    emptied[:, :, start:stop],
                    self.unchanged_logits(heads, offsets, start, stop),
                    self._logits(offsets, start, stop),
                )
                for start, stop in self.chunks()
            ],
            dim=-2,
        )

    def _weights(self, offsets: Sequence[int], start: int, stop: int) -> Tensor:
        lse = self._after_changes()[1].detach()
        logs = self._logits(offsets, start, stop).sub_(lse[:, :, start:stop, None])
        # Rounding of logit and log-sum-exp could make a weight slightly larger than 1.
        return self._changed_at(logs.clamp_(max=0).exp_(), "pattern", offsets)

    def weight_sums(
        self, offsets: Sequence[int], rows: Bool[Tensor, "batch query"] | None
    ) -> Float[Tensor, "batch head offset"]:
        """Return sums of `weights` where `rows` is True (None: all); float64 (float32 on MPS)."""
        if len(offsets) <= _MOST_OFFSETS:
            shape = (*self.q.shape[:2], len(offsets))
            total = torch.zeros(shape, dtype=sum_dtype(self.q.device), device=self.q.device)
            for start, stop in self.chunks():
                weights = self._weights(offsets, start, stop)
                if rows is not None:
                    weights.masked_fill_(~rows[:, None, start:stop, None].to(weights.device), 0)
                total += weights.sum(-2, dtype=total.dtype)
            return total
        sums = self._sums_by_blocks(rows)
        sums = torch.nn.functional.pad(sums, (0, max(0, max(offsets) + 1 - sums.shape[-1])))
        return sums[..., torch.tensor(offsets, device=sums.device)]

    def _changed_matrix(
        self,
        matrix: Float[Tensor, "batch head row key"],
        stage: str,
        past: int,
        heads: Sequence[int],
    ) -> Float[Tensor, "batch head row key"]:
        """Change rows of some heads' scores or pattern in place; row r is token past + r."""
        for changed, changes in self._heads_by_changes():
            places = [place for place, head in enumerate(heads) if head in changed]
            part = matrix[:, places]
            for change in changes:
                part = change.on_matrix(part, past) if change.stage == stage else part
            matrix[:, places] = part
        return matrix

    def _heads_by_changes(self) -> list[tuple[list[int], tuple[DiagonalChange, ...]]]:
        """Return the edited heads, grouped by equal changes."""
        groups: dict[tuple[DiagonalChange, ...], list[int]] = {}
        for head, changes in sorted(self._changes.items()):
            groups.setdefault(changes, []).append(head)
        return [(heads, changes) for changes, heads in groups.items()]

    def _changed_at(self, entries: Tensor, stage: str, offsets: Sequence[int]) -> Tensor:
        """Change entries [batch, head, row, offset] of scores or pattern in place."""
        at = torch.tensor(offsets, device=entries.device)
        for heads, changes in self._heads_by_changes():
            total = total_at(changes, stage, at).to(entries.dtype)
            part = entries[:, heads]
            entries[:, heads] = part + total if stage == "scores" else part * total
        return entries

    def _after_changes(self) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp of each row after all changes; computed once."""
        if self._edited is None:
            out, lse = self.result()
            if self._changes:
                out, lse = out.clone(), lse.clone()
            for heads, changes in self._heads_by_changes():
                part = self._change_heads(heads, changes, out[:, heads], lse[:, heads])
                out[:, heads], lse[:, heads] = part[0].to(out.dtype), part[1]
            self._edited = out, lse
        return self._edited

    def _change_heads(
        self, heads: list[int], changes: tuple[DiagonalChange, ...], out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp of heads that share their changes, by the closed form."""
        offsets = tuple(sorted({offset for change in changes for offset in change.offsets}))
        half_precision = self.q.dtype in (torch.float16, torch.bfloat16)
        at = torch.tensor(offsets, device=self.q.device)
        on_scores, on_pattern = (
            total_at(changes, stage, at).to(lse.dtype) for stage in ("scores", "pattern")
        )
        unsuited = len(offsets) > _MOST_OFFSETS or float(on_scores.max()) > _LARGEST_AMOUNT
        if unsuited or half_precision or self.under_gradients():
            rows = torch.arange(self.mask.n_queries, device=self.q.device)
            return self._recompute(heads, changes, rows[None, None])
        kept_only = [stage for stage in ("scores", "pattern") if rest_removed(changes, stage)]
        outs, lses = [], []
        for start, stop in self.chunks():
            old_out, old_lse = out[:, :, start:stop], lse[:, :, start:stop]
            logits = self.unchanged_logits(heads, offsets, start, stop)
            changed = logits + on_scores
            if "scores" in kept_only:
                new_lse = self.log_sum_exp(changed, heads)
                share = (changed - new_lse[..., None]).exp()
                new_out = self._weighted_values(share, heads, offsets, start, stop)
            else:
                added = (logits - old_lse[..., None]).exp() * on_scores.exp().sub(1)
                left = 1 + added.sum(-1)
                new_lse = old_lse + left.log()
                new_values = self._weighted_values(added, heads, offsets, start, stop)
                new_out = (old_out + new_values) / left[..., None]
                small = (left < _SMALL) & old_lse.isfinite()
                if bool(small.any()):
                    new_out, new_lse = self._recompute_small(
                        heads, changes, small, new_out, new_lse, start
                    )
            if any(change.stage == "pattern" for change in changes):
                share = (changed - new_lse[..., None]).exp()
                if "pattern" in kept_only:
                    share = share * on_pattern
                    new_out = self._weighted_values(share, heads, offsets, start, stop)
                else:
                    added = share * (on_pattern - 1)
                    new_out = new_out + self._weighted_values(added, heads, offsets, start, stop)
            outs.append(new_out)
            lses.append(new_lse)
        return torch.cat(outs, dim=-2), torch.cat(lses, dim=-1)

    def _weighted_values(
        self,
        weights: Float[Tensor, "batch head row offset"],
        heads: Sequence[int],
        offsets: Sequence[int],
        start: int,
        stop: int,
    ) -> Float[Tensor, "batch head row d_head"]:
        """Return Σ_Δ weight_Δ · v_{i−Δ} for each of some rows i."""
        v = at_least_float32(self.of_heads(self.v, heads)[:, :, : self.mask.past + stop])
        total = v.new_zeros(*weights.shape[:3], v.shape[-1])
        for column, offset in enumerate(offsets):
            total.addcmul_(weights[..., column, None], shifted(v, offset, stop - start))
        return total

    def _recompute_small(
        self,
        heads: list[int],
        changes: tuple[DiagonalChange, ...],
        chosen: Bool[Tensor, "batch head row"],
        out: Tensor,
        lse: Tensor,
        start: int,
    ) -> tuple[Tensor, Tensor]:
        """Recompute the rows where `chosen` is True, after changes of the scores alone.

        Row 0 of `chosen`, `out` and `lse` is row `start` of the attention.
        """
        most = int(chosen.sum(-1).max())
        rows = chosen.int().topk(most, dim=-1).indices
        scores = tuple(change for change in changes if change.stage == "scores")
        new_out, new_lse = self._recompute(heads, scores, rows + start)
        keep = chosen.gather(-1, rows)  # topk adds other rows to heads with fewer chosen ones
        index = rows[..., None].expand(*rows.shape, out.shape[-1])
        new_out = torch.where(keep[..., None], new_out.to(out.dtype), out.gather(2, index))
        new_lse = torch.where(keep, new_lse, lse.gather(2, rows))
        return out.scatter(2, index, new_out), lse.scatter(2, rows, new_lse)

    def _recompute(
        self,
        heads: list[int],
        changes: tuple[DiagonalChange, ...],
        rows: Int[Tensor, "#batch #head row"],
    ) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp of some rows, from all logits of a few rows at a time."""
        mask, n_rows = self.mask, rows.shape[-1]
        size = max(1, BLOCK_ENTRIES // (mask.batch * len(heads) * mask.n_keys))
        v = at_least_float32(self.of_heads(self.v, heads))
        outs, lses = [], []
        for start in range(0, n_rows, size):
            part = rows[..., start : start + size]
            logits = self.dense_logits(heads, part, (0, mask.n_keys))
            tokens = (part + mask.past).expand(*logits.shape[:3])
            logits = change_rows(logits, tokens, changes, "scores")
            lse = self.log_sum_exp(logits, heads)
            weights = change_rows((logits - lse[..., None]).exp(), tokens, changes, "pattern")
            outs.append(weights @ v)
            lses.append(lse)
        return torch.cat(outs, dim=-2), torch.cat(lses, dim=-1)

    def _sums_by_blocks(self, rows: Tensor | None) -> Float[Tensor, "batch head offset"]:
        """Return the sum along every diagonal of the changed pattern, by blocks of rows."""
        mask, heads = self.mask, range(self.q.shape[1])
        device = self.q.device
        shape = (mask.batch, len(heads), mask.n_keys)
        sums = torch.zeros(shape, dtype=sum_dtype(device), device=device)
        start = 0
        for _, pattern in self.pattern_blocks(heads):
            n_rows, n_columns = pattern.shape[-2:]
            if rows is not None:
                chosen = rows[:, None, start : start + n_rows, None].to(device)
                pattern.masked_fill_(~chosen, 0)
            block_sums = diagonal_sums(pattern, n_columns - n_rows)
            sums[..., : block_sums.shape[-1]] += block_sums
            start += n_rows
        return sums

    def pattern_blocks(
        self, heads: Sequence[int]
    ) -> Iterator[tuple[int, Float[Tensor, "batch head row key"]]]:
        """Yield the changed pattern of some heads by blocks of consecutive rows.

        Each block comes with the key column of its first column; its last column is the token of
        its last row. Entries after a row's own token mean nothing. Keys before the first column
        have no weight.
        """
        mask, lse = self.mask, self.of_heads(self._after_changes()[1].detach(), heads)
        q, k = (at_least_float32(self.of_heads(x.detach(), heads)) for x in (self.q, self.k))
        for rows, (left, right) in self.blocks():
            first, last = int(rows[0]), int(rows[-1]) + 1
            right = min(right, mask.past + last)
            if mask.plain and mask.real is None:
                logits = self._capped(q[:, :, first:last] @ k[:, :, left:right].mT)
            else:
                logits = self.dense_logits(heads, rows[None, None], (left, right)).detach()
            past = mask.past + first - left
            logits = self._changed_matrix(logits, "scores", past, heads)
            # Rounding of logit and log-sum-exp could make a weight slightly larger than 1.
            pattern = logits.sub_(lse[:, :, first:last, None]).clamp_(max=0).exp_()
            yield left, self._changed_matrix(pattern, "pattern", past, heads)
