"""`fused`: flash attention under a bridge's own attention code and hooks.

Two seams, both undone on leaving. Transformers asks a mask function, registered under a name of
ours, for each pass's mask, and gets a rule instead of a matrix. And each layer's keys, as they come
from the KV cache, are marked, so that their product with the queries is noted and not formed
(`symbolic`). All else is TransformerLens' own forward pass.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import anatomy as anatomies
from .anatomy import Anatomy, probe_tokens, run_probe
from .calls import Call, CallWatch, matrix_is_needed
from .edited import EditedAttention
from .errors import FusedError, ModelError
from .mask import Mask
from .precision import MASKED, attention_slack
from .symbolic import WAYS_OUT, Keys, MaskArgument, Scores

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_NAME = "slashpatch_fused"


@contextlib.contextmanager
def fused(model: TransformerBridge) -> Iterator[TransformerBridge]:
    """Run the model at the cost of flash attention, every hook but scores and pattern still firing.

    Patches, monitors and scans work inside, nested in any order; results equal those of
    TransformerLens' own attention within the dtype's rounding. Output rows of padding are zero
    before the output projection. Windows, soft-capping, and new tokens after cached ones go by
    blocks of rows; so do, under gradients, edited heads and layers with sinks. Do not copy the
    model inside.

    Raises ModelError for a model whose attention does not take part, FusedError where somebody
    else's hook sits on `hook_attn_scores` or `hook_pattern`: they are not formed here.
    """
    engine = _engines.get(model)
    if engine is None:
        require_fusible(model)
        engine = _engines[model] = _Engine(model)
    engine.users += 1
    try:
        refuse_hooks(model)
        yield model
    finally:
        engine.users -= 1
        if not engine.users:
            engine.close()
            del _engines[model]


@contextlib.contextmanager
def fused_where_exact(model: TransformerBridge) -> Iterator[TransformerBridge]:
    """`fused`, or the model as it is where `why_not` says something."""
    with contextlib.nullcontext() if why_not(model) else fused(model):
        yield model


def ways(model: TransformerBridge) -> list[str]:
    """How each layer went in the last pass: "flash", "blocks" (of rows) or "bridge" (matrix)."""
    engine = _engines.get(model)
    n_layers = anatomies.read(model).n_layers
    return ["bridge"] * n_layers if engine is None else [layer.way for layer in engine.layers]


def is_fused(model: TransformerBridge) -> bool:
    """Whether the model runs fused at the moment."""
    return model in _engines


def reads_diagonals(hook_fn: Any) -> Any:
    """Mark a hook function that takes scores or pattern through `slash_rows` alone."""
    hook_fn.reads_diagonals = True
    return hook_fn


def why_not(model: TransformerBridge) -> str | None:
    """What keeps the model from running fused now; None if nothing does."""
    try:
        require_fusible(model)
        refuse_hooks(model)
    except (FusedError, ModelError) as error:
        return str(error)
    return None


_engines: weakref.WeakKeyDictionary[Any, _Engine] = weakref.WeakKeyDictionary()
_fusible: weakref.WeakKeyDictionary[Any, tuple[Anatomy, str | None]] = weakref.WeakKeyDictionary()


def require_fusible(model: TransformerBridge) -> None:
    """Raise ModelError unless both engines agree on a short input; cheap when read before."""
    anatomy = anatomies.read(model)
    if model not in _fusible or _fusible[model][0] is not anatomy:
        try:
            _verify(model, anatomy)
            _fusible[model] = (anatomy, None)
        except (FusedError, ModelError) as error:
            _fusible[model] = (anatomy, str(error))
    refusal = _fusible[model][1]
    if refusal is not None:
        raise ModelError(refusal)


def _verify(model: TransformerBridge, anatomy: Anatomy) -> None:
    if model.compatibility_mode:
        raise ModelError(
            "slashpatch cannot run this model fused: in compatibility mode TransformerLens masks "
            "otherwise; leave engine='auto', or load the model without it"
        )
    tokens = probe_tokens(anatomy.d_vocab).to(model.cfg.device)
    right: dict[int, Tensor] = {}
    found: dict[int, Tensor] = {}
    largest: dict[int, float] = {}

    def keep(z: Tensor, hook: Any) -> None:
        right[hook.layer()] = z

    def compare(z: Tensor, hook: Any) -> Tensor:
        found[hook.layer()] = z
        return right[hook.layer()]  # so that each layer is compared on the same input

    def keep_scores(scores: Tensor, hook: Any) -> None:
        masked = scores <= MASKED
        largest[hook.layer()] = float(scores.masked_fill(masked, 0).abs().max())

    layers = range(anatomy.n_layers)
    hooks: list[tuple[str, Callable[..., Any]]] = [
        (anatomy.hook(layer, "scores"), keep_scores) for layer in layers
    ]
    run_probe(model, tokens, hooks + [(anatomy.hook(layer, "z"), keep) for layer in layers])
    engine = _Engine(model)
    try:
        hooks = [(anatomy.hook(layer, "z"), compare) for layer in layers]
        run_probe(model, tokens, hooks, matrices=False)
    except (FusedError, ModelError) as error:
        raise ModelError(f"slashpatch cannot run this model fused: {error}") from error
    finally:
        engine.close()
    for layer in layers:
        if engine.layers[layer].way not in ("flash", "blocks"):
            raise ModelError(
                f"slashpatch cannot run this model fused: the attention of layer {layer} "
                f"({type(model.blocks[layer].attn).__name__}) does not hand its keys on where "
                "slashpatch expects it"
            )
        limit = attention_slack(right[layer].dtype, largest[layer])
        limit *= max(float(right[layer].abs().max()), 1e-3)  # the first token's z is its value
        off = float((found[layer].double() - right[layer].double()).abs().max())
        if not off <= limit:
            raise ModelError(
                f"slashpatch cannot run this model fused: z of layer {layer} differs by {off:.2g} "
                f"from that of TransformerLens' own attention (allowed {limit:.2g})"
            )


def refuse_hooks(model: TransformerBridge) -> None:
    """Raise FusedError if somebody else's hook sits on scores or pattern."""
    for point in _matrix_points(model):
        for handle in [*point.fwd_hooks, *point.bwd_hooks]:
            hook_fn = handle.user_hook
            if not (hasattr(hook_fn, "slashpatch") or hasattr(hook_fn, "reads_diagonals")):
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
            if matrix_is_needed() or index in engine.by_matrix:
                return k, v

            def scores(q: Tensor, k: Tensor) -> Scores:
                values = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
                return Scores(index, q, k, values, self._done)

            return Keys.mark(k, scores), v

        attn.__dict__["_update_kv_cache"] = update

    def _done(self, attention: EditedAttention) -> None:
        self.way = attention.way

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
        self._watch = CallWatch(model.original_model, self._start)

    def _start(self, call: Call) -> None:
        model = self._model()
        if matrix_is_needed() or model is None:
            return
        refuse_hooks(model)
        self.by_matrix = {
            int(point.name.split(".")[1])
            for point in _matrix_points(model)
            for handle in point.fwd_hooks
            if hasattr(handle.user_hook, "slashpatch")
            and handle.user_hook.slashpatch[2].needs_matrix
        }

    def close(self) -> None:
        """The model as it was."""
        self._watch.close()
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
