"""The changes that the fused engine makes to a model, and how it undoes them."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..bridge.attached import mark_of
from ..bridge.forward_call import ForwardCall
from ..bridge.modes import matrices_are_formed
from ..bridge.watch import watch
from ..errors import FusedError
from ..maths.attention.edited import EditedAttention
from ..maths.attention.mask import Mask
from .mask_and_keys import ALTERNATIVES, Keys, MaskArgument
from .stand_ins import Scores

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Our attention implementation's name in Transformers.
_NAME = "slashpatch_fused"


def refuse_hooks(model: TransformerBridge) -> None:
    """Raise FusedError if scores or pattern have a hook that needs the matrix.

    Hooks of edits and hooks marked by `reads_diagonals` do not.
    """
    for point in _matrix_points(model):
        for handle in [*point.fwd_hooks, *point.bwd_hooks]:
            hook_fn = handle.user_hook
            if mark_of(hook_fn) is None and not hasattr(hook_fn, "reads_diagonals"):
                raise FusedError(
                    f"a hook is on {point.name}, whose matrix the fused engine does not form; "
                    f"{ALTERNATIVES}"
                )


def _matrix_points(model: TransformerBridge) -> list[Any]:
    """Return the hook points of scores and pattern in all layers."""
    return [
        getattr(block.attn, name)
        for block in model.blocks
        for name in ("hook_attn_scores", "hook_pattern")
    ]


class _FusedLayer:
    """One layer while the model runs fused: marks the keys that its KV cache returns.

    Attributes:
        index: The layer's index.
        attn: Its attention module.
        computed_by: How the last forward pass computed its attention: "flash", "blocks" (of rows)
            or "bridge" (TransformerLens, by its matrix); "" before the first.
    """

    def __init__(self, engine: FusedEngine, index: int, attn: Any) -> None:
        self.index = index
        self.attn = attn
        self.computed_by = ""
        original = attn._update_kv_cache

        def update(k: Tensor, v: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
            k, v = original(k, v, **kwargs)
            self.computed_by = "bridge"
            if matrices_are_formed() or index in engine.by_matrix:
                return k, v

            def scores(q: Tensor, k: Tensor) -> Scores:
                values = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
                return Scores(index, q, k, values, self._record)

            return Keys.mark(k, scores), v

        attn.__dict__["_update_kv_cache"] = update

    def _record(self, attention: EditedAttention) -> None:
        self.computed_by = attention.computed_by

    def close(self) -> None:
        """Restore the layer."""
        del self.attn.__dict__["_update_kv_cache"]


#: By id, configurations that name our attention: what they named before, and how many engines use
#: them (models can share a configuration).
_configs_in_use: dict[int, tuple[Any, Any, int]] = {}


class FusedEngine:
    """The changes that make one model run fused, from construction until `close`.

    Attributes:
        users: How many `fused` contexts use the engine.
        by_matrix: Layers that form their matrix in the current pass, because an edit needs it.
        layers: The model's layers.
    """

    def __init__(self, model: TransformerBridge) -> None:
        from transformers.masking_utils import AttentionMaskInterface

        AttentionMaskInterface.register(_NAME, make_mask_argument)
        self.users = 0
        self.by_matrix: set[int] = set()
        self._model = weakref.ref(model)
        configs = {
            id(module.config): module.config
            for module in model.original_model.modules()
            if hasattr(getattr(module, "config", None), "_attn_implementation_internal")
        }
        self._configs = list(configs.values())
        for config in self._configs:
            unused = (config, config._attn_implementation_internal, 0)
            _, before, users = _configs_in_use.get(id(config), unused)
            _configs_in_use[id(config)] = (config, before, users + 1)
            config._attn_implementation_internal = _NAME
        self.layers = [
            _FusedLayer(self, index, block.attn) for index, block in enumerate(model.blocks)
        ]
        self._watch = watch(model)
        self._watch.follow(self)

    def on_pass_start(self, call: ForwardCall) -> None:
        """Refuse other hooks on scores and pattern; find the layers that must form their matrix."""
        model = self._model()
        if matrices_are_formed() or model is None:
            return
        refuse_hooks(model)
        self.by_matrix = {
            int(point.name.split(".")[1])
            for point in _matrix_points(model)
            for handle in point.fwd_hooks
            if (mark := mark_of(handle.user_hook)) is not None and mark.edit.needs_matrix
        }

    def on_pass_end(self, call: ForwardCall, output: Any) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Restore the model."""
        self._watch.unfollow(self)
        for layer in self.layers:
            layer.close()
        for config in self._configs:
            _, before, users = _configs_in_use.pop(id(config))
            if users > 1:  # another model with this configuration still runs fused
                _configs_in_use[id(config)] = (config, before, users - 1)
            else:
                config._attn_implementation_internal = before


def make_mask_argument(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: Any = "cpu",
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> MaskArgument:
    """Return the mask of a forward pass as a rule; Transformers calls this to make its masks.

    The parameters are those of Transformers' own mask functions.
    """
    if use_vmap:
        raise FusedError(
            f"the model adds to its attention mask what the fused engine does not support; "
            f"{ALTERNATIVES}"
        )
    if int(q_offset) + q_length != kv_offset + kv_length:
        raise FusedError(
            "the KV cache has room for future tokens (a static cache); the fused engine expects a "
            "dynamic cache"
        )

    from transformers.masking_utils import causal_mask_function

    # Falcon does not allow to skip the mask, because it may add to it, but its rule is causal.
    causal = allow_is_causal_skip or mask_function is causal_mask_function

    def allows(prompt: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask_function(prompt, torch.zeros_like(prompt), query, key)

    real = None
    if attention_mask is not None:
        real = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        if real.shape[1] < kv_length:  # as in Transformers: missing columns are padding
            real = torch.nn.functional.pad(real, (0, kv_length - real.shape[1]))
        real = None if bool(real.all()) else real
    mask = Mask(
        allows=allows,
        batch=batch_size,
        n_queries=q_length,
        n_keys=kv_length,
        first_key=kv_offset,
        causal=causal,
        window=local_size,
        # Here Transformers would use the flash kernel's own causal mask, if there is no padding.
        plain=causal and (local_size is None or kv_length < local_size),
        real=real,
        device=torch.device(device),
    )
    return MaskArgument(mask, dtype)
