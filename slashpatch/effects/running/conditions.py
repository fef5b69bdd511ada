"""Conditions of an experiment: the edits that are active together in one run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...data.prompts import PromptSet, tokens_digest
from ...edits import Edit, as_edit
from ...errors import EditError, MetricError, PromptError


@dataclass(frozen=True)
class Condition:
    """Edits that are active together; without edits, the clean run."""

    edits: tuple[Edit, ...] = ()

    def __str__(self) -> str:
        return " then ".join(map(str, self.edits)) or "clean"


def conditions(edits: Any) -> tuple[Condition, ...]:
    """Return the conditions that an argument `edits` describes.

    Each item of a list is one condition; the edits of a nested list act together in one condition.
    Raises EditError for anything that is not an edit, for no edits, and for the same condition
    twice.
    """
    if isinstance(edits, (Edit, str)):
        edits = [edits]
    if not isinstance(edits, (list, tuple)) or not edits:
        raise EditError(
            f"expected an edit such as KnockOut('L16H0', 1), or a list of edits; got {edits!r}"
        )
    parsed = []
    for item in edits:
        together = item if isinstance(item, (list, tuple)) else [item]
        parsed.append(Condition(tuple(as_edit(edit) for edit in together)))
        if not parsed[-1].edits:
            raise EditError("a condition has no edits; leave it out, clean is always measured")
    names = [str(condition) for condition in parsed]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise EditError(f"{twice} is given twice")
    return tuple(parsed)


def seen_in_fits(conditions: Iterable[Condition], prompts: PromptSet) -> tuple[str, ...]:
    """Return a remark for each edit whose constants were fitted on some of these prompts."""
    remarks: dict[str, None] = {}
    mine = [tokens_digest(prompt) for prompt in prompts.tokens]
    for edit in dict.fromkeys(edit for condition in conditions for edit in condition.edits):
        constants = getattr(edit, "constants", None)
        if constants is not None:
            seen = set(constants.provenance.get("seen", ()))
            n = sum(digest in seen for digest in mine)
            if n:
                remarks[
                    f"{n} of the {len(mine)} prompts were seen when {constants!r} was fitted; "
                    "measure on others, or its effect comes out too small"
                ] = None
    return tuple(remarks)


def require_options(seed: Any, confidence: Any, **counts: Any) -> None:
    """Check the options of a measurement before anything runs.

    Raises MetricError for the seed or the confidence, PromptError for any of `counts`.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise MetricError(f"seed must be an integer; got {seed!r}")
    number = isinstance(confidence, (int, float)) and not isinstance(confidence, bool)
    if not number or not 0 < confidence < 1:
        raise MetricError(f"confidence must be between 0 and 1, such as 0.95; got {confidence!r}")
    for name, count in counts.items():
        whole = isinstance(count, int) and not isinstance(count, bool)
        if count is not None and (not whole or count < 1):
            raise PromptError(f"{name} must be an integer of at least 1; got {count!r}")
