"""Members of a circuit, heads or diagonals, and the edits that ablate the others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...bridge import ModelInfo
from ...data.heads import Head, heads
from ...edits import AblateHeads, Edit, KeepOnly, KnockOut
from ...errors import EditError
from ...maths.offsets import as_offsets
from ..running.conditions import Condition

#: Random draws tried for each set that is asked for.
_ATTEMPTS = 200
_DIAGONAL = re.compile(r"(\S+?)\s*@\s*(\d+(?:\s*-\s*\d+)?)")


@dataclass(frozen=True, order=True)
class Member:
    """A head, or one diagonal of it.

    Attributes:
        head: The head.
        offset: Offset Δ of the diagonal; −1 stands for the whole head.
    """

    head: Head
    offset: int = -1

    def __str__(self) -> str:
        return str(self.head) if self.offset < 0 else f"{self.head}@{self.offset}"


def as_members(given: Any, info: ModelInfo) -> tuple[Member, ...]:
    """Return the members of a circuit, ascending.

    Args:
        given: Heads in any form that `slashpatch.heads` reads; diagonals as text such as
            "L16H0@1" or "L16H0@0-3", or as tuples of a head (a Head, or its text) and an offset; or
            a list of these.
        info: Of the model.

    Raises EditError for no members, and for a diagonal beside its whole head; HeadError or
    OffsetError for what the model does not have.
    """
    found = list(dict.fromkeys(_members(given, info)))
    if not found:
        raise EditError("a circuit has at least one member, such as L16H0 or L16H0@1; got none")
    whole = {member.head for member in found if member.offset < 0}
    both = next((one for one in found if one.offset >= 0 and one.head in whole), None)
    if both is not None:
        raise EditError(f"{both} is part of {both.head}, which is given as a whole; give one")
    info.require([member.head for member in found])
    offsets = sorted({member.offset for member in found if member.offset >= 0})
    if offsets:
        info.require_offsets(offsets)
    return tuple(sorted(found))


def _members(given: Any, info: ModelInfo) -> Iterable[Member]:
    if isinstance(given, Member):
        yield given
    elif isinstance(given, str) and "@" in given:
        for part in given.split(","):
            match = _DIAGONAL.fullmatch(part.strip())
            if match is not None:
                for offset in as_offsets(match[2].replace(" ", "")):
                    yield Member(Head.parse(match[1]), offset)
            elif "@" in part:
                raise EditError(
                    f"expected a head, or a diagonal such as L16H0@1 or L16H0@0-3; got {part!r}"
                )
            elif part.strip():
                yield from _members(part.strip(), info)
    elif _is_diagonal(given):
        head, offset = given
        yield Member(heads(head)[0] if isinstance(head, str) else head, as_offsets(offset)[0])
    elif isinstance(given, (list, tuple)) and not _is_pair(given):
        for one in given:
            yield from _members(one, info)
    else:
        for head in info.require(given):
            yield Member(head)


def _is_diagonal(given: Any) -> bool:
    """Return whether this is a tuple of a head and an offset, and not of a layer and a head."""
    return (
        isinstance(given, (list, tuple))
        and not isinstance(given, Head)
        and len(given) == 2
        and isinstance(given[0], (Head, str))
        and isinstance(given[1], int)
        and not isinstance(given[1], bool)
    )


def _is_pair(given: Any) -> bool:
    """Return whether this is a head as (layer, index)."""
    return isinstance(given, Head) or (
        len(given) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in given)
    )


def keeping(members: Sequence[Member], info: ModelInfo, ablation: AblateHeads) -> Condition:
    """Return the condition under which only these members are left, all else ablated.

    Other heads are ablated as `ablation` says. Of a head with members, the attention at other
    offsets is removed and that at the members' stays as it is, without renormalising the rows.
    """
    mine = _offsets(members)
    edits: list[Edit] = _ablated(ablation, [head for head in info.heads if head not in mine])
    edits += [
        KeepOnly(head, offsets, renormalize=False) for head, offsets in mine.items() if offsets
    ]
    return Condition(tuple(edits))


def without(members: Sequence[Member], ablation: AblateHeads) -> Condition:
    """Return the condition under which these members are ablated, and all else is left.

    Heads are ablated as `ablation` says; a diagonal is removed without renormalising the rows.
    """
    mine = _offsets(members)
    edits: list[Edit] = _ablated(ablation, [head for head, offsets in mine.items() if not offsets])
    edits += [
        KnockOut(head, offsets, renormalize=False) for head, offsets in mine.items() if offsets
    ]
    return Condition(tuple(edits))


def random_sets(
    members: Sequence[Member], info: ModelInfo, n: int, seed: int
) -> list[tuple[Member, ...]]:
    """Return up to n other sets of as many members in each layer, at the same offsets.

    Heads are drawn uniformly from all heads of the layer, those of the members included. There are
    fewer where the layers have fewer sets.
    """
    from transformer_lens.utilities.statistics import derive_generator

    generator = derive_generator(seed, "random sets", " ".join(map(str, members)))
    mine = sorted({member.head for member in members})
    found: dict[tuple[Member, ...], None] = {}
    for _ in range(_ATTEMPTS * n):
        if len(found) == n:
            break
        to: dict[Head, Head] = {}
        for layer in sorted({head.layer for head in mine}):
            here = [head for head in mine if head.layer == layer]
            order = torch.randperm(info.n_heads, generator=generator)[: len(here)].tolist()
            to |= {head: Head(layer, at) for head, at in zip(here, order, strict=True)}
        drawn = tuple(sorted(Member(to[one.head], one.offset) for one in members))
        if drawn != tuple(members):
            found[drawn] = None
    return list(found)


def random_subsets(members: Sequence[Member], n: int, seed: int) -> list[tuple[Member, ...]]:
    """Return up to n different subsets of the members, neither empty nor, if there are two, all.

    Each member is in or out with even odds.
    """
    from transformer_lens.utilities.statistics import derive_generator

    generator = derive_generator(seed, "subsets", " ".join(map(str, members)))
    if len(members) == 1:
        return [tuple(members)][:n]
    found: dict[tuple[Member, ...], None] = {}
    for _ in range(_ATTEMPTS * n):
        if len(found) == n:
            break
        inside = torch.rand(len(members), generator=generator) < 0.5
        drawn = tuple(one for one, taken in zip(members, inside.tolist(), strict=True) if taken)
        if 0 < len(drawn) < len(members):
            found[drawn] = None
    return list(found)


def _offsets(members: Sequence[Member]) -> dict[Head, tuple[int, ...]]:
    """Return the offsets of each head's diagonals; none for a whole head."""
    found: dict[Head, tuple[int, ...]] = {}
    for member in sorted(members):
        offsets = (member.offset,) if member.offset >= 0 else ()
        found[member.head] = (*found.get(member.head, ()), *offsets)
    return found


def _ablated(ablation: AblateHeads, of: Sequence[Head]) -> list[Edit]:
    """Return the ablation at these heads; nothing for none."""
    return [replace(ablation, heads=tuple(of))] if of else []
