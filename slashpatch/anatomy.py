"""Reads a TransformerBridge: which hooks carry scores, pattern and z, and how many heads there are.

Nothing is assumed from a name. Reading a model runs one short forward pass in which every layer's
scores and pattern are overwritten: the pattern must be the softmax of the scores, and clearing the
pattern of some heads must clear z of those heads and no others. A model that does not behave so is
refused, with the layer and the difference.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .calls import by_matrix, internal_passes
from .errors import ModelError, OffsetError
from .heads import Head, HeadsLike, heads, require_heads
from .native import NativeRuns, folded_apart
from .precision import MASKED, rounding
from .slash import as_offsets

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_PROBE_TOKENS = 6


@dataclass(frozen=True)
class Anatomy:
    """What slashpatch knows of a model. All layers have the same heads.

    `kwargs` are the arguments of the forward pass, of those that save work, that it takes.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    n_ctx: int
    d_vocab: int
    kwargs: tuple[str, ...] = ()

    def hook(self, layer: int, site: str) -> str:
        """Hook point name of `scores`, `pattern` or `z` in `layer`."""
        point = {"scores": "hook_attn_scores", "pattern": "hook_pattern", "z": "hook_z"}[site]
        return f"blocks.{layer}.attn.{point}"

    def require(self, wanted: HeadsLike) -> tuple[Head, ...]:
        """The heads named by `wanted`. Raises HeadError if the model lacks one."""
        found = heads(wanted)
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


_known: weakref.WeakKeyDictionary[Any, tuple[Any, Anatomy]] = weakref.WeakKeyDictionary()


def read(model: TransformerBridge) -> Anatomy:
    """Read and verify a bridge; cheap when it was read before.

    Raises ModelError for anything that is no TransformerBridge, is in training mode, or whose hooks
    do not mean what slashpatch takes them to mean.
    """
    from transformer_lens.model_bridge import TransformerBridge

    if not isinstance(model, TransformerBridge):
        raise ModelError(
            f"expected a TransformerBridge, got {type(model).__module__}.{type(model).__name__}; "
            "make one with slashpatch.load(...) or TransformerBridge.boot_transformers(...)"
        )
    if model.training or model.original_model.training:
        raise ModelError(
            "the model is in training mode, where dropout changes the attention from run to run; "
            "call model.eval() first"
        )
    flags = (model.compatibility_mode, model.cfg.use_split_qkv_input, model.cfg.use_attn_in)
    if model in _known and _known[model][0] == flags:
        return _known[model][1]
    anatomy = _read(model)
    _known[model] = (flags, anatomy)
    return anatomy


def first_layer(model: TransformerBridge) -> int:
    """The first layer that counts in the pass under way: `start_at_layer` discards those below."""
    return getattr(model.blocks[0], "_start_at_layer_idx", None) or 0


def _read(model: TransformerBridge) -> Anatomy:
    cfg = model.cfg
    if cfg.n_layers < 1:
        raise ModelError(f"the model has {cfg.n_layers} layers; expected at least one")
    anatomy = Anatomy(
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        n_kv_heads=getattr(cfg, "n_key_value_heads", None) or cfg.n_heads,
        d_head=cfg.d_head,
        n_ctx=cfg.n_ctx,
        d_vocab=cfg.d_vocab,
    )
    available = model.hook_dict
    missing = [
        name
        for layer in range(anatomy.n_layers)
        for name in (anatomy.hook(layer, site) for site in ("scores", "pattern", "z"))
        if name not in available
    ]
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
    _verify(model, anatomy)
    return replace(anatomy, kwargs=_saving(model, anatomy))


@contextmanager
def suspended(model: TransformerBridge) -> Iterator[None]:
    """Run the model without the hooks that others have attached to its hook points."""
    saved = [(point, point._forward_hooks) for point in set(model.hook_points())]
    for point, _ in saved:
        point._forward_hooks = OrderedDict()
    try:
        yield
    finally:
        for point, hooks in saved:
            point._forward_hooks = hooks


