"""Compare TransformerLens' attention with the attention module of Transformers that it wraps.

TransformerLens splits joint projections, applies norms and rotates with code of its own. Where that
code is wrong for a model, the hooks carry tensors that the original model never computes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ..maths.precision import MASKED, attention_slack

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def folded_apart(model: TransformerBridge) -> bool:
    """Return whether the two attentions of this model use different weights.

    TransformerLens' compatibility mode folds weights into the q, k and v projections that it split
    off a joint projection. The wrapped attention still uses the joint one: no comparison is
    possible.
    """
    return bool(
        model.compatibility_mode
        and getattr(model, "_weights_processed", True)
        and any("qkv" in block.attn.submodules for block in model.blocks)
    )


class Native(NamedTuple):
    """The comparison of one layer's two attentions.

    Attributes:
        layer: The layer's index.
        off: Largest absolute difference between their outputs; NaN if one could not be run.
        allowed: The difference that rounding explains.
        unknown: Why the wrapped attention could not be run; "" if it could.
    """

    layer: int
    off: float
    allowed: float
    unknown: str = ""


class NativeRuns:
    """Runs each layer's wrapped attention on the inputs of TransformerLens' attention.

    Use it as a context manager around a forward pass that runs with `hooks()`; afterwards `found`
    has one `Native` for each layer.
    """

    def __init__(self, model: TransformerBridge) -> None:
        self.model = model
        self.found: list[Native] = []
        self._largest_score: dict[int, float] = {}
        self._handles: list[Any] = []

    def hooks(self) -> list[tuple[str, Any]]:
        """Return hooks for the pass; they record the largest score, on which rounding depends."""
        return [
            (f"blocks.{layer}.attn.hook_attn_scores", self._record_largest)
            for layer in range(self.model.cfg.n_layers)
        ]

    def _record_largest(self, scores: Tensor, hook: Any) -> None:
        unmasked = scores.masked_fill(scores <= MASKED, 0)
        self._largest_score[hook.layer()] = float(unmasked.abs().max())

    def __enter__(self) -> NativeRuns:
        for layer, block in enumerate(self.model.blocks):

            def after(attn: Any, args: Any, kwargs: Any, output: Any, layer: int = layer) -> None:
                self.found.append(self._compare(layer, attn, args, kwargs, output))

            self._handles.append(block.attn.register_forward_hook(after, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _compare(self, layer: int, attn: Any, args: Any, kwargs: Any, output: Any) -> Native:
        no_cache = {"past_key_values": None, "past_key_value": None, "layer_past": None}
        kwargs = {name: no_cache.get(name, value) for name, value in kwargs.items()}
        try:
            native = _first(attn.original_component(*args, **kwargs))
        except Exception as error:  # a forward pass may raise anything
            return Native(layer, math.nan, math.nan, f"{type(error).__name__}: {error}")
        ours = _first(output)
        if native.shape != ours.shape:
            return Native(layer, math.inf, 0.0)
        limit = attention_slack(ours.dtype, self._largest_score.get(layer, 0.0))
        size = max(float(native.abs().max()), 1e-3)
        off = float((native.double() - ours.double()).abs().max())
        return Native(layer, math.inf if math.isnan(off) else off, limit * size)


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first
