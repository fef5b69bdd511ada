"""Attach edits to a model: `patch` for a while, `hooks` for TransformerLens' own calls."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import anatomy as anatomies
from . import rope
from .calls import Call, CallWatch
from .edits import Edit, Site, parse_edit
from .errors import EditError, PatchError
from .private import PrivateKeys, acquire, private_of
from .qk import HookLayout, LayerQK
from .symbolic import Pattern, Scores, noted

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_serial = itertools.count(1)
_MARK = "_slashpatch_patches"


def active_edits(model: TransformerBridge) -> tuple[Edit, ...]:
    """The edits whose hooks are on the model at this moment, in the order of attaching."""
    found: dict[tuple[int, int], Edit] = {}
    for handle in _handles(model):
        mark = getattr(handle.user_hook, "slashpatch", None)
        if mark is not None:
            serial, index, edit = mark
            found[serial, index] = edit
    return tuple(found[key] for key in sorted(found))


def other_hooks(model: TransformerBridge) -> list[str]:
    """Names of hook points that carry hooks of somebody else, which may change what is measured."""
    return sorted(
        {
            str(point.name)
            for point in model.hook_points()
            for handle in point.fwd_hooks
            if not hasattr(handle.user_hook, "slashpatch")
        }
    )


def _handles(model: TransformerBridge) -> Iterator[Any]:
    for point in model.hook_points():
        yield from point.fwd_hooks


class _Attached:
    """Edits bound to one model: their hook functions, and the record of which of them fired."""

    def __init__(self, model: TransformerBridge, edits: tuple[Edit | str, ...]) -> None:
        self.anatomy = anatomies.read(model)
        self.serial = next(_serial)
        self._model = weakref.ref(model)
        self.edits = tuple(as_edit(edit) for edit in edits)
        for edit in self.edits:
            edit.validate(self.anatomy)
        self.entries: list[tuple[str, Callable[..., Any]]] = []
        self.fired: dict[tuple[str, str], bool] = {}
        self._touched = False
        self.rewrites: set[Callable[..., Any]] = set()
        states = [edit.prepare(model, self.anatomy) for edit in self.edits]
        stages = {stage for edit in self.edits for stage in edit.stages()}
        self._qk = rope.read(model) if stages & {"query", "key"} else ()
        self._private: PrivateKeys | None = None
        self._end_private: Callable[[], Any] = lambda: None
        if "key" in stages:
            self._private, self._end_private = acquire(model, self)
        for index, (edit, state) in enumerate(zip(self.edits, states, strict=True)):
            for layer in edit.layers:
                self._bind(edit, index, layer, state.get(layer))
        self._add_private_hooks()
        this = weakref.ref(self)

        def end(call: Call, output: Any) -> None:
            attached = this()
            if attached is not None:
                attached._remember_cache(output)

        self.watch = CallWatch(model.original_model, on_end=end)

    def _bind(self, edit: Edit, index: int, layer: int, state: Any) -> None:
        memory: dict[str, Tensor] = {}
        heads = edit.heads_in(layer)
        qk = self._qk[layer] if self._qk else None

        def site() -> Site:
            call = self.watch.require()
            self._refuse_older_cache(call, edit)
            _ = call.real  # refuses masks under which columns do not count tokens
            private = private_of(self._model()) if qk is not None else None
            frequencies = {} if private is None else private.frequencies
            return Site(layer, heads, self.anatomy.n_heads, call, state, memory, qk, frequencies)

        hook_fn: Callable[..., Any]
        for stage, act in edit.stages().items():
            if stage == "key":
                name, hook_fn = self._key_hook(site, act, layer)
            elif stage == "query":
                assert qk is not None
                name, hook_fn = qk.q.name, self._hook(edit, site, act, qk.q.name, 2, qk)
            else:
                name = self.anatomy.hook(layer, stage)
                hook_fn = self._hook(edit, site, act, name, 2 if stage == "z" else 1)
            self._add(name, str(edit), layer, hook_fn, (self.serial, index, edit))

    def _add(
        self, name: str, what: str, layer: int, hook_fn: Callable[..., Any], mark: Any = None
    ) -> None:
        """Note a hook function that must fire; `mark` says which edit it acts for."""
        self.fired[name, what] = False

        def marked(tensor: Any, hook: Any) -> Any:
            call, model = self.watch.current, self._model()
            counts = call is None or not call.internal
            if counts and (model is None or layer >= anatomies.first_layer(model)):
                self.fired[name, what] = True
            self._touched = True
            return hook_fn(tensor, hook)

        marked.slashpatch = mark or (self.serial, 0, self.edits[0])  # type: ignore[attr-defined]
        marked.rewrites = mark is None  # type: ignore[attr-defined]
        marked.__qualname__ = f"slashpatch {what}"
        self.entries.append((name, marked))

    def _hook(
        self,
        edit: Edit,
        site_now: Callable[[], Site],
        act: Callable[[Site, Tensor], Tensor],
        name: str,
        axis: int,
        queries: LayerQK | None = None,
    ) -> Callable[..., Any]:
        """A hook function that hands the edit its heads, found on `axis`, and puts them back."""
        layout = None if queries is None else queries.q

        def hook_fn(tensor: Any, hook: Any) -> Any:
            if isinstance(tensor, (Scores, Pattern)):
                site = site_now()
                site.call.cached_columns(tensor.shape[-1])
                return noted(tensor, site.heads, edit.diagonal_changes())
            canonical = tensor if layout is None else layout.read(tensor, self.anatomy.d_head)
            if canonical.ndim != 4 or canonical.shape[axis] != self.anatomy.n_heads:
                raise PatchError(
                    f"{edit} expected {name} with 4 axes and {self.anatomy.n_heads} heads, "
                    f"got {list(tensor.shape)}; run without remove_batch_dim"
                )
            site = site_now()
            index = (slice(None),) * axis + (site.heads,)
            part = canonical[index]
            if queries is not None:
                part = queries.turned_back(queries.q, part, site.call.rope_positions)
            edited = act(site, part)
            if edited is part:
                return tensor
            if queries is not None:
                edited = queries.turned_on(queries.q, edited, site.call.rope_positions)
            whole = canonical.clone()
            whole[index] = edited.to(whole.dtype)
            if queries is None:
                return whole
            private = private_of(self._model())
            if private is not None:
                private.note_queries(queries, whole)
            return queries.q.write(whole)

        return hook_fn

    def _key_hook(
        self, site_now: Callable[[], Site], act: Callable[[Site, Tensor], Tensor], layer: int
    ) -> tuple[str, Callable[..., None]]:
        """The shared keys go on untouched; the edit's heads get edited copies of their own."""
        qk, private = self._qk[layer], self._private
        assert private is not None

        def hook_fn(tensor: Tensor, hook: Any) -> None:
            site = site_now()
            shared = qk.k.read(tensor, self.anatomy.d_head)
            shared = qk.turned_back(qk.k, shared, site.call.rope_positions)
            n_heads = self.anatomy.n_heads
            private.edit_keys(layer, site.heads, shared, n_heads, lambda own: act(site, own))

        return qk.k.name, hook_fn

    def _add_private_hooks(self) -> None:
        """Catch rotated queries, cos and sin, and rewrite the scores of heads with private keys.

        The rewrite goes before every hook on the scores: it says what they are.
        """
        private = self._private
        if private is None:
            return
        layers = {
            layer: edit for edit in self.edits if "key" in edit.stages() for layer in edit.layers
        }
        first = []
        for layer, edit in sorted(layers.items(), key=lambda item: item[0]):
            qk = self._qk[layer]
            prefix = f"blocks.{layer}.attn"

            carrier = qk.rotated_q or qk.q

            def catch_q(
                tensor: Tensor, hook: Any, layer: int = layer, carrier: HookLayout = carrier
            ) -> None:
                private.q[layer] = carrier.read(tensor, self.anatomy.d_head)

            def catch_cos(tensor: Tensor, hook: Any, layer: int = layer) -> None:
                private.tables[layer, "cos"] = tensor

            def catch_sin(tensor: Tensor, hook: Any, layer: int = layer) -> None:
                private.tables[layer, "sin"] = tensor

            def rewrite(scores: Any, hook: Any, qk: LayerQK = qk) -> Any:
                _require_first(hook)
                return private.rewrite(qk, scores, self.watch.require())

            self._add(carrier.name, str(edit), layer, catch_q)
            if qk.rotary is not None:
                self._add(f"{prefix}.hook_cos", str(edit), layer, catch_cos)
                self._add(f"{prefix}.hook_sin", str(edit), layer, catch_sin)
            before = len(self.entries)
            self._add(f"{prefix}.hook_attn_scores", f"{edit} (keys of its own)", layer, rewrite)
            first += self.entries[before:]
            del self.entries[before:]
        self.entries[:0] = first
        self.rewrites = {hook_fn for _, hook_fn in first}

    def _refuse_older_cache(self, call: Call, edit: Edit) -> None:
        if call.past and self.serial not in getattr(call.cache, _MARK, ()):
            raise PatchError(
                f"{edit} was attached after {call.past} tokens had been cached without it; "
                "mixing them would be neither model. Start the generation inside the patch"
            )

    def _remember_cache(self, output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        if self._touched and cache is not None:
            # On the cache itself, so that a copy of it is known too.
            setattr(cache, _MARK, {*getattr(cache, _MARK, ()), self.serial})
        self._touched = False

    def close(self) -> None:
        """Stop following the model; the hook functions are removed by whoever added them."""
        self.watch.close()
        self._end_private()
        if self._private is not None and not self._private.users:
            self._private.close()

    def require_fired(self) -> None:
        """Raise PatchError for the first hook that never fired."""
        for (name, edit), fired in self.fired.items():
            if not fired:
                raise PatchError(
                    f"{edit} changed nothing: its hook {name} never fired. Run the patched model "
                    "inside the `with` block, with that layer and without resetting its hooks"
                )


def _require_first(hook: Any) -> None:
    """Raise PatchError if a hook on the scores ran before they were computed from private keys."""
    for handle in getattr(hook, "_target", hook).fwd_hooks:
        if getattr(handle.user_hook, "rewrites", False):
            return
        raise PatchError(
            f"a hook on {hook.name} ran before slashpatch computed the scores of heads that have "
            "keys of their own, and would be lost; attach the edits with slashpatch.patch, or first"
        )


def as_edit(edit: Any) -> Edit:
    """An edit, or the one that a text says. Raises EditError for anything else."""
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
    but cannot know whether you ran them. A KV cache filled under edits stays theirs: going on with
    it without them is not noticed.
    """
    return _Attached(model, edits).entries


@contextlib.contextmanager
def patch(model: TransformerBridge, *edits: Edit | str) -> Iterator[TransformerBridge]:
    """Run the model under some edits; on leaving, the model is what it was, bit for bit.

    Edits act at their place in the forward pass (scores, pattern, z) and there in the order given;
    patches nest, and an inner one acts after an outer one. Text is read by `parse_edit`.

    Raises EditError, HeadError or OffsetError for edits that do not fit the model; ModelError for a
    model that slashpatch refuses; PatchError where the KV cache is older than the patch, and on
    leaving when an edit's hook never fired. A KV cache filled inside the block must not be used
    after it: that is not noticed.
    """
    attached = _Attached(model, edits)
    points = model.hook_dict
    handles = []
    try:
        for name, hook_fn in attached.entries:
            # Permanent: `reset_hooks` inside the block must not end the patch without a word.
            handle = points[name].add_hook(
                hook_fn, is_permanent=True, prepend=hook_fn in attached.rewrites
            )
            handles.append((points[name], handle))
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
        attached.close()
