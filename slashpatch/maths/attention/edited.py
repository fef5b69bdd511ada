"""Attention whose diagonals were changed, still without its matrix.

Closed form (ours): O' = (O + Σ_Δ (g−1) p_Δ v_{i−Δ}) / (1 + Σ_Δ (g−1) p_Δ), with p_Δ the attention
i → i−Δ and g the factor on exp(logit). Rows whose denominator is small are computed afresh, and so
are all rows in low precision and under gradients, which the log-sum-exp does not carry.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..diagonals import DiagonalChange, diagonal_sums, shifted, total_at
from .softmax import BLOCK_ENTRIES, Attention, wide, widest

#: Below this share of a row that an edit leaves, dividing by it would lose digits.
_SMALL = 0.25
#: A larger addition to a logit may overflow as a factor.
_LARGEST_AMOUNT = 40.0
#: More offsets than this are cheaper by whole rows.
_MOST_OFFSETS = 96


class EditedAttention(Attention):
    """Attention with changes of some heads' diagonals.

    Changes and keys of a head's own are noted first; `output`, `weights` and `weight_sums` take
    them into account.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._changes: dict[int, tuple[DiagonalChange, ...]] = {}
        self._edited: tuple[Tensor, Tensor] | None = None

    def change(self, heads: Sequence[int], change: DiagonalChange) -> None:
        """Change diagonals of some heads, after the changes noted so far."""
        for head in heads:
            self._changes[head] = (*self._changes.get(head, ()), change)
        self._edited = None

    def set_keys(self, heads: Sequence[int], keys: Float[Tensor, "batch key own d_head"]) -> None:
        """Give some heads rotated keys of their own."""
        super().set_keys(heads, keys)
        self._edited = None

    def set_sinks(self, sinks: Float[Tensor, "head"]) -> None:
        """Let a sink take part in each row."""
        super().set_sinks(sinks)
        self._edited = None

    def logit_sums(
        self, n_offsets: int, real: Bool[Tensor, "batch key"]
    ) -> Float[Tensor, "batch head offset"] | None:
        """As without changes, where there are none; else None."""
        return None if self._changes else super().logit_sums(n_offsets, real)

    def output(self) -> Float[Tensor, "batch head query d_head"]:
        """Each head's output, in the dtype of the values."""
        return self._after_changes()[0].to(self.v.dtype)

    def logits(self, offsets: Sequence[int]) -> Float[Tensor, "batch head query offset"]:
        """Logits i → i−Δ, changed; −inf where there is no key to read.

        A row that changes leave without keys keeps its own, as in an edit of the matrix.
        """
        if self._changes:
            return self._with_emptied_rows(offsets)
        return torch.cat([self._logits(offsets, *rows) for rows in self.chunks()], dim=-2)

    def weights(self, offsets: Sequence[int]) -> Float[Tensor, "batch head query offset"]:
        """Attention i → i−Δ after the softmax and after all changes; 0 where there is no key."""
        return torch.cat([self._weights(offsets, *rows) for rows in self.chunks()], dim=-2)

    def _logits(self, offsets: Sequence[int], start: int, stop: int) -> Tensor:
        every = range(self.q.shape[1])
        return self._changed_at(self.own_logits(every, offsets, start, stop), "scores", offsets)

    def _with_emptied_rows(self, offsets: Sequence[int]) -> Tensor:
        lse, before = self._after_changes()[1], self.result()[1]
        emptied = ((lse == math.inf) & (before < math.inf))[..., None]
        every = range(self.q.shape[1])
        return torch.cat(
            [
                torch.where(
                    emptied[:, :, start:stop],
                    self.own_logits(every, offsets, start, stop),
                    self._logits(offsets, start, stop),
                )
                for start, stop in self.chunks()
            ],
            dim=-2,
        )

    def _weights(self, offsets: Sequence[int], start: int, stop: int) -> Tensor:
        lse = self._after_changes()[1].detach()
        found = self._logits(offsets, start, stop).sub_(lse[:, :, start:stop, None])
        # A weight is at most 1, whatever the two roundings of its logit say.
        return self._changed_at(found.clamp_(max=0).exp_(), "pattern", offsets)

    def weight_sums(
        self, offsets: Sequence[int], rows: Bool[Tensor, "batch query"] | None
    ) -> Float[Tensor, "batch head offset"]:
        """Sum of `weights` over the queries that `rows` names, float64 (float32 on MPS)."""
        if len(offsets) <= _MOST_OFFSETS:
            shape = (*self.q.shape[:2], len(offsets))
            total = torch.zeros(shape, dtype=widest(self.q.device), device=self.q.device)
            for start, stop in self.chunks():
                found = self._weights(offsets, start, stop)
                if rows is not None:
                    found.masked_fill_(~rows[:, None, start:stop, None].to(found.device), 0)
                total += found.sum(-2, dtype=total.dtype)
            return total
        sums = self._all_sums(rows)
        sums = torch.nn.functional.pad(sums, (0, max(0, max(offsets) + 1 - sums.shape[-1])))
        return sums[..., torch.tensor(offsets, device=sums.device)]

    def _changed_matrix(
        self, matrix: Float[Tensor, "batch head row key"], stage: str, past: int
    ) -> Float[Tensor, "batch head row key"]:
        """Rows of scores or pattern, changed in place; row r is the token in column past + r."""
        for heads, changes in self._groups():
            part = matrix[:, heads]
            for change in changes:
                part = change.on_matrix(part, past) if change.stage == stage else part
            matrix[:, heads] = part
        return matrix

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
            out, lse = self.result()
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
        at = torch.tensor(offsets, device=self.q.device)
        on_scores, on_pattern = (
            total_at(changes, stage, at).to(lse.dtype) for stage in ("scores", "pattern")
        )
        far = len(offsets) > _MOST_OFFSETS or float(on_scores.max()) > _LARGEST_AMOUNT
        if far or narrow or self.under_gradients():
            every = torch.arange(self.mask.n_queries, device=self.q.device)
            return self._afresh(heads, changes, every[None, None])
        only = [stage for stage in ("scores", "pattern") if _rest_removed(changes, stage)]
        outs, lses = [], []
        for start, stop in self.chunks():
            own_out, own_lse = out[:, :, start:stop], lse[:, :, start:stop]
            logits = self.own_logits(heads, offsets, start, stop)
            changed = logits + on_scores
            if "scores" in only:
                new_lse = self.log_sum(changed, heads)
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
        v = wide(self.of(self.v, heads)[:, :, : self.mask.past + stop])
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
        places = rows[..., None].expand(*rows.shape, out.shape[-1])
        new_out = torch.where(keep[..., None], new_out.to(out.dtype), out.gather(2, places))
        new_lse = torch.where(keep, new_lse, lse.gather(2, rows))
        return out.scatter(2, places, new_out), lse.scatter(2, rows, new_lse)

    def _afresh(
        self,
        heads: list[int],
        changes: tuple[DiagonalChange, ...],
        rows: Int[Tensor, "#batch #own row"],
    ) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of some rows, by dense rows, a few at a time."""
        mask, n_rows = self.mask, rows.shape[-1]
        size = max(1, BLOCK_ENTRIES // (mask.batch * len(heads) * mask.n_keys))
        v = wide(self.of(self.v, heads))
        outs, lses = [], []
        for start in range(0, n_rows, size):
            part = rows[..., start : start + size]
            logits = self.dense(heads, part, (0, mask.n_keys))
            tokens = (part + mask.past).expand(*logits.shape[:3])
            logits = _on_rows(logits, tokens, changes, "scores")
            lse = self.log_sum(logits, heads)
            weights = _on_rows((logits - lse[..., None]).exp(), tokens, changes, "pattern")
            outs.append(weights @ v)
            lses.append(lse)
        return torch.cat(outs, dim=-2), torch.cat(lses, dim=-1)

    def _all_sums(self, rows: Tensor | None) -> Float[Tensor, "batch head offset"]:
        """Sums of the changed pattern along every diagonal, by blocks of rows."""
        mask, heads = self.mask, range(self.q.shape[1])
        lse = self._after_changes()[1].detach()
        if rows is not None:
            lse = lse.masked_fill(~rows.to(lse.device)[:, None], math.inf)
        q, k = wide(self.q.detach()), wide(self.k.detach())
        sums = torch.zeros(
            mask.batch, len(heads), mask.n_keys, dtype=widest(q.device), device=q.device
        )
        simple = mask.plain and mask.real is None
        for block, (left, right) in self.blocks():
            first, last = int(block[0]), int(block[-1]) + 1
            right = min(right, mask.past + last)  # keys in the future have no offset
            if simple:
                # Entries in the future are never read, so they need no mask.
                logits = self._capped(q[:, :, first:last] @ k[:, :, left:right].mT)
            else:
                logits = self.dense(heads, block[None, None], (left, right)).detach()
            past = mask.past + first - left
            logits = self._changed_matrix(logits, "scores", past)
            pattern = logits.sub_(lse[:, :, first:last, None]).exp_()
            pattern = self._changed_matrix(pattern, "pattern", past)
            found = diagonal_sums(pattern, past)
            sums[..., : found.shape[-1]] += found
        return sums


def _on_rows(
    matrix: Float[Tensor, "batch own row key"],
    tokens: Int[Tensor, "batch own row"],
    changes: Sequence[DiagonalChange],
    stage: str,
) -> Float[Tensor, "batch own row key"]:
    """A copy of any rows of a matrix, changed; `tokens` says which key column each row's is."""
    for change in changes:
        if change.stage != stage:
            continue
        offsets = torch.tensor(change.offsets, device=matrix.device)
        columns = tokens[..., None] - offsets
        inside, columns = columns >= 0, columns.clamp(min=0)
        own = matrix.gather(-1, columns)
        new = own + change.amount if stage == "scores" else own * change.amount
        # What is asked of a key that is not there goes to a spare column.
        rest = torch.full_like(matrix, change.elsewhere) if change.removes_the_rest else matrix
        spare = torch.nn.functional.pad(rest, (0, 1))
        columns = torch.where(inside, columns, matrix.shape[-1])
        matrix = spare.scatter(-1, columns, new)[..., :-1]
    return matrix


def _rest_removed(changes: Sequence[DiagonalChange], stage: str) -> bool:
    return any(change.removes_the_rest for change in changes if change.stage == stage)
