"""A hash of a model's weights, by which results say which model they come from."""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .offloaded import InFile, full_name, is_offloaded, offloaded_weights, read_stored, stored

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


_known: weakref.WeakKeyDictionary[Any, tuple[str, str]] = weakref.WeakKeyDictionary()


def fingerprint(model: TransformerBridge) -> str:
    """Return SHA-256 over the name, shape and bits of every weight, its first 16 hex digits.

    It does not depend on where the weights are: those that accelerate keeps on disk or in the CPU's
    memory are read there. The result is cached until a weight changes. A change is noticed by
    torch's version counter, the weight's address, and the sums of its rows; on disk by the file's
    time and size.
    """
    state = hashlib.sha256()
    hf_model = model.original_model
    for weight in itertools.chain(hf_model.parameters(), hf_model.buffers()):
        _add_state(state, weight)
    for module, name in offloaded_weights(hf_model):
        where = stored(module, name)
        if isinstance(where, InFile):
            file = Path(where.file).stat()
            state.update(repr((where, file.st_mtime_ns, file.st_size)).encode())
        else:
            _add_state(state, where)
    if model in _known and _known[model][0] == state.hexdigest():
        return _known[model][1]
    sha = hashlib.sha256()
    for name, weight in _distinct_weights(model):
        sha.update(f"{name}{list(weight.shape)}{weight.dtype}".encode())
        if weight.device.type != "meta":
            bits = weight.contiguous().cpu().reshape(-1).view(torch.uint8)
            sha.update(bits.numpy().data)
    _known[model] = (state.hexdigest(), sha.hexdigest()[:16])
    return _known[model][1]


def _add_state(state: Any, weight: Tensor) -> None:
    """Add what tells that a weight in memory has changed."""
    version = 0 if weight.is_inference() else weight._version
    identity = (weight.data_ptr(), version, weight.shape, weight.dtype)
    state.update(repr(identity).encode())
    if weight.device.type != "meta" and weight.ndim:
        state.update(weight.detach().sum(-1).float().cpu().numpy().tobytes())


def _distinct_weights(model: TransformerBridge) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight once, under the first of its names: tied weights have several."""
    hf_model = model.original_model
    tied = getattr(hf_model, "all_tied_weights_keys", None) or {}
    seen: set[Any] = set()
    for name, weight in sorted(hf_model.state_dict().items()):
        identity: Any = (weight.data_ptr(), weight.shape, weight.stride())
        if weight.device.type == "meta":
            path, _, last = name.rpartition(".")
            module = hf_model.get_submodule(path)
            if not is_offloaded(module):
                yield name, weight.detach()
                continue
            identity = full_name(module, last)
            identity = tied.get(identity, identity)
            if identity in seen:
                continue
            seen.add(identity)
            yield name, read_stored(module, last)
        elif identity not in seen:
            seen.add(identity)
            yield name, weight.detach()
