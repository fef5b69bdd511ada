"""Wrap a Transformers model in memory as a TransformerBridge; what loading shares with it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ..errors import ModelError, TooLargeError
from .info import refuse_remote
from .offloaded import input_device, offloaded_weights, places

if TYPE_CHECKING:
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel


def pick_device(device: str | torch.device | None) -> str:
    """Return the name of a device; None picks CUDA, then MPS, then CPU. Raises ModelError."""
    import torch

    if device is not None:
        try:
            return str(torch.device(device))
        except RuntimeError:
            raise ModelError(
                f"unknown device {device!r}; expected cpu, cuda, cuda:0 or mps"
            ) from None
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def pick_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """Return a torch dtype by its name; None is float32. Raises ModelError for an unknown one."""
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"unknown dtype {dtype!r}; expected float32, bfloat16, float16 or float64")
    return found


def bridge_of(model: Any, device: Any, dtype: Any, tokenizer: Any) -> TransformerBridge:
    """Return a bridge that is given, or one around a Transformers model in memory."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel

    refuse_remote(model)
    if isinstance(model, TransformerBridge):
        if device is not None or dtype is not None or tokenizer is not None:
            raise ModelError(
                "a TransformerBridge is returned unchanged, so load takes no device, dtype or "
                "tokenizer with it; use model.to(...), or set model.tokenizer"
            )
        return model
    kind = f"{type(model).__module__}.{type(model).__name__}"
    if isinstance(model, PreTrainedModel):
        with one_error(f"cannot wrap this {type(model).__name__}"):
            return _wrap(model, device, dtype, tokenizer)
    if type(model).__name__ == "HookedTransformer":
        raise ModelError(
            f"slashpatch needs a TransformerBridge, got {kind}, whose hooks are others; load the "
            "same model with slashpatch.load('its hub id')"
        )
    raise ModelError(
        f"expected a directory, a .gguf file, a hub id, a Transformers model (PreTrainedModel) or "
        f"a TransformerBridge, got {kind}"
    )


def _wrap(hf_model: PreTrainedModel, device: Any, dtype: Any, tokenizer: Any) -> TransformerBridge:
    """Return a bridge around a Transformers model; place and dtype stay if they are None."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformer_lens.utilities.attn_implementation import force_eager_attention
    from transformer_lens.utilities.multi_gpu import maybe_cast_floating_params

    if any(isinstance(module, GeneralizedComponent) for module in hf_model.modules()):
        raise ModelError(
            "a TransformerBridge is around it already, and a second one would take the hooks from "
            "the first; use the first, or load the Transformers model again"
        )
    names = [cls.__name__ for cls in type(hf_model).__mro__]
    architecture = next((name for name in names if name in SUPPORTED_ARCHITECTURES), None)
    if architecture is None:
        raise no_adapter(hf_model)
    kept = places(hf_model)
    if "meta" in kept:
        raise ModelError(
            "all its weights are on the meta device; expected weights in memory"
            if kept == ["meta"]
            else "some of its weights are on the meta device and no hook of accelerate loads them"
        )
    if (device is not None or dtype is not None) and next(offloaded_weights(hf_model), None):
        raise ModelError(
            "accelerate keeps its weights elsewhere, where they can be neither moved nor cast; "
            "leave device and dtype out"
        )
    if device is not None:
        hf_model.to(pick_device(device))
    if dtype is not None:
        if getattr(hf_model, "is_quantized", False):
            raise ModelError("its weights are quantized and cannot be cast; leave dtype out")
        # Not hf_model.to(dtype), which also rounds the frequencies of RoPE.
        maybe_cast_floating_params(hf_model, pick_dtype(dtype))
    place = str(input_device(hf_model))
    # Some adapters take a model's attention implementation as it is.
    force_eager_attention(hf_model)
    name = hf_model.name_or_path or type(hf_model).__name__
    if tokenizer is None:
        # Not boot_transformers, which would look for a tokenizer on the model hub.
        return build_bridge_from_module(
            hf_model,
            architecture,
            hf_config=copy.deepcopy(hf_model.config),
            dtype=hf_model.dtype,
            device=place,
            model_name=name,
        ).eval()
    bridge = TransformerBridge.boot_transformers(
        name,
        hf_config_overrides={"architectures": [architecture]},
        hf_model=hf_model,
        tokenizer=tokenizer,
        device=place,
        dtype=hf_model.dtype,
    )
    bridge.cfg.device = place
    return bridge.eval()


def no_adapter(hf_model: Any) -> ModelError:
    """Return the error for a model whose architecture TransformerLens does not support."""
    return ModelError(
        f"TransformerLens {version('transformer-lens')} does not support the architecture "
        f"{type(hf_model).__name__}; expected a causal language model that it has an adapter for"
    )


@contextlib.contextmanager
def one_error(what: str) -> Iterator[None]:
    """Raise any error of the block as a ModelError of one line that begins with `what`."""
    try:
        yield
    except TooLargeError:
        raise
    except Exception as error:  # a broken model can break a library anywhere
        reason = next(iter(str(error).strip().splitlines()), "no message")
        kind = "" if isinstance(error, ModelError) else f"{type(error).__name__}: "
        raise ModelError(f"{what}: {kind}{reason}") from error
