"""How a model gets into another process: its source, or the object itself.

An object travels whole, without its hooks: modules, configuration, buffers and tokenizer by
cloudpickle as Ray does it, and its weights beside that as arrays of bytes, which Ray keeps once on
each machine.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ...errors import WorkerError
from ..attached import other_hooks
from ..info import read
from ..passes import suspended
from ..sources import source_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Shipped:
    """A model on its way into workers.

    Attributes:
        device: Type of its device: "cpu", "cuda" or "mps".
        source: Arguments of `load`; None where the object travels.
        pickled: The object without its weights.
        weights: The bytes of each storage of weights.
    """

    device: str
    source: dict[str, Any] | None = None
    pickled: bytes = b""
    weights: list[Any] = field(default_factory=list)

    def unpack(self) -> TransformerBridge:
        """Return the model, in this process."""
        if self.source is not None:
            from ..loading import load

            return load(**self.source, device=self.device)
        model = _Unpickler(io.BytesIO(self.pickled), self.weights, self.device).load()
        model.cfg.device = self.device
        return model


def ship(model: TransformerBridge) -> Shipped:
    """Return a model as it gets into workers.

    Raises WorkerError for what cannot get there as it is: hooks that are not slashpatch's, a model
    on several devices, autocast, or an object that cannot be pickled.
    """
    read(model)  # refuses what is no model, in slashpatch's own words
    require_shippable(model)
    device = torch.device(model.cfg.device).type
    source = source_of(model)
    if source is not None:
        return Shipped(device, source)
    from ray import cloudpickle

    class Pickler(cloudpickle.Pickler):
        """Puts the storages of tensors aside, each once, as torch.save does."""

        def persistent_id(self, obj: Any) -> Any:
            dtype = None
            if isinstance(obj, torch.storage.TypedStorage):
                obj, dtype = obj._untyped_storage, obj.dtype
            elif not isinstance(obj, torch.UntypedStorage):
                return None
            place = places.setdefault(obj._cdata, len(places))
            if place == len(weights):
                flat: Any = torch.empty(0, dtype=torch.uint8)
                weights.append(flat.set_(obj.cpu()).numpy())
                kept.append(obj)
            return place, dtype

    places: dict[int, int] = {}
    weights: list[Any] = []
    kept: list[Any] = []  # so that no address is used twice
    buffer = io.BytesIO()
    try:
        with _without_hooks(model):
            Pickler(buffer, protocol=5).dump(model)
    except Exception as error:  # any object of the user's may refuse
        raise WorkerError(
            f"the model object cannot be sent to workers ({type(error).__name__}: {error}); load "
            "it from a directory or a hub id, which workers load themselves"
        ) from error
    return Shipped(device, None, buffer.getvalue(), weights)


class _Unpickler:
    """Reads what the pickler of `ship` wrote, with weights of its own on a device."""

    def __init__(self, file: io.BytesIO, weights: list[Any], device: str) -> None:
        import pickle

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, pid: Any) -> Any:
                place, dtype = pid
                if place not in storages:
                    # A copy: what Ray keeps is shared by all workers of the machine.
                    copied = torch.from_numpy(weights[place].copy())
                    storages[place] = copied.to(device).untyped_storage()
                if dtype is None:
                    return storages[place]
                return torch.storage.TypedStorage(
                    wrap_storage=storages[place], dtype=dtype, _internal=True
                )

        storages: dict[int, Any] = {}
        self._unpickler = Unpickler(file)

    def load(self) -> Any:
        """Return the object."""
        return self._unpickler.load()


def require_shippable(model: TransformerBridge) -> None:
    """Raise WorkerError for what acts on the model here and would not act in workers."""
    stay = "; remove it, or leave workers out to stay in this process"
    others = other_hooks(model)
    others += [
        str(point.name)
        for point in model.hook_points()
        if point.bwd_hooks or len(point._forward_hooks) > len(point.fwd_hooks)
    ]
    if others:
        raise WorkerError(
            f"a hook that is not slashpatch's is on {others[0]}, and cannot be sent to workers"
            + stay
        )
    points = set(model.hook_points())
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if module not in points and not all(map(_is_known, hooks)):
            raise WorkerError(
                f"a torch hook is on {name or 'the model'}, and cannot be sent to workers" + stay
            )
    places = {weight.device for weight in model.original_model.parameters()}
    if len(places) > 1 or any(place.type == "meta" for place in places):
        raise WorkerError(
            f"the model lies on {', '.join(sorted(map(str, places)))}; workers take a model on one "
            "device"
        )
    if torch.is_autocast_enabled(torch.device(model.cfg.device).type):
        raise WorkerError("autocast is on, and would not be in workers" + stay)


def _is_known(hook: Any) -> bool:
    """Whether a torch hook is TransformerLens' own, which travels, or one of our `watch`."""
    home = str(getattr(hook, "__module__", ""))
    return home.startswith("transformer_lens.") or home == "slashpatch.bridge.watch"


@contextmanager
def _without_hooks(model: TransformerBridge) -> Iterator[None]:
    """Take the hooks of edits, and those of `watch`, off the model for a while."""
    points = [(point, point.fwd_hooks) for point in set(model.hook_points())]
    watched = model.original_model
    saved = (watched._forward_hooks, watched._forward_pre_hooks)
    try:
        watched._forward_hooks, watched._forward_pre_hooks = OrderedDict(), OrderedDict()
        for point, _ in points:
            point.fwd_hooks = []
        with suspended(model):
            yield
    finally:
        watched._forward_hooks, watched._forward_pre_hooks = saved
        for point, noted in points:
            point.fwd_hooks = noted
