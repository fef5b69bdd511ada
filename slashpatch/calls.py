"""What each forward pass was called with: new tokens, cached tokens, padding.

Hook points carry tensors only. Which rows are padding, and how many tokens lie in the KV cache, is
known to the wrapped Transformers model, whose arguments are read here as they go by.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .errors import ModelError, PatchError, PromptError

_internal: ContextVar[bool] = ContextVar("slashpatch_internal", default=False)
_by_matrix: ContextVar[bool] = ContextVar("slashpatch_by_matrix", default=False)


@contextlib.contextmanager
def internal_passes() -> Iterator[None]:
    """Passes that slashpatch runs for itself: monitors and the record of what fired skip them."""
    token = _internal.set(True)
    try:
        yield
    finally:
        _internal.reset(token)


@contextlib.contextmanager
def by_matrix(wanted: bool = True) -> Iterator[None]:
    """Passes that read or write whole attention matrices, also while the model runs fused."""
    token = _by_matrix.set(wanted)
    try:
        yield
    finally:
        _by_matrix.reset(token)


def matrix_is_needed() -> bool:
    """Whether passes must form the attention matrix now."""
    return _by_matrix.get()


@dataclass
class Call:
    """One forward pass of `n_queries` new tokens after `past` cached ones.

    `attention_mask` is [batch, past + n_queries] with 1 for real tokens, or None when all are.
    `tokens` are the new token ids, or their embeddings. `internal` passes are slashpatch's own.
    """

    batch: int
    n_queries: int
    past: int
    attention_mask: Any
    cache: Any
    tokens: Tensor
    position_ids: Tensor | None = None
    internal: bool = False

    def of_rows(self, rows: slice) -> Call:
        """The same pass with some of its prompts only."""

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
        """Where the tokens lie."""
        return self.tokens.device

    @cached_property
    def real(self) -> Bool[Tensor, "batch key"] | None:
        """Real (unpadded) tokens, or None when all are.

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
        """Position of each new token in its own prompt, from 0; 0 for padding."""
        if self.real is None:
            new = torch.arange(self.past, self.past + self.n_queries, device=self.device)
            return new.expand(self.batch, -1)
        return (self.real.long().cumsum(1) - 1).clamp(min=0)[:, -self.n_queries :]

    @cached_property
    def rope_positions(self) -> Int[Tensor, "rows query"]:
        """Positions at which the model rotates the new tokens; one row serves a whole batch."""
        if self.position_ids is not None:
            return self.position_ids.view(-1, self.n_queries).long()
        return torch.arange(self.past, self.past + self.n_queries, device=self.device)[None]

    def cached_columns(self, n_keys: int) -> int:
        """Key columns before the first new token, in an attention matrix of `n_keys` columns.

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


class CallWatch:
    """Follows the forward passes of one model; `current` is the one under way.

    `on_start(call)` and `on_end(call, output)` run around each forward pass; `output` is None after
    an exception. The watch ends with `close()`, or when nothing refers to it any more (its
    hooks then go at the next pass).
    """

    def __init__(
        self,
        hf_model: torch.nn.Module,
        on_start: Callable[[Call], None] | None = None,
        on_end: Callable[[Call, Any], None] | None = None,
    ) -> None:
        self.current: Call | None = None
        self.on_start = on_start
        self.on_end = on_end
        this = weakref.ref(self)  # the model must not keep the watch alive

        # A watch may be freed in the middle of a pass; torch then calls the hook that it is about
        # to forget without its keyword arguments.
        def start(module: Any, args: Any, kwargs: Any = None) -> None:
            watch = this()
            if watch is None:
                # Not when it was freed: the collector may run while torch goes through its hooks.
                _remove(handles)
            elif kwargs is not None:
                watch.current = _read(args, kwargs)
                if watch.on_start is not None:
                    watch.on_start(watch.current)

        def end(module: Any, args: Any, kwargs: Any, output: Any = None) -> None:
            watch = this()
            if watch is not None and watch.current is not None:
                call, watch.current = watch.current, None
                if watch.on_end is not None:
                    watch.on_end(call, output)

        handles = self._handles = (
            hf_model.register_forward_pre_hook(start, with_kwargs=True),
            hf_model.register_forward_hook(end, with_kwargs=True, always_call=True),
        )

    def close(self) -> None:
        """Stop watching."""
        _remove(self._handles)

    def require(self) -> Call:
        """The forward pass under way. Raises PatchError outside one."""
        if self.current is None:
            raise PatchError(
                "a hook fired outside a forward pass of its model; "
                "run the model that the hooks were built for"
            )
        return self.current


def _remove(handles: tuple[Any, ...]) -> None:
    for handle in handles:
        handle.remove()


def _read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    tokens = args[0] if args else kwargs.get("input_ids")
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    if tokens is None:
        raise ModelError("the model was called without tokens or embeddings as its first argument")
    cache = kwargs.get("past_key_values")
    return Call(
        batch=tokens.shape[0],
        n_queries=tokens.shape[1],
        past=int(cache.get_seq_length()) if cache is not None else 0,
        attention_mask=kwargs.get("attention_mask"),
        cache=cache,
        tokens=tokens,
        position_ids=kwargs.get("position_ids"),
        internal=_internal.get(),
    )
