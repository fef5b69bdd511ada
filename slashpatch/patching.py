"""Attach edits to a model: `patch` for a while, `hooks` for TransformerLens' own calls."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import anatomy as anatomies
from .calls import Call, CallWatch
from .edits import Edit, Site, parse_edit
from .errors import EditError, PatchError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Edits in force per model, outermost patch first.
_active: weakref.WeakKeyDictionary[Any, list[Edit]] = weakref.WeakKeyDictionary()


def active_edits(model: TransformerBridge) -> tuple[Edit, ...]:
    """The edits that `patch` holds on the model at this moment, outermost first."""
    return tuple(_active.get(model, ()))


class _Attached:
    """Edits bound to one model: their hook functions, and the record of which of them fired."""

    def __init__(self, model: TransformerBridge, edits: tuple[Edit | str, ...]) -> None:
        self.anatomy = anatomies.read(model)
        self.edits = tuple(_as_edit(edit) for edit in edits)
        for edit in self.edits:
            edit.validate(self.anatomy)
        self.entries: list[tuple[str, Callable[..., Any]]] = []
        self.fired: dict[tuple[str, str], bool] = {}
        self._caches: weakref.WeakSet[Any] = weakref.WeakSet()
        self._touched = False
        states = [edit.prepare(model, self.anatomy) for edit in self.edits]
        for edit, state in zip(self.edits, states, strict=True):
            for layer in edit.layers:
                self._bind(edit, layer, state.get(layer))
        this = weakref.ref(self)

        def end(call: Call, output: Any) -> None:
            attached = this()
            if attached is not None:
                attached._remember_cache(output)

        self.watch = CallWatch(model.original_model, on_end=end)

    def _bind(self, edit: Edit, layer: int, state: Any) -> None:
        memory: dict[str, Tensor] = {}
        heads = edit.heads_in(layer)

        def site() -> Site:
            return Site(layer, heads, self.watch.require(), state, memory)

        for stage, act in edit.stages().items():
            name = self.anatomy.hook(layer, stage)
            self.fired[name, str(edit)] = False
            self.entries.append((name, self._hook(edit, site, act, name, 2 if stage == "z" else 1)))

    def _hook(
        self,
        edit: Edit,
        site_now: Callable[[], Site],
        act: Callable[[Site, Tensor], Tensor],
        name: str,
        axis: int,
    ) -> Callable[..., Tensor]:
        """A hook function that hands the edit its heads, found on `axis`, and puts them back."""

        def hook_fn(tensor: Tensor, hook: Any) -> Tensor:
            if tensor.ndim != 4 or tensor.shape[axis] != self.anatomy.n_heads:
                raise PatchError(
                    f"{edit} expected {name} with 4 axes and {self.anatomy.n_heads} heads, "
                    f"got {list(tensor.shape)}; run without remove_batch_dim"
                )
            site = site_now()
            self._refuse_older_cache(site.call, edit)
            self._touched = True
            self.fired[name, str(edit)] = True
            index = (slice(None),) * axis + (site.heads,)
            part = tensor[index]
            edited = act(site, part)
            if edited is part:
                return tensor
            whole = tensor.clone()
            whole[index] = edited.to(whole.dtype)
            return whole

        hook_fn.__qualname__ = f"slashpatch {edit}"
        return hook_fn

    def _refuse_older_cache(self, call: Call, edit: Edit) -> None:
        if call.past and call.cache not in self._caches:
            raise PatchError(
                f"{edit} was attached after {call.past} tokens had been cached without it; "
                "mixing them would be neither model. Start the generation inside the patch"
            )

    def _remember_cache(self, output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if self._touched and cache is not None:
            self._caches.add(cache)
        self._touched = False

    def require_fired(self) -> None:
        """Raise PatchError for the first hook that never fired."""
        for (name, edit), fired in self.fired.items():
            if not fired:
                raise PatchError(
                    f"{edit} changed nothing: its hook {name} never fired. Run the patched model "
                    "inside the `with` block, with that layer and without resetting its hooks"
                )


def _as_edit(edit: Any) -> Edit:
    if isinstance(edit, str):
        return parse_edit(edit)
    if not isinstance(edit, Edit):
        raise EditError(
            f"expected an edit such as KnockOut('L16H0', 1), got {edit!r} "
            f"of type {type(edit).__name__}"
        )
    return edit


def hooks(model: TransformerBridge, *edits: Edit | str) -> list[tuple[str, Callable[..., Any]]]:
    """`(hook name, function)` pairs of the edits, for `run_with_hooks` and `model.hooks`.

    Use them on this model only, and whole and in order: one edit may need several hooks. They act
    wherever TransformerLens runs them, generation with the KV cache included. Raises like `patch`,
    but cannot know whether you ran them.
    """
    return _Attached(model, edits).entries


@contextlib.contextmanager
def patch(model: TransformerBridge, *edits: Edit | str) -> Iterator[TransformerBridge]:
    """Run the model under some edits; on leaving, the model is what it was, bit for bit.

    Edits act at their place in the forward pass (scores, pattern, z) and there in the order given;
    patches nest, and an inner one acts after an outer one. Text is read by `parse_edit`.

    Raises EditError, HeadError or OffsetError for edits that do not fit the model; ModelError for a
    model that slashpatch refuses; PatchError where the KV cache is older than the patch, and on
    leaving when an edit's hook never fired.
    """
    attached = _Attached(model, edits)
    points = model.hook_dict
    handles = []
    entered = _active.setdefault(model, [])
    entered.extend(attached.edits)
    try:
        for name, hook_fn in attached.entries:
            # Permanent: `reset_hooks` inside the block must not end the patch without a word.
            handles.append((points[name], points[name].add_hook(hook_fn, is_permanent=True)))
        yield model
        if any(handle not in point.fwd_hooks for point, handle in handles):
            raise PatchError(
                "hooks of this patch were removed inside its `with` block, so runs after that were "
                "not edited; leave permanent hooks alone there"
            )
        attached.require_fired()
    finally:
        for point, handle in handles:
            handle.hook.remove()
            point.fwd_hooks[:] = [kept for kept in point.fwd_hooks if kept is not handle]
        attached.watch.close()
        for edit in attached.edits:
            entered.remove(edit)
