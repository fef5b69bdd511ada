"""Attach edits to a model: `patch` for a while, `hooks` for TransformerLens' own calls."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .. import bridge
from ..edits import Edit
from ..errors import PatchError
from .attachment import Attachment

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def hooks(model: TransformerBridge, *edits: Edit | str) -> list[tuple[str, Callable[..., Any]]]:
    """Return `(hook name, function)` pairs of the edits, for `run_with_hooks` and `model.hooks`.

    Use them on this model only, and whole and in order: one edit may need several hooks. They act
    wherever TransformerLens runs them, generation with the KV cache included. Raises like `patch`,
    but cannot know whether you ran them. A KV cache filled under edits stays theirs: going on with
    it without them is not noticed.
    """
    return [(hook.name, hook.function) for hook in Attachment(model, edits).hooks]


@contextlib.contextmanager
def patch(model: TransformerBridge, *edits: Edit | str) -> Iterator[TransformerBridge]:
    """Run the model under some edits; on leaving, the model is what it was, bit for bit.

    Edits act at their place in the forward pass (scores, pattern, z) and there in the order given;
    patches nest, and an inner one acts after an outer one. Text is read by `parse_edit`.

    Raises EditError, HeadError or OffsetError for edits that do not fit the model; ModelError for a
    model that slashpatch refuses; PatchError where the KV cache is older than the patch, where
    another thread's patch is active on the model, and on leaving when an edit's hook never fired.
    A KV cache filled inside the block must not be used after it: that is not noticed. Do not copy
    the model inside: the copy would have the patch's hooks, which act on this model only.
    """
    bridge.read(model)
    with _alone(model):
        attachment = Attachment(model, edits)
        points = model.hook_dict
        handles = []
        try:
            for name, function, first in attachment.hooks:
                # Permanent: `reset_hooks` inside the block must not end the patch without a word.
                handle = points[name].add_hook(function, is_permanent=True, prepend=first)
                handles.append((points[name], handle))
            yield model
            if any(handle not in point.fwd_hooks for point, handle in handles):
                raise PatchError(
                    "hooks of this patch were removed inside its `with` block, so runs after that "
                    "were not edited; leave permanent hooks alone there"
                )
            attachment.require_fired()
        finally:
            for point, handle in handles:
                handle.hook.remove()
                point.fwd_hooks[:] = [kept for kept in point.fwd_hooks if kept is not handle]
            attachment.close()


_lock = threading.Lock()
#: By model: how many patches each thread has on it.
_patching: weakref.WeakKeyDictionary[Any, Counter[int]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def _alone(model: TransformerBridge) -> Iterator[None]:
    """Raise PatchError while another thread has a patch on the model: hooks act in all threads."""
    own = threading.get_ident()
    with _lock:
        active = _patching.setdefault(model, Counter())
        if any(count for thread, count in active.items() if thread != own):
            raise PatchError(
                "another thread has a patch on this model, and its edits would act in this thread "
                "too; load one model for each thread, or hold a lock while you patch and run"
            )
        active[own] += 1
    try:
        yield
    finally:
        with _lock:
            active[own] -= 1