@contextmanager
def kept_frequencies(model: TransformerBridge) -> Iterator[None]:
    """Leave rotary modules as they are: dynamic RoPE remembers the longest prompt that it saw."""
    saved = []
    for module in model.original_model.modules():
        buffers = {n: x for n, x in module._buffers.items() if n.endswith("inv_freq")}
        if any(name.endswith("original_inv_freq") for name in {*buffers, *vars(module)}):
            values = {name: buffer.clone() for name, buffer in buffers.items()}
            saved.append((module, buffers, values, dict(vars(module))))
    try:
        yield
    finally:
        for module, buffers, values, attributes in saved:
            for name, buffer in buffers.items():
                buffer.copy_(values[name])  # LongRoPE writes in place
            module._buffers.update(buffers)
            vars(module).update(attributes)


class _Probe:
    """Overwrites one layer's scores and pattern, and keeps what came of it."""

    def __init__(self, layer: int, anatomy: Anatomy) -> None:
        self.layer = layer
        self.anatomy = anatomy
        self.scores: Tensor | None = None
        self.pattern: Tensor | None = None
        self.z: Tensor | None = None

    def on_scores(self, scores: Tensor, hook: Any) -> Tensor:
        noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(self.layer))
        self.scores = scores + noise.to(scores)
        return self.scores

    def on_pattern(self, pattern: Tensor, hook: Any) -> Tensor:
        self.pattern = pattern
        cleared = pattern.clone()
        cleared[:, ::2] = 0
        return cleared

    def on_z(self, z: Tensor, hook: Any) -> None:
        self.z = z

    def hooks(self) -> list[tuple[str, Any]]:
        functions = {"scores": self.on_scores, "pattern": self.on_pattern, "z": self.on_z}
        return [(self.anatomy.hook(self.layer, site), fn) for site, fn in functions.items()]

    def check(self) -> None:
        scores, pattern, z = self.scores, self.pattern, self.z
        if scores is None or pattern is None or z is None:
            site = "scores" if scores is None else "pattern" if pattern is None else "z"
            raise self._refusal(f"the hook {self.anatomy.hook(self.layer, site)} never fired")
        self._check_shapes(scores, pattern, z)
        scores, pattern, z = scores.cpu(), pattern.cpu(), z.cpu()
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if float(pattern.masked_fill(visible, 0).abs().max()) > 0:
            raise self._refusal("its attention looks at later tokens; expected causal attention")
        if float(scores.masked_fill(visible, -torch.inf).max()) > MASKED:
            raise self._refusal("its scores hook fires before the causal mask is applied")
        total = pattern.double().sum(-1, keepdim=True)
        expected = scores.double().masked_fill(~visible, -torch.inf).softmax(-1)
        off = float((pattern.double() / total - expected).abs().max())
        # Weights are at most 1; each is rounded, as is each exponential, and so is their sum.
        tolerance = 4 * rounding(pattern.dtype)
        if not off <= tolerance or float(total.max()) > 1 + tolerance:
            raise self._refusal(
                f"its pattern is not the softmax of its scores (largest difference {off:.2g}); "
                "the scores hook is read-only there, or fires elsewhere"
            )
        self._check_z(z)

    def _check_shapes(self, scores: Tensor, pattern: Tensor, z: Tensor) -> None:
        a = self.anatomy
        square = [1, a.n_heads, _PROBE_TOKENS, _PROBE_TOKENS]
        for name, tensor, shape in (
            ("scores", scores, square),
            ("pattern", pattern, square),
            ("z", z, [1, _PROBE_TOKENS, a.n_heads, a.d_head]),
        ):
            if list(tensor.shape) != shape:
                raise self._refusal(f"its {name} have shape {list(tensor.shape)}, not {shape}")

    def _check_z(self, z: Float[Tensor, "batch pos head d_head"]) -> None:
        size = z.abs().amax((0, 1, 3))
        if float(size[::2].max()) > 0 or not bool((size[1::2] > 0).all()):
            raise self._refusal(
                "clearing the pattern of its even heads did not clear z of just those heads; "
                "the pattern hook is read-only there, or heads are laid out otherwise"
            )

    def _refusal(self, what: str) -> ModelError:
        return ModelError(f"slashpatch refuses this model at layer {self.layer}: {what}")


