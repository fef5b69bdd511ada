"""Passes that start at a later layer, from the cached residual stream of those before.

TransformerLens' `start_at_layer` discards what the earlier blocks give, but computes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from ..errors import ModelError
from .passes import leaving_no_trace

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class PrefixCache:
    """The residual stream that the blocks before `layer` give for some tokens; moves forward only.

    The model must not be changed while it is used, but by edits of layers from `layer` on: those
    are what it is for.
    """

    def __init__(self, model: TransformerBridge, tokens: Int[Tensor, "batch pos"]) -> None:
        self.model = model
        self.tokens = tokens
        self.layer = 0
        self._output: Any = None
        self._ahead: dict[int, Any] = {}

    @contextmanager
    def keeping(self, layers: Iterable[int]) -> Iterator[None]:
        """Within it, a pass over the tokens keeps what `advance` to these layers would run for."""
        handles = []
        try:
            for layer in set(layers) - {0}:

                def keep(module: Any, args: Any, output: Any, layer: int = layer) -> None:
                    self._ahead[layer] = output

                handles.append(self.model.blocks[layer - 1].register_forward_hook(keep))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def advance(self, layer: int) -> None:
        """Run the blocks up to `layer`, and keep what they give."""
        if layer < self.layer:
            raise ModelError(f"a prefix cache at layer {self.layer} does not go back to {layer}")
        if layer == self.layer:
            return
        if layer in self._ahead:
            self._output, self.layer = self._ahead[layer], layer
            self._ahead = {at: kept for at, kept in self._ahead.items() if at > layer}
            return
        kept = []
        handle = self.model.blocks[layer - 1].register_forward_hook(
            lambda module, args, output: kept.append(output)
        )
        stop = {"stop_at_layer": layer} if layer < len(self.model.blocks) else {}
        try:
            with leaving_no_trace(self.model), self.skipped():
                self.model(self.tokens, return_type=None, **stop)
        finally:
            handle.remove()
        self._output, self.layer = kept[0], layer

    @contextmanager
    def skipped(self, copies: int = 1) -> Iterator[None]:
        """Within it, passes of `copies` times the tokens skip the blocks before `layer`.

        Patches must be attached before: those that run the model for themselves need all of it.
        """
        output = _repeated(self._output, copies)
        replaced = []
        try:
            for index in range(self.layer):
                block = self.model.blocks[index]
                replaced.append(block)
                block.__dict__["forward"] = _giving(output, index == self.layer - 1)
            yield
        finally:
            for block in replaced:
                del block.__dict__["forward"]


def _giving(output: Any, last: bool) -> Any:
    """A forward that gives what is kept; before the last stub, whatever came in its place."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if last:
            return output
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    return forward


def _repeated(output: Any, copies: int) -> Any:
    if copies == 1 or output is None:
        return output
    if isinstance(output, tuple):
        return (_repeated(output[0], copies), *output[1:])
    return output.repeat(copies, *[1] * (output.ndim - 1))
