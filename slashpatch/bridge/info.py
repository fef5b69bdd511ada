"""`read(model)`: all that slashpatch knows of a TransformerBridge, verified once and remembered.

Nothing is assumed from a name. Short forward passes check that the hooks carry what their names say
(`verify`) and that queries, keys and frequencies reproduce the scores (`qk_reading`). A model that
does not behave so is refused, with the layer and the difference.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from ..errors import ModelError, OffsetError
from ..heads import Head, HeadsLike, heads, require_heads
from ..maths.offsets import as_offsets
from . import qk_reading, verify
from .frequencies import rope_follows_length
from .passes import probe_tokens, run_probe
from .qk import LayerQK

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Arguments that keep a forward pass from computing what only its hooks are wanted for.
_SAVING = {"logits_to_keep": 1, "use_cache": False}
_HOOKS = {
    "block": "hook_in",
    "input": "attn.hook_in",
    "cos": "attn.hook_cos",
    "sin": "attn.hook_sin",
    "scores": "attn.hook_attn_scores",
    "pattern": "attn.hook_pattern",
    "z": "attn.hook_z",
    "output": "hook_attn_out",
}


@dataclass(frozen=True)
class ModelInfo:
    """What slashpatch has verified of one model. All layers have the same heads.

    Attributes:
        n_kv_heads: Key heads of each layer; fewer than `n_heads` under grouped-query attention.
        d_head: Width of a head.
        n_ctx: Longest prompt, in tokens.
        d_vocab: Size of the vocabulary.
        saving: Which arguments that save work (`logits_to_keep`, `use_cache`) its forward takes.
        rope_follows_length: Whether RoPE's frequencies depend on the prompt's length (dynamic NTK,
            LongRoPE).
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    n_ctx: int
    d_vocab: int
    saving: tuple[str, ...] = ()
    rope_follows_length: bool = False
    _model: weakref.ref[Any] | None = field(default=None, repr=False, compare=False)
    _read: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def hook(self, layer: int, site: str) -> str:
        """Hook point name of a site in `layer`.

        Sites: the `block`'s input; the attention's `input`, `cos`, `sin`, `scores`, `pattern`, `z`
        and `output`. Those of queries and keys differ from family to family: see `qk`.
        """
        return f"blocks.{layer}.{_HOOKS[site]}"

    def hooks(self, site: str) -> list[str]:
        """Hook point names of a site in every layer."""
        return [self.hook(layer, site) for layer in range(self.n_layers)]

    @property
    def heads(self) -> list[Head]:
        """Every query head, layer by layer."""
        return [Head(la, head) for la in range(self.n_layers) for head in range(self.n_heads)]

    @property
    def qk(self) -> tuple[LayerQK, ...]:
        """Queries, keys and rotation of every layer; verified on first use, then remembered.

        Raises ModelError where they cannot be found or do not reproduce the scores.
        """
        if not self._read:
            model = None if self._model is None else self._model()
            if model is None:
                raise ModelError("the model that this was read from does not exist any more")
            self._read["layers"] = qk_reading.read_layers(model, self)
        found: tuple[LayerQK, ...] = self._read["layers"]
        return found

    def require(self, wanted: HeadsLike) -> tuple[Head, ...]:
        """Return the heads that `wanted` stands for, whole layers included.

        Raises HeadError if the model lacks one.
        """
        found = heads(wanted, n_heads=self.n_heads)
        require_heads(found, self.n_layers, self.n_heads)
        return found

    def require_offsets(self, wanted: Any) -> tuple[int, ...]:
        """The offsets named by `wanted`. Raises OffsetError if the context cannot hold one."""
        found = as_offsets(wanted)
        if found[-1] >= self.n_ctx:
            raise OffsetError(
                f"offset {found[-1]} does not fit the model's context of {self.n_ctx} tokens; "
                f"expected 0 to {self.n_ctx - 1}"
            )
        return found


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
        _model=weakref.ref(model),
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
    return replace(info, saving=_saving(model, info))


def _saving(model: TransformerBridge, info: ModelInfo) -> tuple[str, ...]:
    """Those of `_SAVING` that the model has, and can run with."""
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
