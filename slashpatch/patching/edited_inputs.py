"""Attention inputs of single heads: edited, and made into the heads' queries and keys.

An edit that changes the input of some heads' queries or keys must not change the others', nor the
values. The layer's input goes on as it is; the edited ones are kept here, and the heads' queries
and keys are computed from them before any other hook sees queries or keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..bridge import ModelInfo
from ..bridge.forward_call import ForwardCall
from .per_head_keys import PerHeadKeys


@dataclass
class EditedInputs:
    """Edited attention inputs in one forward pass, shared by all patches, so that edits compose.

    Attributes:
        inputs: By (layer, "q" or "k"), the edited input of each head that has one; heads that were
            edited alike share a tensor.
        used: The layers and parts that were computed from them.
    """

    inputs: dict[tuple[int, str], dict[int, Float[Tensor, "batch pos d_model"]]] = field(
        default_factory=dict
    )
    used: set[tuple[int, str]] = field(default_factory=set)

    @classmethod
    def of(cls, call: ForwardCall) -> EditedInputs:
        """Return those of a forward pass, which start empty."""
        found: EditedInputs = call.state.setdefault(cls, cls())
        return found

    def edit(
        self,
        layer: int,
        part: str,
        heads: list[int],
        x: Float[Tensor, "batch pos d_model"],
        act: Callable[[list[int], Tensor], Tensor],
    ) -> None:
        """Let `act` edit the input of some heads' queries or keys, after earlier edits of it."""
        inputs = self.inputs.setdefault((layer, part), {})
        for own, sharing in _sharing({head: inputs.get(head, x) for head in heads}):
            inputs.update(dict.fromkeys(sharing, act(sharing, own).to(x.dtype)))

    def take(self, layer: int, part: str) -> list[tuple[Tensor, list[int]]]:
        """Return the edited inputs and their heads; none the second time in a pass."""
        if (layer, part) in self.used:
            return []
        self.used.add((layer, part))
        return list(_sharing(self.inputs.get((layer, part), {})))


def _sharing(inputs: dict[int, Tensor]) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield each tensor with the heads that have it."""
    heads: dict[int, list[int]] = {}
    for head, own in inputs.items():
        heads.setdefault(id(own), []).append(head)
    for sharing in heads.values():
        yield inputs[sharing[0]], sorted(sharing)


def _constant(made: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that returns `made`, whatever keys there were."""
    return lambda own: made


def query_from_input(info: ModelInfo, layer: int) -> tuple[str, Callable[[ForwardCall, Any], Any]]:
    """Return the hook that puts in the queries of heads whose input was edited."""
    qk = info.qk[layer]
    project = info.projections[layer].q

    def hook_fn(call: ForwardCall, tensor: Tensor) -> Tensor:
        edited = EditedInputs.of(call).take(layer, "q")
        if not edited:
            return tensor
        whole = qk.q.read(tensor).clone()
        for x, heads in edited:
            made = project(x, call.rope_positions)
            made = qk.rotate(qk.q, made[:, :, heads], call.rope_positions)
            whole[:, :, heads] = made.to(whole.dtype)
        PerHeadKeys.of(call).note_edited_queries(qk, whole)
        return qk.q.write(whole)

    return qk.q.name, hook_fn


def key_from_input(info: ModelInfo, layer: int) -> tuple[str, Callable[[ForwardCall, Any], Any]]:
    """Return the hook that gives heads whose input was edited their per-head keys."""
    qk = info.qk[layer]
    project = info.projections[layer].k
    group = info.n_heads // info.n_kv_heads

    def hook_fn(call: ForwardCall, tensor: Tensor) -> None:
        edited = EditedInputs.of(call).take(layer, "k")
        if not edited:
            return
        shared = qk.unrotate(qk.k, qk.k.read(tensor), call.rope_positions)
        for x, heads in edited:
            made = project(x, call.rope_positions)[:, :, [head // group for head in heads]]
            PerHeadKeys.of(call).edit_keys(layer, heads, shared, info.n_heads, _constant(made))

    return qk.k.name, hook_fn
