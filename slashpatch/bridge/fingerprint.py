"""A model's fingerprint: which weights it has."""

from __future__ import annotations

import hashlib
import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


_known: weakref.WeakKeyDictionary[Any, tuple[str, str]] = weakref.WeakKeyDictionary()


def fingerprint(model: TransformerBridge) -> str:
    """SHA-256 over name, shape and bits of every weight, first 16 hex digits.

    Remembered until a weight is replaced or changed, which its version, its place and the sums of
    its rows tell.
    """
    mark = hashlib.sha256()
    hf_model = model.original_model
    for weight in itertools.chain(hf_model.parameters(), hf_model.buffers()):
        changes = 0 if weight.is_inference() else weight._version
        place = (weight.data_ptr(), changes, weight.shape, weight.dtype)
        mark.update(repr(place).encode())
        if weight.device.type != "meta" and weight.ndim:
            mark.update(weight.detach().sum(-1).float().cpu().numpy().tobytes())
    if model in _known and _known[model][0] == mark.hexdigest():
        return _known[model][1]
    sha = hashlib.sha256()
    for name, weight in _distinct_weights(model).items():
        sha.update(f"{name}{list(weight.shape)}{weight.dtype}".encode())
        if weight.device.type != "meta":
            bits = weight.contiguous().cpu().reshape(-1).view(torch.uint8)
            sha.update(bits.numpy().data)
    _known[model] = (mark.hexdigest(), sha.hexdigest()[:16])
    return _known[model][1]


def _distinct_weights(model: TransformerBridge) -> dict[str, Tensor]:
    """By the first of its names: the bridge lists a tensor under several."""
    found, seen = {}, set()
    for name, weight in sorted(model.original_model.state_dict().items()):
        place = (weight.data_ptr(), weight.shape, weight.stride())
        if weight.device.type == "meta" or place not in seen:
            found[name] = weight.detach()
            seen.add(place)
    return found
