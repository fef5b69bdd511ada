"""What is changed in a model while it runs fused."""

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
from .markers import WAYS_OUT, Keys, MaskArgument
from .stand_ins import Scores

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


_NAME = "slashpatch_fused"


def refuse_hooks(model: TransformerBridge) -> None:
    """Raise FusedError if somebody else's hook sits on scores or pattern."""
    for point in _matrix_points(model):
        for handle in [*point.fwd_hooks, *point.bwd_hooks]:
            hook_fn = handle.user_hook
            if mark_of(hook_fn) is None and not hasattr(hook_fn, "reads_diagonals"):
                raise FusedError(
                    f"a hook sits on {point.name}, which the fused engine does not form; {WAYS_OUT}"
                )


def _matrix_points(model: TransformerBridge) -> list[Any]:
    return [
        getattr(block.attn, name)
        for block in model.blocks
        for name in ("hook_attn_scores", "hook_pattern")
    ]


class _Layer:
    """One layer's attention while the engine runs."""

    def __init__(self, engine: _Engine, index: int, attn: Any) -> None:
        self.index = index
        self.attn = attn
        self.way = ""
        original = attn._update_kv_cache

        def update(k: Tensor, v: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
            k, v = original(k, v, **kwargs)
            self.way = "bridge"
            if matrices_are_formed() or index in engine.by_matrix:
                return k, v

            def scores(q: Tensor, k: Tensor) -> Scores:
                values = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
                return Scores(index, q, k, values, self._done)

            return Keys.mark(k, scores), v

        attn.__dict__["_update_kv_cache"] = update

    def _done(self, attention: EditedAttention) -> None:
        self.way = attention.computed_by

    def close(self) -> None:
        """The layer as it was."""
        del self.attn.__dict__["_update_kv_cache"]


#: Configurations under our name by id: what they said before, and how many engines use them.
_lent: dict[int, tuple[Any, Any, int]] = {}


class _Engine:
    """What is changed in a model while it runs fused."""

    def __init__(self, model: TransformerBridge) -> None:
        from transformers.masking_utils import AttentionMaskInterface

        AttentionMaskInterface.register(_NAME, _mask_of_pass)
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
            fresh = (config, config._attn_implementation_internal, 0)
            _, before, users = _lent.get(id(config), fresh)
            _lent[id(config)] = (config, before, users + 1)
            config._attn_implementation_internal = _NAME
        self.layers = [_Layer(self, index, block.attn) for index, block in enumerate(model.blocks)]
        self._watch = watch(model)
        self._watch.follow(self)

    def on_pass_start(self, call: ForwardCall) -> None:
        """Refuse hooks on the matrix, and note which layers must form theirs."""
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
        """Nothing is kept from pass to pass."""

    def close(self) -> None:
        """The model as it was."""
        self._watch.unfollow(self)
        for layer in self.layers:
            layer.close()
        for config in self._configs:
            _, before, users = _lent.pop(id(config))
            if users > 1:  # a model that shares it still runs fused
                _lent[id(config)] = (config, before, users - 1)
            else:
                config._attn_implementation_internal = before


def _mask_of_pass(
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
    """What Transformers calls for the mask of a pass: the rule that it would have written out."""
    if use_vmap:
        raise FusedError(
            f"the fused engine does not know this model's own additions to its mask; {WAYS_OUT}"
        )
    if int(q_offset) + q_length != kv_offset + kv_length:
        raise FusedError(
            "the KV cache has room for tokens still to come (a static cache); the fused engine "
            "expects a dynamic one"
        )

    from transformers.masking_utils import causal_mask_function

    # Falcon asks for a matrix that it may add to, of a rule that is causal all the same.
    causal = allow_is_causal_skip or mask_function is causal_mask_function

    def allows(prompt: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask_function(prompt, torch.zeros_like(prompt), query, key)

    real = None
    if attention_mask is not None:
        real = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        if real.shape[1] < kv_length:  # as Transformers: what the mask does not reach is padding
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
        # Where Transformers would rely on the kernel's own causal mask, padding apart.
        plain=causal and (local_size is None or kv_length < local_size),
        real=real,
        device=torch.device(device),
    )
    return MaskArgument(mask, dtype)
