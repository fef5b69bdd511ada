"""Where a result comes from: model, weights, dtype, edits, versions."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .attached import active_edits, other_hooks
from .fingerprint import fingerprint
from .offloaded import places

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def model_name(model: TransformerBridge) -> str:
    """Return the model's hub id, or the folder's name for a model loaded from a folder."""
    name = str(model.cfg.model_name)
    return Path(name).name if Path(name).is_dir() else name


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for package in ("slashpatch", "torch", "transformers", "transformer-lens"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def provenance(model: TransformerBridge, **details: Any) -> dict[str, Any]:
    """Return what is needed to repeat a result, as plain JSON values; `details` are added.

    Keys: model, fingerprint (of the weights), architecture, dtype, device, edits and other hooks on
    the model now, and versions of Python and the libraries; where weights are on disk or on several
    devices, also weights_on.
    """
    spread = places(model.original_model)
    return {
        "model": model_name(model),
        "fingerprint": fingerprint(model),
        "architecture": str(model.cfg.architecture),
        "dtype": str(next(model.original_model.parameters()).dtype).removeprefix("torch."),
        "device": torch.device(model.cfg.device).type,
        **({"weights_on": spread} if "disk" in spread or len(spread) > 1 else {}),
        "edits": [str(edit) for edit in active_edits(model)],
        "other_hooks": other_hooks(model),
        "versions": versions(),
        **details,
    }
