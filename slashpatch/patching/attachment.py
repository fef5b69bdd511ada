"""Edits bound to one model: their hook functions, the record of which fired, and KV caches."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import bridge
from ..bridge.attached import Mark
from ..bridge.forward_call import ForwardCall
from ..bridge.passes import first_layer
from ..bridge.watch import watch
from ..edits import Edit, as_edit
from ..errors import PatchError
from .binding import Act, EditInLayer, per_head_key_hooks
from .edited_inputs import key_from_input, query_from_input
from .per_head_keys import PerHeadKeys

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_serial = itertools.count(1)
#: On KV caches: the attachments under which they were filled, so that a copy of one is known too.
_FILLED_UNDER = "_slashpatch_patches"


#: What is computed anew of heads that have per-head keys or edited inputs.
_COMPUTED = {"per-head keys": "the scores", "edited inputs": "the queries and keys"}


class Hook(NamedTuple):
    """A function to attach to a hook point; `first` must run before all others there."""

    name: str
    function: Callable[..., Any]
    first: bool


class Attachment:
    """Edits bound to one model.

    Attributes:
        hooks: What to attach to which hook point, in order.
    """

    def __init__(self, model: TransformerBridge, edits: tuple[Edit | str, ...]) -> None:
        self.info = bridge.read(model)
        self.serial = next(_serial)
        self.edits = tuple(as_edit(edit) for edit in edits)
        for edit in self.edits:
            edit.validate(self.info)
        prepared = [edit.prepare(model, self.info) for edit in self.edits]
        self._model = weakref.ref(model)
        self._fired: dict[tuple[str, str], bool] = {}
        self.hooks: list[Hook] = []
        for index, (edit, states) in enumerate(zip(self.edits, prepared, strict=True)):
            for layer in edit.layers:
                key = (self.serial, index)
                for name, act in EditInLayer(
                    edit, key, layer, self.info, states.get(layer)
                ).hooks():
                    self._add(name, act, Mark(*key, edit), layer)
        self._add_edited_inputs()
        self._add_per_head_keys()
        self.hooks.sort(key=lambda hook: not hook.first)  # a stable sort: else in the order given
        self._watch = watch(model)
        self._watch.follow(self)

    def _add_edited_inputs(self) -> None:
        for index, edit in enumerate(self.edits):
            mark = Mark(self.serial, index, edit)
            stages = edit.stages()
            for stage, made in (("query_input", query_from_input), ("key_input", key_from_input)):
                for layer in edit.layers if stage in stages else ():
                    self._add(*made(self.info, layer), mark, layer, first="edited inputs")

    def _add_per_head_keys(self) -> None:
        layers = {
            layer: edit for edit in self.edits if edit.uses_per_head_keys for layer in edit.layers
        }
        for layer, edit in sorted(layers.items(), key=lambda item: item[0]):
            mark = Mark(self.serial, self.edits.index(edit), edit)
            *catching, (scores, rewrite) = per_head_key_hooks(self.info, layer)
            for name, act in catching:
                self._add(name, act, mark, layer)
            self._add(scores, rewrite, mark, layer, first="per-head keys")

    def _add(self, name: str, act: Act, mark: Mark, layer: int, first: str = "") -> None:
        """Note a hook function, which must fire; `first` says for what it must be the first."""
        edit = mark.edit
        what = f"{edit} ({first})" if first else str(edit)
        self._fired[name, what] = False

        def hook_fn(tensor: Any, hook: Any) -> Any:
            call, model = self._watch.require(), self._model()
            if not call.own and (model is None or layer >= first_layer(model)):
                self._fired[name, what] = True
            call.state.setdefault(_FILLED_UNDER, set()).add(self.serial)
            self._refuse_older_cache(call, edit)
            _ = call.real  # refuses attention masks under which columns do not count tokens
            if first:
                _require_first(hook, first)
            return act(call, tensor)

        hook_fn.slashpatch = mark  # type: ignore[attr-defined]
        hook_fn.goes_first = bool(first)  # type: ignore[attr-defined]  # see `_require_first`
        hook_fn.__qualname__ = f"slashpatch {what}"
        self.hooks.append(Hook(name, hook_fn, bool(first)))

    def _refuse_older_cache(self, call: ForwardCall, edit: Edit) -> None:
        if call.past and self.serial not in getattr(call.cache, _FILLED_UNDER, ()):
            raise PatchError(
                f"{edit} was attached after {call.past} tokens had been cached without it; "
                "the result would be that of neither the clean nor the edited model. Start the "
                "generation inside the patch"
            )

    def on_pass_start(self, call: ForwardCall) -> None:
        """Nothing is kept from pass to pass."""

    def on_pass_end(self, call: ForwardCall, output: Any) -> None:
        """Note on the KV cache under which edits it was filled, and lay per-head keys beside it."""
        made = _cache_of(output)
        cache = call.cache if made is None else made
        under = call.state.get(_FILLED_UNDER, set())
        if cache is not None and self.serial in under:
            setattr(cache, _FILLED_UNDER, {*getattr(cache, _FILLED_UNDER, ()), *under})
            if output is not None:
                PerHeadKeys.of(call).keep(cache)

    def require_fired(self) -> None:
        """Raise PatchError for the first hook that never fired."""
        for (name, edit), fired in self._fired.items():
            if not fired:
                raise PatchError(
                    f"{edit} changed nothing: its hook {name} never fired. Run the patched model "
                    "inside the `with` block, with that layer and without resetting its hooks"
                )

    def close(self) -> None:
        """Stop following the model; the hook functions are removed by whoever attached them."""
        self._watch.unfollow(self)


def _cache_of(output: Any) -> Any:
    """Return the KV cache in a model's output, also where that is a plain tuple; None without."""
    parts = output if type(output) is tuple else [getattr(output, "past_key_values", None)]
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)


def _require_first(hook: Any, what: str) -> None:
    """Raise PatchError if a hook ran before one that replaces what its hook point carries."""
    for handle in getattr(hook, "_target", hook).fwd_hooks:
        if getattr(handle.user_hook, "goes_first", False):
            return
        raise PatchError(
            f"a hook on {hook.name} ran before slashpatch computed {_COMPUTED[what]} of heads that "
            f"have {what}, and would be lost; attach the edits with slashpatch.patch, or first"
        )
