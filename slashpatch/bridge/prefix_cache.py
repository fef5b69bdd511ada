"""Forward passes that start at a later layer, from the cached output of the blocks before it.

TransformerLens' `start_at_layer` discards the output of the earlier blocks, but computes it.
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
    """Output of the blocks before `layer` on some tokens: the cached residual stream.

    `layer` moves forward only. While the cache is used, only edits of layers from `layer` on may
    change the model.
    """

    def __init__(self, model: TransformerBridge, tokens: Int[Tensor, "batch pos"]) -> None:
        self.model = model
        self.tokens = tokens
        self.layer = 0
        self._output: Any = None
        self._ahead: dict[int, Any] = {}

    @contextmanager
    def keeping(self, layers: Iterable[int]) -> Iterator[None]:
        """Inside, a forward pass over the tokens caches the inputs of `layers` for `advance`."""
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
        """Run the blocks before `layer`, and cache their output. Raises ModelError to go back."""
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
        """Inside, forward passes skip the blocks before `layer`; the batch is `copies` times ours.

        Attach patches before: those that run the model when they are attached need all its blocks.
        """
        output = _repeated(self._output, copies)
        replaced: list[tuple[Any, Any]] = []
        try:
            for index in range(self.layer):
                block = self.model.blocks[index]
                # accelerate replaces `forward` too, where it was attached to the bridge itself.
                replaced.append((block, block.__dict__.get("forward")))
                block.__dict__["forward"] = _skip(output, index == self.layer - 1)
            yield
        finally:
            for block, before in replaced:
                if before is None:
                    del block.__dict__["forward"]
                else:
                    block.__dict__["forward"] = before


def _skip(output: Any, last: bool) -> Any:
    """Return a block's forward that computes nothing: the last one returns the cached output."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if last:
            return output
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    return forward


def _repeated(output: Any, copies: int) -> Any:
    """Return a block's output for `copies` times the batch."""
    if copies == 1 or output is None:
        return output
    if isinstance(output, tuple):
        return (_repeated(output[0], copies), *output[1:])
    return output.repeat(copies, *[1] * (output.ndim - 1))
