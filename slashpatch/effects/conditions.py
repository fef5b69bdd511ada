"""Conditions: edits that act together on one run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..edits import Edit, as_edit
from ..errors import EditError, MetricError, PromptError

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Condition:
    """Edits that act together; none: the model as it is."""

    edits: tuple[Edit, ...] = ()

    def __str__(self) -> str:
        return " then ".join(map(str, self.edits)) or "clean"


def conditions(edits: Any) -> tuple[Condition, ...]:
    """Each member of a list is a condition of its own; those of a nested list act together.

    Raises EditError for anything that is no edit, for none, or for the same condition twice.
    """
    if isinstance(edits, (Edit, str)):
        edits = [edits]
    if not isinstance(edits, (list, tuple)) or not edits:
        raise EditError(f"expected an edit such as KnockOut('L16H0', 1), or several; got {edits!r}")
    found = []
    for member in edits:
        together = member if isinstance(member, (list, tuple)) else [member]
        found.append(Condition(tuple(as_edit(one) for one in together)))
        if not found[-1].edits:
            raise EditError("a condition is without edits; leave it out, clean is always measured")
    names = [str(one) for one in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise EditError(f"{twice} is given twice")
    return tuple(found)


def require_options(seed: Any, confidence: Any, **counts: Any) -> None:
    """Raise MetricError for a seed, a level or a number that is none, before anything runs."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise MetricError(f"seed is an integer; got {seed!r}")
    number = isinstance(confidence, (int, float)) and not isinstance(confidence, bool)
    if not number or not 0 < confidence < 1:
        raise MetricError(f"confidence is between 0 and 1, such as 0.95; got {confidence!r}")
    for name, count in counts.items():
        whole = isinstance(count, int) and not isinstance(count, bool)
        if count is not None and (not whole or count < 1):
            raise PromptError(f"{name} is an integer from 1; got {count!r}")
