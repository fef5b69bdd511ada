"""The edits of a sweep: one a head (and offset)."""

from __future__ import annotations

import hashlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import bridge
from ..edits import Edit, parse_edit
from ..errors import EditError, HeadError
from ..heads import Head

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Variant:
    """One row of a sweep."""

    index: int
    head: Head
    offset: int | None
    edit: Edit


def _variants(model: TransformerBridge, make_edit: Any, heads: Any, offsets: Any) -> list[Variant]:
    info = bridge.read(model)
    if heads is None:
        every = itertools.product(range(info.n_layers), range(info.n_heads))
        wanted: Sequence[Head] = [Head(*at) for at in every]
    else:
        wanted = sorted(info.require(heads))
        if not wanted:
            raise HeadError("no heads were given; expected at least one, or None for all")
    steps: Sequence[int | None] = [None] if offsets is None else info.require_offsets(offsets)
    make = _maker(make_edit, offsets is not None)
    found = []
    for index, (head, offset) in enumerate(itertools.product(wanted, steps)):
        edit = make(head, offset)
        edit.validate(info)
        found.append(Variant(index, head, offset, edit))
    tried = set()
    for one in found:
        # Layers may differ in what they take: find out before hours of work.
        if one.edit.layers not in tried and {"query", "key"} & set(one.edit.stages()):
            one.edit.prepare(model, info)
        tried.add(one.edit.layers)
    return sorted(found, key=lambda one: (one.edit.layers[0], one.index))


def _maker(make_edit: Any, with_offset: bool) -> Callable[[Head, int | None], Edit]:
    if isinstance(make_edit, str):
        for field, needed in (("{head}", True), ("{offset}", with_offset)):
            if (field in make_edit) != needed:
                raise EditError(
                    f"expected a text {'with' if needed else 'without'} {field}, such as "
                    f"'KnockOut({{head}}, {'{offset}' if with_offset else 1})'; got {make_edit!r}"
                    + ("" if needed or with_offset else " (or give offsets)")
                )

        def from_text(head: Head, offset: int | None) -> Edit:
            return parse_edit(
                make_edit.replace("{head}", str(head)).replace("{offset}", str(offset))
            )

        return from_text
    if not callable(make_edit):
        raise EditError(
            f"expected a text such as 'KnockOut({{head}}, 1)' or a function of a head; got "
            f"{make_edit!r}"
        )

    arguments = (None, None) if with_offset else (None,)
    try:
        inspect.signature(make_edit).bind(*arguments)
    except TypeError:
        raise EditError(
            f"make_edit is called with a head{' and an offset' if with_offset else ''}, which "
            f"{make_edit!r} does not take"
        ) from None
    except ValueError:
        pass  # some builtins do not tell

    def from_function(head: Head, offset: int | None) -> Edit:
        made = make_edit(head, offset) if with_offset else make_edit(head)
        made = parse_edit(made) if isinstance(made, str) else made
        if not isinstance(made, Edit):
            raise EditError(f"make_edit gave {made!r} for {head}; expected an edit")
        return made

    return from_function


def _digest(variants: Sequence[Variant]) -> str:
    """Of the rows in order: which edit stands at which index."""
    listed = sorted(f"{one.index:09d} {one.head} {one.offset} {one.edit}" for one in variants)
    sha = hashlib.sha256("\n".join(listed).encode()).hexdigest()[:16]
    return f"{len(variants)} edits, {sha}"