def probe_tokens(d_vocab: int) -> Int[Tensor, "batch pos"]:
    """A few distinct tokens, the same ones each time."""
    return (torch.arange(_PROBE_TOKENS)[None] * 7 + 3) % d_vocab


def _verify(model: TransformerBridge, anatomy: Anatomy) -> None:
    probes = [_Probe(layer, anatomy) for layer in range(anatomy.n_layers)]
    tokens = probe_tokens(anatomy.d_vocab).to(model.cfg.device)
    run_probe(model, tokens, [pair for probe in probes for pair in probe.hooks()])
    for probe in probes:
        try:
            probe.check()
        except ModelError as error:
            attn = model.blocks[probe.layer].attn
            raise ModelError(f"{error} (its attention is of {type(attn).__name__})") from None
    if folded_apart(model):
        return
    with NativeRuns(model) as native:
        run_probe(model, tokens, native.hooks())
    for layer, off, allowed, unknown in native.found:
        if not unknown and off > allowed:
            attn = model.blocks[layer].attn
            hooked = "; a torch hook sits on it, remove that first" if attn._forward_hooks else ""
            raise ModelError(
                f"slashpatch refuses this model at layer {layer}: TransformerLens' attention "
                f"({type(attn).__name__}) differs by {off:.2g} from the one of Transformers that "
                f"it wraps (allowed {allowed:.2g}), so its hooks carry what the model does not "
                f"compute{hooked}"
            )


def run_probe(
    model: TransformerBridge,
    tokens: Tensor,
    hooks: list[tuple[str, Any]],
    matrices: bool = True,
    kwargs: dict[str, Any] | None = None,
) -> None:
    """One forward pass for the sake of `hooks` alone. Raises ModelError if the model cannot run.

    It forms attention matrices, unless told not to, also where the model runs fused.
    """
    with (
        torch.no_grad(),
        torch.autocast(torch.device(model.cfg.device).type, enabled=False),
        internal_passes(),
        by_matrix(matrices),
        suspended(model),
        kept_frequencies(model),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # what they warn of is what is being found out
        try:
            model.run_with_hooks(tokens, fwd_hooks=hooks, **(kwargs or {}))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise ModelError(
                f"slashpatch refuses this model: a short forward pass failed "
                f"({type(error).__name__}: {error})"
            ) from error


#: Arguments that keep a pass from computing what only its hooks are wanted for.
_SAVING = {"logits_to_keep": 1, "use_cache": False}


def _saving(model: TransformerBridge, anatomy: Anatomy) -> tuple[str, ...]:
    """Those of `_SAVING` that the model has, and can run with."""
    known = inspect.signature(model.original_model.forward).parameters
    found = tuple(name for name in _SAVING if name in known)
    tokens = probe_tokens(anatomy.d_vocab).to(model.cfg.device)
    try:
        run_probe(model, tokens, [], kwargs={name: _SAVING[name] for name in found})
    except ModelError:  # TransformerLens runs OLMo in low precision with a KV cache only
        return tuple(name for name in found if name != "use_cache")
    return found


def run_for_attention(
    model: TransformerBridge,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Tensor | None,
    hooks: Iterable[tuple[str, Any]],
) -> None:
    """One forward pass for the sake of its hooks: no more logits than one, and no KV cache."""
    kwargs: dict[str, Any] = {name: _SAVING[name] for name in read(model).kwargs}
    if attention_mask is not None:
        kwargs["attention_mask"] = attention_mask.to(tokens.device)
    model.run_with_hooks(tokens, fwd_hooks=list(hooks), return_type=None, **kwargs)
