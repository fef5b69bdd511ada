"""Whether TransformerLens' own attention computes what the wrapped attention of Transformers does.

A bridge splits joint projections, norms and rotates by its own code. Where that code is wrong for a
model, every hook carries something that the model never computes, and nothing else would tell.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ..maths.precision import MASKED, attention_slack

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def folded_apart(model: TransformerBridge) -> bool:
    """Whether compatibility mode folded weights into projections that were split off a joint one:
    the wrapped attention does not use them, and cannot be compared.
    """
    return bool(
        model.compatibility_mode
        and getattr(model, "_weights_processed", True)
        and any("qkv" in block.attn.submodules for block in model.blocks)
    )


class Native(NamedTuple):
    """One layer: how far both outputs are apart, what rounding allows, or why it is not known."""

    layer: int
    off: float
    allowed: float
    unknown: str = ""


class NativeRuns:
    """Runs each layer's wrapped attention on what the bridge's got, during one pass.

    Use as a context around a forward pass; `found` then says of each layer how they compare.
    """

    def __init__(self, model: TransformerBridge) -> None:
        self.model = model
        self.found: list[Native] = []
        self._scores: dict[int, float] = {}
        self._handles: list[Any] = []

    def hooks(self) -> list[tuple[str, Any]]:
        """Hooks that the pass must run with: how large scores are says what rounding does."""
        return [
            (f"blocks.{layer}.attn.hook_attn_scores", self._note)
            for layer in range(self.model.cfg.n_layers)
        ]

    def _note(self, scores: Tensor, hook: Any) -> None:
        seen = scores.masked_fill(scores <= MASKED, 0)
        self._scores[hook.layer()] = float(seen.abs().max())

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
        cacheless = {"past_key_values": None, "past_key_value": None, "layer_past": None}
        kwargs = {name: cacheless.get(name, value) for name, value in kwargs.items()}
        try:
            native = _first(attn.original_component(*args, **kwargs))
        except Exception as error:  # whatever its own forward pass may raise
            return Native(layer, math.nan, math.nan, f"{type(error).__name__}: {error}")
        ours = _first(output)
        if native.shape != ours.shape:
            return Native(layer, math.inf, 0.0)
        limit = attention_slack(ours.dtype, self._scores.get(layer, 0.0))
        size = max(float(native.abs().max()), 1e-3)
        off = float((native.double() - ours.double()).abs().max())
        return Native(layer, math.inf if math.isnan(off) else off, limit * size)


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
