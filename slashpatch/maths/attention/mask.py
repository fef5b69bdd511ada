"""Attention masks as a rule instead of a matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """Which keys each new token may attend to, as a rule instead of a matrix.

    Key column c is token first_key + c; the new tokens (queries) are the last `n_queries` columns.

    Attributes:
        allows: Function of broadcastable index tensors (prompt, query token, key token) that
            returns True where the query may attend to the key. It does not know about padding.
        batch: Number of prompts.
        n_queries: New tokens of each prompt.
        n_keys: Key columns, cached and new.
        first_key: Token index of key column 0; above 0 where a sliding-window cache dropped tokens.
        causal: Whether the mask forbids all keys after the query.
        window: Size of the sliding window: keys this many tokens back or more are forbidden. None
            without a window.
        plain: Whether the mask is just causal: every key up to the query is allowed, apart from
            padding.
        real: True for key columns of real (unpadded) tokens; None when there is no padding.
        device: Where `allows` works: it may hold tensors.
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
        """The number of key columns before the first new token."""
        return self.n_keys - self.n_queries

    def at(
        self,
        rows: Int[Tensor, "#batch #head row 1"],
        columns: Int[Tensor, "#batch #head #row col"],
    ) -> Bool[Tensor, "batch #head row col"]:
        """Return whether query rows may attend to key columns; False outside the key columns.

        `rows` and `columns` are index tensors that broadcast against each other; the answer is on
        their device.
        """
        if rows.device != self.device:  # the rule may hold tensors, which are on the mask's device
            at_home = self.at(rows.to(self.device), columns.to(self.device))
            return at_home.to(rows.device)
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
        """Prompts grouped by the columns (start, stop) of their tokens; None if one has a gap."""
        if self.real is None:
            return {(0, self.n_keys): list(range(self.batch))}
        spans: dict[tuple[int, int], list[int]] = {}
        counts, firsts = self.real.sum(1).tolist(), self.real.int().argmax(1).tolist()
        for prompt, (count, first) in enumerate(zip(counts, firsts, strict=True)):
            if not bool(self.real[prompt, first : first + count].all()):
                return None
            spans.setdefault((first, first + count), []).append(prompt)
        return spans
