"""`fused`: flash attention under a bridge's own attention code and hooks.

Two seams, both undone on leaving. Transformers asks a mask function, registered under a name of
ours, for each pass's mask, and gets a rule instead of a matrix. And each layer's keys, as they come
from the KV cache, are marked, so that their product with the queries is noted and not formed
(`symbolic`). All else is TransformerLens' own forward pass.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import bridge
from ..bridge import ModelInfo
from ..bridge.passes import probe_tokens, run_probe
from ..errors import FusedError, ModelError
from ..maths.precision import MASKED, attention_slack
from .engine import _Engine, refuse_hooks

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


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
    n_layers = bridge.read(model).n_layers
    return ["bridge"] * n_layers if engine is None else [layer.way for layer in engine.layers]


def is_fused(model: TransformerBridge) -> bool:
    """Whether the model runs fused at the moment."""
    return model in _engines


def why_not(model: TransformerBridge) -> str | None:
    """What keeps the model from running fused now; None if nothing does."""
    try:
        require_fusible(model)
        refuse_hooks(model)
    except (FusedError, ModelError) as error:
        return str(error)
    return None


_engines: weakref.WeakKeyDictionary[Any, _Engine] = weakref.WeakKeyDictionary()
_fusible: weakref.WeakKeyDictionary[Any, tuple[ModelInfo, str | None]] = weakref.WeakKeyDictionary()


def require_fusible(model: TransformerBridge) -> None:
    """Raise ModelError unless both engines agree on a short input; cheap when read before."""
    info = bridge.read(model)
    if model not in _fusible or _fusible[model][0] is not info:
        try:
            _verify(model, info)
            _fusible[model] = (info, None)
        except (FusedError, ModelError) as error:
            _fusible[model] = (info, str(error))
    refusal = _fusible[model][1]
    if refusal is not None:
        raise ModelError(refusal)


def _verify(model: TransformerBridge, info: ModelInfo) -> None:
    if model.compatibility_mode:
        raise ModelError(
            "slashpatch cannot run this model fused: in compatibility mode TransformerLens masks "
            "otherwise; leave engine='auto', or load the model without it"
        )
    tokens = probe_tokens(info.d_vocab).to(model.cfg.device)
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

    layers = range(info.n_layers)
    hooks: list[tuple[str, Callable[..., Any]]] = [
        (info.hook(layer, "scores"), keep_scores) for layer in layers
    ]
    run_probe(model, tokens, hooks + [(info.hook(layer, "z"), keep) for layer in layers])
    engine = _Engine(model)
    try:
        hooks = [(info.hook(layer, "z"), compare) for layer in layers]
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
