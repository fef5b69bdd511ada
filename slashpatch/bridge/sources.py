"""Where a model was loaded from, so that another process can load the same one."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: By model: the arguments of `load`, and the weights as they were then.
_sources: weakref.WeakKeyDictionary[Any, tuple[dict[str, Any], Any]] = weakref.WeakKeyDictionary()


def remember(
    model: TransformerBridge, source: str | os.PathLike[str] | None, **arguments: Any
) -> None:
    """Note from which source `load` made the model, and by which further arguments but device.

    A path is noted as an absolute one.
    """
    if source is not None:
        path = Path(source).expanduser()
        source = str(path.resolve()) if path.exists() else str(source)
    _sources[model] = ({"model": source, **arguments}, _state(model))


def source_of(model: TransformerBridge) -> dict[str, Any] | None:
    """Return the arguments with which `load` makes this model again; None if it cannot.

    It cannot where the model was made from an object in memory, or where weights or compatibility
    mode have changed since it was loaded.
    """
    found = _sources.get(model)
    if found is None or found[1] != _state(model):
        return None
    return found[0]


def _state(model: TransformerBridge) -> Any:
    """Return what changes when somebody changes or moves a weight."""
    return (
        bool(model.compatibility_mode),
        tuple(
            (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
            for weight in model.original_model.parameters()
        ),
    )
