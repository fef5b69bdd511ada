"""What activation patching replaces: a head's z, its queries, keys or values, or one diagonal."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ...bridge import ModelInfo
from ...data.heads import Head
from ...edits import KnockOut, as_edit
from ...errors import EditError

#: Parts of a head that can be patched.
PARTS = ("z", "q", "k", "v", "diagonal")
_TARGET = re.compile(r"(?P<heads>[^@.]+)(?:\.(?P<part>\w+)|@(?P<offsets>[\d-]+))?")


@dataclass(frozen=True, order=True)
class Target:
    """A part of one head: L16H0 is its z, L16H0.k its keys, L16H0@1 its diagonal of offset 1.

    Attributes:
        head: The query head.
        part: One of `PARTS`.
        offset: Offset Δ of a diagonal, else −1.
    """

    head: Head
    part: str = "z"
    offset: int = -1

    def __str__(self) -> str:
        if self.part == "diagonal":
            return f"{self.head}@{self.offset}"
        return str(self.head) if self.part == "z" else f"{self.head}.{self.part}"


@dataclass(frozen=True)
class Together:
    """Targets that are patched at once, sorted.

    Raises:
        EditError: Parts of one head of which one holds the other.
    """

    targets: tuple[Target, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(sorted(set(self.targets))))
        parts: dict[Head, set[str]] = {}
        for target in self.targets:
            parts.setdefault(target.head, set()).add(target.part)
        for head, found in parts.items():
            if len(found) > 1 and not found <= {"q", "k", "v"}:
                raise EditError(
                    f"{head}: {' and '.join(sorted(found))} are patched together, and z holds all "
                    "of a head's output, a diagonal a part of it; only q, k and v go together"
                )

    def __str__(self) -> str:
        return ", ".join(map(str, self.targets))

    @property
    def first_layer(self) -> int:
        """The first layer that is patched."""
        return min(target.head.layer for target in self.targets)

    @property
    def parts(self) -> str:
        """The parts that are patched, in words."""
        return ", ".join(part for part in PARTS if part in {t.part for t in self.targets})

    @property
    def offsets(self) -> tuple[int, ...]:
        """The offsets of its diagonals, ascending."""
        return tuple(sorted({t.offset for t in self.targets if t.part == "diagonal"}))


def targets(info: ModelInfo, heads: Any, parts: Any = None, offsets: Any = None) -> list[Together]:
    """Return what is patched, each item of `heads` alone and those of a nested list together.

    Args:
        info: Of the model.
        heads: Heads in any form; "L16H0.k" (or .q, .v, .z); a diagonal as "L16H0@1", (head, 1) or
            `KnockOut(heads, offsets)`, whose diagonals are patched together; or a list of these.
        parts: For heads alone: some of z, q, k, v and diagonal, each for itself; None: z, or the
            diagonals of `offsets` where those are given.
        offsets: For heads alone: offsets of their diagonals, each for itself.

    Raises:
        EditError: No heads, the same target twice, parts that are misspelt or do not go together.
        HeadError: Heads that the model has not.
        OffsetError: Offsets beyond its context.
    """
    forms = _forms(info, parts, offsets)
    items = heads if isinstance(heads, (list, tuple)) and not _is_pair(heads) else [heads]
    found: list[Together] = []
    for item in items:
        if isinstance(item, str) and "(" in item:
            item = as_edit(item)
        together = isinstance(item, KnockOut) or (
            isinstance(item, (list, tuple)) and not _is_pair(item)
        )
        members = [*_members(info, item)]
        if together and not members:
            raise EditError("a nested list of heads is empty; leave it out")
        plain = any(isinstance(member, Head) for member in members)
        for group in [members] if together else [[member] for member in members]:
            for part, offset in forms if plain else forms[:1]:
                found.append(
                    Together(
                        tuple(
                            Target(member, part, offset) if isinstance(member, Head) else member
                            for member in group
                        )
                    )
                )
    if not found:
        raise EditError("no heads were given; expected at least one, such as 'L16H0'")
    twice = next((group for group in found if found.count(group) > 1), None)
    if twice is not None:
        raise EditError(f"{twice} is given twice")
    return found


def _forms(info: ModelInfo, parts: Any, offsets: Any) -> list[tuple[str, int]]:
    """Return what heads without a part of their own stand for: parts, and offsets of diagonals."""
    if parts is None:
        parts = "z" if offsets is None else "diagonal"
    names = re.split(r"[,\s]+", parts.strip()) if isinstance(parts, str) else list(parts)
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        raise EditError(f"parts must be some of {', '.join(PARTS)}; got {parts!r}")
    if ("diagonal" in names) != (offsets is not None):
        raise EditError(
            "offsets and the part diagonal go together: give offsets=1 for the diagonals of heads, "
            "or write them as 'L16H0@1'"
        )
    at = info.require_offsets(offsets) if offsets is not None else ()
    return [
        (name, offset)
        for name in dict.fromkeys(names)
        for offset in (at if name == "diagonal" else (-1,))
    ]


def _is_pair(item: Any) -> bool:
    """Whether an item is a (head, offset) or a (layer, head) pair."""
    return (
        isinstance(item, tuple)
        and len(item) == 2
        and isinstance(item[0], (Head, str, int))
        and isinstance(item[1], (int, range))
        and not isinstance(item[1], bool)
    )


def _members(info: ModelInfo, item: Any) -> Iterator[Head | Target]:
    """Yield the heads (those without a part of their own) and targets that an item stands for."""
    if isinstance(item, str) and "(" in item:
        item = as_edit(item)
    if isinstance(item, Target):
        info.require(item.head)
        yield item
    elif isinstance(item, KnockOut):
        for head in info.require(item.heads):
            yield from _diagonals(info, head, item.offsets)
    elif isinstance(item, str):
        for text in re.split(r"[,\s]+", item.strip().rstrip(",")):
            yield from _named(info, text)
    elif _is_pair(item) and not isinstance(item[0], int):
        for head in info.require(item[0]):
            yield from _diagonals(info, head, item[1])
    elif isinstance(item, (list, tuple)) and not _is_pair(item):
        for member in item:
            yield from _members(info, member)
    elif hasattr(item, "stages"):
        raise EditError(
            f"activation_patching takes heads and diagonals, which KnockOut can name; got {item}"
        )
    else:
        yield from info.require(item)


def _named(info: ModelInfo, text: str) -> Iterator[Head | Target]:
    """Yield what a text such as L16H0, L16H0.k or L16H0@0-3 stands for."""
    match = _TARGET.fullmatch(text)
    if match is None or (match["part"] and match["part"] not in PARTS[:-1]):
        raise EditError(
            f"expected a head such as L16H0, a part of it such as L16H0.k (z, q, k or v), or a "
            f"diagonal such as L16H0@1; got {text!r}"
        )
    for head in info.require(match["heads"]):
        if match["offsets"]:
            yield from _diagonals(info, head, match["offsets"])
        else:
            yield Target(head, match["part"]) if match["part"] else head


def _diagonals(info: ModelInfo, head: Head, offsets: Any) -> Iterator[Target]:
    for offset in info.require_offsets(offsets):
        yield Target(head, "diagonal", offset)


def in_layer(wanted: Sequence[Target], layer: int, part: str) -> list[Target]:
    """Return the targets of one part in one layer, in their order."""
    return [t for t in wanted if t.head.layer == layer and t.part == part]
