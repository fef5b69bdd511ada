"""A hash of a model's weights, by which results say which model they come from."""

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
    """Return SHA-256 over the name, shape and bits of every weight, its first 16 hex digits.

    The result is cached until a weight changes. A change is noticed by torch's version counter, the
    weight's address, and the sums of its rows.
    """
    state = hashlib.sha256()
    hf_model = model.original_model
    for weight in itertools.chain(hf_model.parameters(), hf_model.buffers()):
        version = 0 if weight.is_inference() else weight._version
        identity = (weight.data_ptr(), version, weight.shape, weight.dtype)
        state.update(repr(identity).encode())
        if weight.device.type != "meta" and weight.ndim:
            state.update(weight.detach().sum(-1).float().cpu().numpy().tobytes())
    if model in _known and _known[model][0] == state.hexdigest():
        return _known[model][1]
    sha = hashlib.sha256()
    for name, weight in _distinct_weights(model).items():
        sha.update(f"{name}{list(weight.shape)}{weight.dtype}".encode())
        if weight.device.type != "meta":
            bits = weight.contiguous().cpu().reshape(-1).view(torch.uint8)
            sha.update(bits.numpy().data)
    _known[model] = (state.hexdigest(), sha.hexdigest()[:16])
    return _known[model][1]


def _distinct_weights(model: TransformerBridge) -> dict[str, Tensor]:
    """Return each weight once, under the first of its names: tied weights have several."""
    weights, seen = {}, set()
    for name, weight in sorted(model.original_model.state_dict().items()):
        identity = (weight.data_ptr(), weight.shape, weight.stride())
        if weight.device.type == "meta" or identity not in seen:
            weights[name] = weight.detach()
            seen.add(identity)
    return weights
