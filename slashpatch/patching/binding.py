"""Hook functions of one edit in one layer: the edit gets its heads, what it returns is put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from ..bridge import ModelInfo
from ..bridge.forward_call import ForwardCall
from ..bridge.qk import LayerQK
from ..edits import Edit, HookContext
from ..errors import PatchError
from .edited_inputs import EditedInputs
from .per_head_keys import PerHeadKeys
from .stand_ins import Pattern, Scores, record_changes

#: From the current forward pass and a hook's tensor to the tensor in its place (None: the same).
Act = Callable[[ForwardCall, Any], Any]
_HEAD_AXIS = {"query": 2, "key": 2, "scores": 1, "pattern": 1, "z": 2}


@dataclass(frozen=True)
class EditInLayer:
    """One edit at its heads of one layer.

    Attributes:
        edit: The edit; `key` tells it apart from the same edit attached elsewhere.
        layer: The layer's index.
        info: Of the model.
        prepared: What the edit's `prepare` returned for this layer.
    """

    edit: Edit
    key: tuple[int, int]
    layer: int
    info: ModelInfo
    prepared: Any = None

    def hooks(self) -> Iterator[tuple[str, Act]]:
        """Yield (hook name, function) for each hook that the edit overrides."""
        for stage, act in self.edit.stages().items():
            if stage in ("query_input", "key_input"):
                yield self.info.hook(self.layer, "input"), self._edit_input(stage[0], act)
            elif stage == "key":
                yield self._edit_keys(act)
            elif stage == "query":
                yield self._edit_queries(act)
            else:
                yield self.info.hook(self.layer, stage), self._edit_heads(stage, act)

    @cached_property
    def heads(self) -> list[int]:
        """The edit's heads in the layer."""
        return self.edit.heads_in(self.layer)

    @cached_property
    def qk(self) -> LayerQK | None:
        """The layer's queries, keys and rotation, for edits of queries or keys."""
        return self.info.qk[self.layer] if self.edit.acts_on_qk else None

    def context(self, call: ForwardCall) -> HookContext:
        """Return where the edit acts in the current forward pass."""
        memory: dict[str, Tensor] = call.state.setdefault((*self.key, self.layer), {})
        return HookContext(
            self.layer, self.heads, self.info.n_heads, call, self.prepared, memory, self.qk
        )

    def _edit_heads(self, stage: str, act: Callable[[HookContext, Tensor], Tensor]) -> Act:
        """Scores, pattern and z: tensors that every family has in the canonical layout."""

        def hook_fn(call: ForwardCall, tensor: Any) -> Any:
            context = self.context(call)
            if isinstance(tensor, (Scores, Pattern)):
                call.cached_columns(tensor.shape[-1])
                return record_changes(tensor, context.heads, self.edit.diagonal_changes())
            part, put_back = self._part(tensor, self.info.hook(self.layer, stage), stage, context)
            edited = act(context, part)
            return tensor if edited is part else put_back(edited)

        return hook_fn

    def _edit_queries(self, act: Callable[[HookContext, Tensor], Tensor]) -> tuple[str, Act]:
        """Queries before RoPE, un-rotated and rotated again where no hook carries them so."""
        qk = self.qk
        assert qk is not None

        def hook_fn(call: ForwardCall, tensor: Tensor) -> Tensor:
            context = self.context(call)
            part, put_back = self._part(qk.q.read(tensor), qk.q.name, "query", context)
            before = qk.unrotate(qk.q, part, call.rope_positions)
            edited = act(context, before)
            if edited is before:
                return tensor
            whole = put_back(qk.rotate(qk.q, edited, call.rope_positions))
            PerHeadKeys.of(call).note_edited_queries(qk, whole)
            return qk.q.write(whole)

        return qk.q.name, hook_fn

    def _edit_keys(self, act: Callable[[HookContext, Tensor], Tensor]) -> tuple[str, Act]:
        """Per-head keys: the shared keys go on untouched."""
        qk = self.qk
        assert qk is not None

        def hook_fn(call: ForwardCall, tensor: Tensor) -> None:
            context = self.context(call)
            shared = qk.unrotate(qk.k, qk.k.read(tensor), call.rope_positions)
            PerHeadKeys.of(call).edit_keys(
                self.layer,
                context.heads,
                shared,
                self.info.n_heads,
                lambda own: act(context, own),
            )

        return qk.k.name, hook_fn

    def _edit_input(self, part: str, act: Callable[[HookContext, Tensor], Tensor]) -> Act:
        """The input of the heads' queries ("q") or keys ("k"); the input itself goes on."""

        def hook_fn(call: ForwardCall, x: Tensor) -> None:
            context = self.context(call)
            EditedInputs.of(call).edit(
                self.layer,
                part,
                context.heads,
                x,
                lambda heads, own: act(replace(context, heads=heads), own),
            )

        return hook_fn

    def _part(
        self, tensor: Tensor, name: str, stage: str, context: HookContext
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The edit's heads of a tensor, and a function that puts new ones into a copy of it."""
        axis = _HEAD_AXIS[stage]
        if tensor.ndim != 4 or tensor.shape[axis] != self.info.n_heads:
            raise PatchError(
                f"{self.edit} expected {name} with 4 axes and {self.info.n_heads} heads, "
                f"got {list(tensor.shape)}; run without remove_batch_dim"
            )
        index = (slice(None),) * axis + (context.heads,)

        def put_back(edited: Tensor) -> Tensor:
            whole = tensor.clone()
            whole[index] = edited.to(whole.dtype)
            return whole

        return tensor[index], put_back


def per_head_key_hooks(info: ModelInfo, layer: int) -> Iterator[tuple[str, Act]]:
    """Yield hooks that catch rotated queries, cos and sin, and last the one that rewrites scores.

    The last must run before every other hook on the scores: it says what they are.
    """
    qk = info.qk[layer]
    carrier = qk.rotated_q or qk.q

    def catch_queries(call: ForwardCall, tensor: Tensor) -> None:
        PerHeadKeys.of(call).q[layer] = carrier.read(tensor)

    def catch_table(point: str) -> Act:
        def hook_fn(call: ForwardCall, tensor: Tensor) -> None:
            PerHeadKeys.of(call).tables[layer, point] = tensor

        return hook_fn

    def rewrite(call: ForwardCall, scores: Any) -> Any:
        return PerHeadKeys.of(call).rewrite_scores(qk, scores, call)

    yield carrier.name, catch_queries
    if qk.rotary is not None:
        yield info.hook(layer, "cos"), catch_table("cos")
        yield info.hook(layer, "sin"), catch_table("sin")
    yield info.hook(layer, "scores"), rewrite
