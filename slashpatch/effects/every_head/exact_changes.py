"""What each edit of a sweep does to z, exactly, when every head is edited alone on clean inputs.

One forward pass serves all heads: the edits of all heads act, and each layer's z is put back to its
clean value once it has been read, so that the next layer gets clean inputs. In the fused engine,
changes of diagonals need no pass of their own: their z is known in closed form for every offset.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ... import bridge
from ...bridge.attached import active_edits, other_hooks, reads_diagonals
from ...bridge.passes import leaving_no_trace
from ...edits import Edit
from ...edits.parse import EDITS
from ...errors import EditError
from ...maths.diagonals import DiagonalChange
from ...patching.fused import is_fused
from ...patching.patch import patch
from ..running.gradients import ByLayer
from ..running.inputs import Batch
from .variants import Variant

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Called with some variants of one layer and the change of z of that layer's heads under them.
OnChange = Callable[[Sequence[Variant], Float[Tensor, "batch pos head d_head"]], None]


def require_one_layer(variants: Sequence[Variant]) -> None:
    """Raise EditError for an edit of several layers, whose later changes depend on the earlier."""
    for variant in variants:
        if len(variant.edit.layers) > 1:
            raise EditError(
                f"screen takes edits of one layer; {variant.edit} acts in the layers "
                f"{', '.join(map(str, variant.edit.layers))}. Use sweep or measure"
            )


def exact_changes(
    model: TransformerBridge,
    batch: Batch,
    clean: ByLayer,
    variants: Sequence[Variant],
    on_change: OnChange,
) -> None:
    """Call `on_change` with the change of z under each variant, layer by layer.

    Heads that none of the variants edits change by zero. `clean` is z of the clean run.
    """
    in_closed_form: list[Variant] = []
    others: list[Variant] = []
    # With other edits or hooks on the model, its attention is not all there is between q, k and z.
    plain = is_fused(model) and not active_edits(model) and not other_hooks(model)
    for variant in variants:
        edit = variant.edit
        closed = plain and edit.diagonal_changes() and not edit.needs_matrix
        closed = closed and set(edit.stages()) <= {"scores", "pattern"}
        (in_closed_form if closed else others).append(variant)
    if in_closed_form:
        _by_closed_form(model, batch, clean, in_closed_form, on_change)
    for together in passes(others):
        _by_pass(model, batch, clean, together, on_change)


def passes(variants: Sequence[Variant]) -> list[list[Variant]]:
    """Return groups of variants that act on different heads, so that each group shares a pass."""
    groups: list[list[Variant]] = []
    used: dict[Any, int] = {}
    for variant in variants:
        heads: Any = variant.edit.heads
        place = max(used.get(head, 0) for head in heads)
        used.update(dict.fromkeys(heads, place + 1))
        if place == len(groups):
            groups.append([])
        groups[place].append(variant)
    return groups


def _by_layer(variants: Sequence[Variant]) -> dict[int, list[Variant]]:
    """Return the variants by edited layer."""
    found: dict[int, list[Variant]] = {}
    for variant in variants:
        found.setdefault(variant.edit.layers[0], []).append(variant)
    return found


def _by_pass(
    model: TransformerBridge,
    batch: Batch,
    clean: ByLayer,
    variants: Sequence[Variant],
    on_change: OnChange,
) -> None:
    """Run the edits of different heads in one forward pass on clean inputs."""
    by_layer = _by_layer(variants)

    def read(z: Tensor, hook: Any) -> Tensor:
        layer = hook.layer()
        if layer in by_layer:
            on_change(by_layer[layer], z - clean[layer])
        return clean[layer]

    info = bridge.read(model)
    hooks = [(info.hook(layer, "z"), read) for layer in clean]
    with leaving_no_trace(model), patch(model, *joined([variant.edit for variant in variants])):
        bridge.run_for_hooks(model, batch.tokens, hooks)


def joined(edits: Sequence[Edit]) -> Iterator[Edit]:
    """Yield edits that do the same as these together: equal ones of several heads become one.

    Only slashpatch's own edits are joined, which treat every head by itself.
    """
    groups: dict[Any, list[Edit]] = {}
    for place, edit in enumerate(edits):
        names = [field.name for field in dataclasses.fields(edit)][1:]
        same: Any = place
        if EDITS.get(type(edit).__name__) is type(edit):
            same = (type(edit), *(getattr(edit, name) for name in names))
        groups.setdefault(same, []).append(edit)
    for group in groups.values():
        heads: Any = [head for edit in group for head in edit.heads]
        yield dataclasses.replace(group[0], heads=heads) if len(group) > 1 else group[0]


def _by_closed_form(
    model: TransformerBridge,
    batch: Batch,
    clean: ByLayer,
    variants: Sequence[Variant],
    on_change: OnChange,
) -> None:
    """Compute z under changes of diagonals from each layer's attention in one clean pass."""
    by_layer = _by_layer(variants)

    @reads_diagonals
    def read(pattern: Any, hook: Any) -> None:
        layer = hook.layer()
        unedited = _as_edited(pattern.attention, by_layer[layer], clean[layer])
        for together in passes(by_layer[layer]):
            edited = pattern.attention.copy()
            for variant in together:
                changes: tuple[DiagonalChange, ...] = variant.edit.diagonal_changes()
                for change in changes:
                    edited.change(variant.edit.heads_in(layer), change)
            z = edited.output().transpose(1, 2)
            on_change(together, z - unedited)

    info = bridge.read(model)
    hooks = [(info.hook(layer, "pattern"), read) for layer in by_layer]
    with leaving_no_trace(model):
        bridge.run_for_hooks(model, batch.tokens, hooks)


def _as_edited(attention: Any, variants: Sequence[Variant], clean: Tensor) -> Tensor:
    """Return z of the clean run, computed in the way in which edited heads are.

    In half precision that is another way than flash attention, and the rounding of the two would
    count as a change.
    """
    if clean.dtype not in (torch.float16, torch.bfloat16):
        return clean
    heads = {head for variant in variants for head in variant.edit.heads_in(variant.edit.layers[0])}
    neutral = attention.copy()
    neutral.change(sorted(heads), DiagonalChange("scores", (0,), 0.0, 0.0))
    z: Tensor = neutral.output().transpose(1, 2)
    return z
