"""`read(model)`: all that slashpatch knows of a TransformerBridge, verified once and remembered.

Nothing is assumed from a name. Short forward passes check that the hooks carry what their names say
(`verify`) and that queries, keys and frequencies reproduce the scores (`qk_reading`). A model that
does not behave so is refused, with the layer and the difference.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from ..errors import ModelError
from . import projections, qk_reading, verify
from .frequencies import rope_follows_length
from .model_info import ModelInfo
from .passes import probe_tokens, run_probe
from .qk import LayerQK

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Arguments that keep a forward pass from computing what only its hooks are wanted for.
_SAVING = {"logits_to_keep": 1, "use_cache": False}
_known: weakref.WeakKeyDictionary[Any, tuple[Any, ModelInfo]] = weakref.WeakKeyDictionary()


def read(model: TransformerBridge) -> ModelInfo:
    """Return what slashpatch knows of a model; verified on first use, then remembered.

    Raises ModelError for anything that is no TransformerBridge with its model in this process, is
    in training mode, or whose hooks do not carry what their names say.
    """
    _require_bridge(model)
    flags = (model.compatibility_mode, model.cfg.use_split_qkv_input, model.cfg.use_attn_in)
    if model in _known and _known[model][0] == flags:
        return _known[model][1]
    info = _read(model)
    _known[model] = (flags, info)
    return info


def refuse_remote(model: Any) -> None:
    """Raise ModelError for a bridge whose model is not in this process, by its class's name."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.bridge_core import BridgeCore

    if isinstance(model, BridgeCore) and not isinstance(model, TransformerBridge):
        raise ModelError(
            f"slashpatch refuses {type(model).__name__}: its model runs in another process and its "
            "hooks are read-only, so nothing could be edited; load the model here with "
            "slashpatch.load(...)"
        )


def _require_bridge(model: Any) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    refuse_remote(model)
    if not isinstance(model, TransformerBridge):
        kind = f"{type(model).__module__}.{type(model).__name__}"
        wrap = (
            "slashpatch.load(model) wraps a Transformers model"
            if hasattr(model, "forward") and hasattr(model, "config")
            else "make one with slashpatch.load(...)"
        )
        raise ModelError(f"expected a TransformerBridge, got {kind}; {wrap}")
    if model.training or model.original_model.training:
        raise ModelError(
            "the model is in training mode, where dropout changes the attention from run to run; "
            "call model.eval() first"
        )


def _read(model: TransformerBridge) -> ModelInfo:
    cfg = model.cfg
    if cfg.n_layers < 1:
        raise ModelError(f"the model has {cfg.n_layers} layers; expected at least one")
    info = ModelInfo(
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        n_kv_heads=getattr(cfg, "n_key_value_heads", None) or cfg.n_heads,
        d_head=cfg.d_head,
        n_ctx=cfg.n_ctx,
        d_vocab=cfg.d_vocab,
        rope_follows_length=rope_follows_length(model),
    )
    available = model.hook_dict
    needed = zip(*(info.hooks(site) for site in ("scores", "pattern", "z")), strict=True)
    missing = [name for layer in needed for name in layer if name not in available]
    if missing:
        raise ModelError(
            f"{cfg.architecture} has no hook {missing[0]}"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
            + "; slashpatch needs scores, pattern and z of every layer"
        )
    latent = [i for i, block in enumerate(model.blocks) if hasattr(block.attn, "hook_kv_latent")]
    if latent:
        raise ModelError(
            f"slashpatch refuses {cfg.architecture}: layer {latent[0]} has latent attention (MLA), "
            "where only a part of each query is rotated and all heads share one rotated key; "
            "expected queries and keys per head"
        )
    verify.verify_hooks(model, info)
    this = weakref.ref(model)  # what is remembered of a model must not keep it alive

    def require_model() -> TransformerBridge:
        found = this()
        if found is None:
            raise ModelError("the model that this was read from does not exist any more")
        return found

    def read_qk() -> tuple[LayerQK, ...]:
        return qk_reading.read_layers(require_model(), info)

    def read_projections() -> tuple[projections.LayerProjections, ...]:
        return projections.read_projections(require_model(), whole)

    whole = replace(
        info, saving=_saving(model, info), read_qk=read_qk, read_projections=read_projections
    )
    return whole


def _saving(model: TransformerBridge, info: ModelInfo) -> tuple[str, ...]:
    """Return which arguments in `_SAVING` the model's forward takes and runs with."""
    known = inspect.signature(model.original_model.forward).parameters
    found = tuple(name for name in _SAVING if name in known)
    tokens = probe_tokens(info.d_vocab).to(model.cfg.device)
    try:
        run_probe(model, tokens, [], kwargs={name: _SAVING[name] for name in found})
    except ModelError:  # TransformerLens runs OLMo in low precision with a KV cache only
        return tuple(name for name in found if name != "use_cache")
    return found


def run_for_hooks(
    model: TransformerBridge,
    tokens: Int[Tensor, "batch pos"],
    hooks: Iterable[tuple[str, Any]],
    attention_mask: Tensor | None = None,
) -> None:
    """Run one forward pass for its hooks alone: no more logits than one, and no KV cache."""
    kwargs: dict[str, Any] = {name: _SAVING[name] for name in read(model).saving}
    if attention_mask is not None:
        kwargs["attention_mask"] = attention_mask.to(tokens.device)
    model.run_with_hooks(tokens, fwd_hooks=list(hooks), return_type=None, **kwargs)
