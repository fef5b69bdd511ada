"""Which keys each token may read, as a rule instead of a matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor


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
