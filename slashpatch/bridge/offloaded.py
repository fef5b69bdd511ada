"""Weights that accelerate keeps elsewhere than in the model: on disk, or in the CPU's memory.

The model's own parameters are then on the meta device, without values. A hook of accelerate puts
the values in for each forward pass of the module that owns them, and takes them out again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class InFile(NamedTuple):
    """Where a weight lies on disk: a file, and the weight's name in it."""

    file: str
    name: str


def _hook(module: torch.nn.Module) -> Any:
    """Return the hook of accelerate that puts in the module's own weights, or None."""
    waiting = [getattr(module, "_hf_hook", None)]
    while waiting:
        hook = waiting.pop(0)
        if getattr(hook, "offload", False) and getattr(hook, "weights_map", None) is not None:
            return hook
        waiting += getattr(hook, "hooks", ())  # of a SequentialHook
    return None


def is_offloaded(module: torch.nn.Module) -> bool:
    """Return whether accelerate puts in the module's own weights for each of its passes only."""
    return _hook(module) is not None


@contextmanager
def loaded(module: torch.nn.Module | None) -> Iterator[None]:
    """Inside, the module's own weights have their values."""
    hook = None if module is None else _hook(module)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def offloaded_weights(hf_model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str]]:
    """Yield each module that has offloaded weights, with the name of each of these in it."""
    for module in hf_model.modules():
        if is_offloaded(module):
            for name, weight in [*module._parameters.items(), *module._buffers.items()]:
                if weight is not None and weight.is_meta:
                    yield module, name


def stored(module: torch.nn.Module, name: str) -> Tensor | InFile:
    """Return an offloaded weight that is in the CPU's memory, or where it lies on disk."""
    weights, key = _entry(module, name)
    index = getattr(weights, "index", {})
    if key in getattr(weights, "state_dict", {}) or key not in index:
        weight: Tensor = weights[key]
        return weight
    file = index[key].get("safetensors_file") or Path(weights.save_folder, f"{key}.dat")
    return InFile(str(file), str(index[key].get("weight_name", key)))


def read_stored(module: torch.nn.Module, name: str) -> Tensor:
    """Return the values of an offloaded weight."""
    weights, key = _entry(module, name)
    weight: Tensor = weights[key]
    return weight.detach()


def full_name(module: torch.nn.Module, name: str) -> str:
    """Return an offloaded weight's name in the whole model, by which tied weights are known."""
    _, key = _entry(module, name)
    key = key.replace("._original_component", "")  # TransformerLens' own modules between
    return key if key != name else f"{name} of module {id(module)}"


def _entry(module: torch.nn.Module, name: str) -> tuple[Any, str]:
    """Return the mapping that holds an offloaded weight, and its key there."""
    hook = _hook(module)
    for weights in getattr(hook.weights_map, "maps", [hook.weights_map]):  # a ChainMap has maps
        if hasattr(weights, "prefix"):
            return weights.dataset, f"{weights.prefix}{name}"
        if name in weights:
            return weights, name
    raise ModelError(f"accelerate has no values for {name} of a {type(module).__name__}")


def places(hf_model: torch.nn.Module) -> list[str]:
    """Return where the weights are, such as ["cpu", "disk"] or ["cuda:0", "cuda:1"].

    "meta" stands for weights that have no values anywhere.
    """
    found = {str(weight.device) for weight in hf_model.parameters() if not weight.is_meta}
    kept = set()
    for module, name in offloaded_weights(hf_model):
        where = stored(module, name)
        found.add("disk" if isinstance(where, InFile) else str(where.device))
        kept.add(id(module._parameters.get(name)))
    lost = any(weight.is_meta and id(weight) not in kept for weight in hf_model.parameters())
    return sorted(found | ({"meta"} if lost else set()))


def input_device(hf_model: PreTrainedModel) -> torch.device | None:
    """Return the device on which the input embedding computes, where token ids must be.

    None for a model whose weights have no values. To be called before a bridge is around the model.
    """
    embedding = hf_model.get_input_embeddings()
    if is_offloaded(embedding):
        return torch.device(_hook(embedding).execution_device)
    weight = next(embedding.parameters(), None)
    if weight is None:
        weight = next((x for x in hf_model.parameters() if not x.is_meta), None)
    return None if weight is None or weight.is_meta else weight.device
