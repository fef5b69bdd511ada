"""What the current forward pass was called with: new tokens, cached tokens, padding.

Hook points carry tensors only. Which rows are padding, and how many tokens lie in the KV cache, is
known to the wrapped Transformers model, whose arguments are read as they go by (`watch`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from ..errors import ModelError, PromptError
from .modes import passes_are_own


@dataclass
class ForwardCall:
    """Arguments of the current forward pass, and what its hooks leave for later hooks.

    Attributes:
        batch: Prompts.
        n_queries: New tokens of each.
        past: Tokens in the KV cache.
        attention_mask: [batch, past + n_queries] with 1 for real tokens, or None when all are.
        cache: The KV cache, if any.
        tokens: The new token ids, or their embeddings.
        position_ids: As given by the caller.
        own: Whether slashpatch runs this pass for itself (to verify or prepare something).
        state: What hooks of this pass keep for later ones, by owner; gone with the pass.
        followers: Which were told that the pass has started.
    """

    batch: int
    n_queries: int
    past: int
    attention_mask: Any
    cache: Any
    tokens: Tensor
    position_ids: Tensor | None = None
    own: bool = False
    state: dict[Any, Any] = field(default_factory=dict)
    followers: list[Any] = field(default_factory=list, repr=False)

    def of_rows(self, rows: slice) -> ForwardCall:
        """Return the call restricted to some rows of the batch."""

        def some(x: Any) -> Any:
            return x[rows] if isinstance(x, Tensor) and len(x) == self.batch else x

        tokens = self.tokens[rows]
        return replace(
            self,
            batch=len(tokens),
            tokens=tokens,
            attention_mask=some(self.attention_mask),
            position_ids=some(self.position_ids),
        )

    @property
    def device(self) -> torch.device:
        """Device of the new tokens."""
        return self.tokens.device

    @cached_property
    def real(self) -> Bool[Tensor, "batch key"] | None:
        """Which tokens are real (not padding), cached ones included; None if all are.

        Raises PromptError for a mask that is not [batch, key], or that has a gap inside a prompt:
        there, columns no longer count tokens.
        """
        mask = self.attention_mask
        if mask is None:
            return None
        n_keys = self.past + self.n_queries
        if not isinstance(mask, Tensor):
            raise PromptError(
                f"expected an attention mask [batch, tokens], got a {type(mask).__name__}"
            )
        if mask.ndim != 2 or mask.shape[0] != self.batch or mask.shape[1] < n_keys:
            raise PromptError(
                f"expected an attention mask [batch, tokens] of {self.batch} × {n_keys}, "
                f"got {list(mask.shape)}; pass the 0/1 mask over tokens"
            )
        real = mask[:, :n_keys].to(self.device).bool()
        if bool(real.all()):
            return None
        edges = torch.diff(real.long(), dim=1, prepend=real.new_zeros(self.batch, 1).long())
        if bool(((edges == 1).sum(1) > 1).any()):
            raise PromptError(
                "the attention mask has a gap inside a prompt, so columns do not count tokens; "
                "expected padding on the left or right only"
            )
        return real

    @cached_property
    def positions(self) -> Int[Tensor, "batch query"]:
        """Position of each new token in its prompt, from 0, padding not counted; 0 for padding."""
        if self.real is None:
            new = torch.arange(self.past, self.past + self.n_queries, device=self.device)
            return new.expand(self.batch, -1)
        return (self.real.long().cumsum(1) - 1).clamp(min=0)[:, -self.n_queries :]

    @cached_property
    def rope_positions(self) -> Int[Tensor, "rows query"]:
        """Positions at which RoPE rotates the new tokens; one row stands for the whole batch."""
        if self.position_ids is not None:
            return self.position_ids.view(-1, self.n_queries).long()
        return torch.arange(self.past, self.past + self.n_queries, device=self.device)[None]

    def cached_columns(self, n_keys: int) -> int:
        """Return the number of cached key columns in an attention matrix of `n_keys` columns.

        Fewer than `past` where a sliding-window cache has dropped some. Raises ModelError for a
        cache with room for tokens still to come, whose columns do not end at the newest token.
        """
        columns = n_keys - self.n_queries
        if columns < 0 or columns > self.past:
            raise ModelError(
                f"the attention has {n_keys} key columns for {self.past} cached and "
                f"{self.n_queries} new tokens; expected a dynamic KV cache (static caches are not "
                "supported)"
            )
        return columns


def read_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ForwardCall:
    """Return the call that these arguments of a Transformers model's forward describe."""
    tokens = args[0] if args else kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if tokens is None:
        raise ModelError("the model was called without tokens or embeddings as its first argument")
    cache = kwargs.get("past_key_values")
    return ForwardCall(
        batch=tokens.shape[0],
        n_queries=tokens.shape[1],
        past=int(cache.get_seq_length()) if cache is not None else 0,
        attention_mask=kwargs.get("attention_mask"),
        cache=cache,
        tokens=tokens,
        position_ids=kwargs.get("position_ids"),
        own=passes_are_own(),
    )
