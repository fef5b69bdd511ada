"""Where a result comes from: model, revision, dtype, edits, versions."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def fingerprint(model: TransformerBridge) -> str:
    """SHA-256 over name, shape and a checksum of every row of every weight, first 16 hex digits.

    Of the bits themselves, in integers, so it is the same on every machine. Tells two models of the
    same shape apart, also where single heads were changed, negated or exchanged.
    """
    sha = hashlib.sha256()
    seen = set()
    for name, weight in sorted(model.original_model.state_dict().items()):
        sha.update(f"{name}{list(weight.shape)}{weight.dtype}".encode())
        # The bridge lists a tensor under several names.
        place = (weight.data_ptr(), weight.shape, weight.stride())
        if weight.device.type == "meta" or place in seen:
            continue
        seen.add(place)
        sha.update(_row_checksums(weight.detach()).cpu().numpy().tobytes())
    return sha.hexdigest()[:16]


def _row_checksums(weight: Tensor) -> Tensor:
    """int32 per row, that wraps around: bits mixed, times an odd number that depends on the column.

    Without the mixing, the sign bit would be lost in pairs; without the numbers, the order.
    """
    weight = weight.contiguous()
    rows = weight.view(1, -1) if weight.ndim < 2 else weight.flatten(0, -2)
    whole = rows.shape[-1] * rows.element_size() % 4 == 0
    rows = rows.view(torch.int32) if whole else rows.view(torch.int8).to(torch.int32)
    odd = torch.arange(rows.shape[-1], device=rows.device) * 2654435761 % 2**31 * 2 + 1
    odd = (odd - 2**31).to(torch.int32)
    few = max(1, _AT_ONCE // max(1, rows.shape[-1]))  # what stays in the processor's cache
    return torch.cat(
        [((part ^ (part >> 15)) * odd).sum(-1, dtype=torch.int32) for part in rows.split(few)]
    )


_AT_ONCE = 2**19


def _name(model: TransformerBridge) -> str:
    """The hub id, or the last part of a path."""
    name = str(model.cfg.model_name)
    return Path(name).name if Path(name).is_dir() else name


def provenance(model: TransformerBridge, **details: Any) -> dict[str, Any]:
    """What a result must carry to be repeated, as plain JSON values."""
    from .patching import active_edits, other_hooks

    versions = {"python": platform.python_version()}
    for package in ("slashpatch", "torch", "transformers", "transformer-lens"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "model": _name(model),
        "fingerprint": fingerprint(model),
        "architecture": str(model.cfg.architecture),
        "dtype": str(next(model.original_model.parameters()).dtype).removeprefix("torch."),
        "device": torch.device(model.cfg.device).type,
        "edits": [str(edit) for edit in active_edits(model)],
        "other_hooks": other_hooks(model),
        "versions": versions,
        **details,
    }
