"""Controls by name: the same edit at random other heads, offsets or rotary pairs.

An effect alone says little, because removing anything from a model hurts. Each control answers one
objection: that any heads, any offsets or any rotary pairs would have had the same effect. The pools
that the controls draw from are *ours*.
"""

from __future__ import annotations

import re
from typing import Any

from ...errors import ControlError
from .base import Control
from .heads import MatchedHeads, RandomHeads
from .offsets_and_pairs import OtherOffsets, RandomPairs

#: The controls that `as_control` and the command line know, by name.
CONTROLS: dict[str, type[Control]] = {
    control.name: control for control in (RandomHeads, MatchedHeads, OtherOffsets, RandomPairs)
}


def as_control(spec: Any) -> Control:
    """Return a Control, parsed first if it is a text such as `random-heads:20`.

    Raises ControlError for anything else.
    """
    if isinstance(spec, Control):
        return spec
    match = (
        re.fullmatch(r"\s*([a-z-]+)\s*(?::\s*(\d{1,6})\s*)?", spec)
        if isinstance(spec, str)
        else None
    )
    if match is None or match[1] not in CONTROLS:
        raise ControlError(
            f"there is no control {spec!r}; expected one of {', '.join(CONTROLS)}, with the number "
            "of draws, such as random-heads:20"
        )
    return CONTROLS[match[1]](*([int(match[2])] if match[2] else []))
