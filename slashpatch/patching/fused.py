"""`fused`: TransformerLens' forward pass at the cost of flash attention.

Two things are changed, and restored on leaving. Transformers calls our mask function, which returns
the mask as a rule instead of a matrix. And the keys that a layer's KV cache returns are marked, so
that their product with the queries is a stand-in (`stand_ins`) instead of a matrix. Everything else
is TransformerLens' own code.
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
from ..errors import FusedError, ModelError, SlashpatchError
from ..maths.precision import MASKED, attention_slack
from .engine import FusedEngine, refuse_hooks

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@contextlib.contextmanager
def fused(model: TransformerBridge) -> Iterator[TransformerBridge]:
    """Run a model with flash attention; all hooks but those on scores and pattern still fire.

    Patches, monitors and scans work inside, nested in any order. Results equal those of
    TransformerLens' own attention within the dtype's rounding. Layers with sliding windows or
    soft-capping, and new tokens after cached ones, are computed in blocks of rows, which is slower;
    so are edited heads and layers with attention sinks where gradients are needed. At padding, z is
    zero. Do not copy the model inside the block.

    Raises ModelError for a model whose attention cannot run fused, and FusedError if another hook
    is on `hook_attn_scores` or `hook_pattern`, whose matrices are not formed.
    """
    engine = _engines.get(model)
    if engine is None:
        require_fusible(model)
        engine = _engines[model] = FusedEngine(model)
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
    """Run the model fused where that is possible (see `why_not`), else unchanged."""
    with contextlib.nullcontext() if why_not(model) else fused(model):
        yield model


def engine_of_layers(model: TransformerBridge) -> list[str]:
    """Return how the last forward pass computed each layer's attention.

    "flash", "blocks" (of rows), or "bridge" (TransformerLens' own attention, by its matrix).
    """
    engine = _engines.get(model)
    n_layers = bridge.read(model).n_layers
    return (
        ["bridge"] * n_layers if engine is None else [layer.computed_by for layer in engine.layers]
    )


def is_fused(model: TransformerBridge) -> bool:
    """Return whether the model runs fused now."""
    return model in _engines


def why_not(model: TransformerBridge) -> str | None:
    """Return the reason why the model cannot run fused now, or None if it can."""
    try:
        require_fusible(model)
        refuse_hooks(model)
    except (FusedError, ModelError) as error:
        return str(error)
    return None


_engines: weakref.WeakKeyDictionary[Any, FusedEngine] = weakref.WeakKeyDictionary()
_fusible: weakref.WeakKeyDictionary[Any, tuple[ModelInfo, str | None]] = weakref.WeakKeyDictionary()


def require_fusible(model: TransformerBridge) -> None:
    """Raise ModelError unless both engines agree on a short prompt; verified once for a model."""
    info = bridge.read(model)
    if model not in _fusible or _fusible[model][0] is not info:
        try:
            _verify(model, info)
            _fusible[model] = (info, None)
        except (FusedError, ModelError) as error:
            cause: BaseException | None = error
            while cause is not None and isinstance(cause, SlashpatchError):
                cause = cause.__cause__
            if cause is not None:  # the pass failed, for memory perhaps: it may work next time
                raise ModelError(str(error)) from error
            _fusible[model] = (info, str(error))
    refusal = _fusible[model][1]
    if refusal is not None:
        raise ModelError(refusal)


def _verify(model: TransformerBridge, info: ModelInfo) -> None:
    if model.compatibility_mode:
        raise ModelError(
            "slashpatch cannot run this model fused: in compatibility mode TransformerLens makes "
            "its own masks; use engine='auto', or load the model without compatibility mode"
        )
    tokens = probe_tokens(info.d_vocab).to(model.cfg.device)
    expected: dict[int, Tensor] = {}
    fused_z: dict[int, Tensor] = {}
    largest_score: dict[int, float] = {}

    def record_expected(z: Tensor, hook: Any) -> None:
        expected[hook.layer()] = z

    def record_fused(z: Tensor, hook: Any) -> Tensor:
        fused_z[hook.layer()] = z
        return expected[hook.layer()]  # so that the next layer gets the same input

    def record_scores(scores: Tensor, hook: Any) -> None:
        masked = scores <= MASKED
        largest_score[hook.layer()] = float(scores.masked_fill(masked, 0).abs().max())

    layers = range(info.n_layers)
    hooks: list[tuple[str, Callable[..., Any]]] = [
        (info.hook(layer, "scores"), record_scores) for layer in layers
    ]
    run_probe(model, tokens, hooks + [(info.hook(layer, "z"), record_expected) for layer in layers])
    engine = FusedEngine(model)
    try:
        hooks = [(info.hook(layer, "z"), record_fused) for layer in layers]
        run_probe(model, tokens, hooks, matrices=False)
    except (FusedError, ModelError) as error:
        raise ModelError(f"slashpatch cannot run this model fused: {error}") from error
    finally:
        engine.close()
    for layer in layers:
        if engine.layers[layer].computed_by not in ("flash", "blocks"):
            raise ModelError(
                f"slashpatch cannot run this model fused: the attention of layer {layer} "
                f"({type(model.blocks[layer].attn).__name__}) does not multiply queries with the "
                "keys of its KV cache as slashpatch expects"
            )
        z = expected[layer]
        limit = attention_slack(z.dtype, largest_score[layer]) * max(float(z.abs().max()), 1e-3)
        difference = float((fused_z[layer].double() - z.double()).abs().max())
        if not difference <= limit:
            raise ModelError(
                f"slashpatch cannot run this model fused: z of layer {layer} differs by "
                f"{difference:.2g} from z of TransformerLens' own attention (allowed {limit:.2g})"
            )
