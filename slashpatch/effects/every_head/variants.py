"""The edits of a sweep: one per head (and offset)."""

from __future__ import annotations

import hashlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ... import bridge
from ...data.heads import Head
from ...edits import Edit, parse_edit
from ...errors import EditError, HeadError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Variant:
    """One row of a sweep.

    Attributes:
        index: Place of the row, counted over heads and then offsets.
        head: The head for which the edit was made.
        offset: The offset for which it was made, if offsets are swept.
        edit: The edit.
    """

    index: int
    head: Head
    offset: int | None
    edit: Edit


def sweep_variants(
    model: TransformerBridge, make_edit: Any, heads: Any, offsets: Any
) -> list[Variant]:
    """Return the variants of a sweep by edited layer; arguments as for `sweep`.

    Raises EditError, HeadError, OffsetError, and ModelError if a layer does not support its edit.
    """
    info = bridge.read(model)
    if heads is None:
        wanted: Sequence[Head] = info.heads
    else:
        wanted = sorted(info.require(heads))
        if not wanted:
            raise HeadError("no heads were given; expected at least one, or None for all")
    deltas: Sequence[int | None] = [None] if offsets is None else info.require_offsets(offsets)
    make = _maker(make_edit, offsets is not None)
    variants = []
    for index, (head, offset) in enumerate(itertools.product(wanted, deltas)):
        edit = make(head, offset)
        edit.validate(info)
        variants.append(Variant(index, head, offset, edit))
    prepared = set()
    for variant in variants:
        # Layers may differ, for example in RoPE: refuse before hours of work, not after.
        if variant.edit.layers not in prepared and variant.edit.acts_on_qk:
            variant.edit.prepare(model, info)
        prepared.add(variant.edit.layers)
    return sorted(variants, key=lambda variant: (variant.edit.layers[0], variant.index))


def _maker(make_edit: Any, with_offset: bool) -> Callable[[Head, int | None], Edit]:
    """Return a function of a head and an offset that makes the edit. Raises EditError."""
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
            f"make_edit is called with a head{' and an offset' if with_offset else ''}, but "
            f"{make_edit!r} does not take these arguments"
        ) from None
    except ValueError:
        pass  # some builtins have no signature

    def from_function(head: Head, offset: int | None) -> Edit:
        made = make_edit(head, offset) if with_offset else make_edit(head)
        made = parse_edit(made) if isinstance(made, str) else made
        if not isinstance(made, Edit):
            raise EditError(f"make_edit returned {made!r} for {head}; expected an edit")
        return made

    return from_function


def first_columns(variants: Sequence[Variant], metric: str, n: int) -> dict[str, Any]:
    """Return the columns that name each row of a table: head, offset if swept, edit, metric, n."""
    offsets = [variant.offset for variant in variants]
    return {
        "name": [str(variant.head) for variant in variants],
        "layer": [variant.head.layer for variant in variants],
        "head": [variant.head.head for variant in variants],
        **({} if offsets[0] is None else {"offset": offsets}),
        "edit": [str(variant.edit) for variant in variants],
        "metric": metric,
        "n": n,
    }


def digest(variants: Sequence[Variant]) -> str:
    """Return a text that identifies the variants of a sweep: their number and a SHA-256 prefix."""
    listed = sorted(f"{v.index:09d} {v.head} {v.offset} {v.edit}" for v in variants)
    sha = hashlib.sha256("\n".join(listed).encode()).hexdigest()[:16]
    return f"{len(variants)} edits, {sha}"
