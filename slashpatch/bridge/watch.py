"""Follow the forward passes of a model: one watch a model, and one `ForwardCall` a pass."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from ..errors import PatchError
from .forward_call import ForwardCall, read_call

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@runtime_checkable
class Follower(Protocol):
    """What `ForwardWatch` calls when a forward pass starts and ends."""

    def on_pass_start(self, call: ForwardCall) -> None:
        """Called before the pass."""
        ...

    def on_pass_end(self, call: ForwardCall, output: Any) -> None:
        """Called after the pass; `output` is None after an exception."""
        ...


class ForwardWatch:
    """The current forward pass of one model in each thread, and the followers to tell about it.

    Followers are held by weak references and called in the order in which they began to follow. The
    model has torch hooks only while it has followers.
    """

    def __init__(self, hf_model: torch.nn.Module) -> None:
        self._model = weakref.ref(hf_model)
        self._followers: list[weakref.ref[Follower]] = []
        self._local = threading.local()
        self._handles: tuple[Any, ...] = ()

    @property
    def current(self) -> ForwardCall | None:
        """The forward pass that this thread is in, if any."""
        return self._calls[-1] if self._calls else None

    @property
    def followers(self) -> list[Follower]:
        """Those who follow the model now."""
        return [found for ref in self._followers if (found := ref()) is not None]

    def require(self) -> ForwardCall:
        """Return the current forward pass. Raises PatchError outside one."""
        if self.current is None:
            raise PatchError(
                "a hook of slashpatch fired outside a forward pass of the model that it was made "
                "for. Run that model; on a copy that was made while it was patched, call "
                "reset_hooks(including_permanent=True) first"
            )
        return self.current

    def follow(self, follower: Follower) -> None:
        """Call `follower` for every forward pass, until `unfollow` or until it is freed."""
        self._followers.append(weakref.ref(follower))
        if not self._handles:
            self._attach()

    def unfollow(self, follower: Follower) -> None:
        """Stop calling `follower`."""
        self._followers = [ref for ref in self._followers if ref() not in (follower, None)]
        if not self._followers:
            self._detach()

    def _attach(self) -> None:
        model = self._model()
        assert model is not None
        this = weakref.ref(self)  # a copy of the model has its hooks too, and is not this model

        # Torch may call a hook that it is about to forget without its keyword arguments.
        def start(module: Any, args: Any, kwargs: Any = None) -> None:
            watch = this()
            if watch is not None and kwargs is not None and watch._model() is module:
                watch._start(read_call(args, kwargs))

        def end(module: Any, args: Any, kwargs: Any, output: Any = None) -> None:
            watch = this()
            if watch is not None and watch._model() is module:
                watch._end(output)

        self._handles = (
            model.register_forward_pre_hook(start, with_kwargs=True),
            model.register_forward_hook(end, with_kwargs=True, always_call=True),
        )

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = ()
        self._local = threading.local()  # Ctrl-C leaves passes whose end nobody saw

    @property
    def _calls(self) -> list[ForwardCall]:
        """The passes that this thread is in, the innermost last: a hook may run the model too."""
        found: list[ForwardCall] = self._local.__dict__.setdefault("calls", [])
        return found

    def _start(self, call: ForwardCall) -> None:
        # Followers that were freed leave here: the collector may run while torch goes through its
        # hooks, so they cannot take the hooks off themselves.
        self._followers = [ref for ref in self._followers if ref() is not None]
        if not self._followers:
            self._detach()
            return
        self._calls.append(call)
        for follower in self.followers:
            call.followers.append(follower)
            follower.on_pass_start(call)

    def _end(self, output: Any) -> None:
        if not self._calls:
            return
        call = self._calls.pop()
        errors = []
        for follower in call.followers:  # each of those that saw the start, whatever others raise
            try:
                follower.on_pass_end(call, output)
            except Exception as error:  # raised below
                errors.append(error)
        call.followers.clear()
        if errors:
            raise errors[0]


_watches: weakref.WeakKeyDictionary[torch.nn.Module, ForwardWatch] = weakref.WeakKeyDictionary()


def watch(model: TransformerBridge) -> ForwardWatch:
    """Return the one watch of a model: of the Transformers model that the bridge wraps."""
    wrapped = model.original_model
    found = _watches.get(wrapped)
    if found is None:
        found = _watches[wrapped] = ForwardWatch(wrapped)
    return found
