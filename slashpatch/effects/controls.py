"""Controls: the same edit where it should do nothing in particular, drawn by seed.

An effect says little by itself: removing anything from a model hurts. Each control answers one
objection. Which pools are drawn from is *ours*.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ..errors import ControlError
from .control import Control
from .head_controls import MatchedHeads, RandomHeads
from .place_controls import OtherOffsets, RandomPairs

if TYPE_CHECKING:
    pass


CONTROLS: dict[str, type[Control]] = {
    kind.name: kind for kind in (RandomHeads, MatchedHeads, OtherOffsets, RandomPairs)
}


def as_control(spec: Any) -> Control:
    """A control from its text, such as `random-heads:20`, or itself. Raises ControlError."""
    if isinstance(spec, Control):
        return spec
    match = (
        re.fullmatch(r"\s*([a-z-]+)\s*(?::\s*(\d{1,6})\s*)?", spec)
        if isinstance(spec, str)
        else None
    )
    if match is None or match[1] not in CONTROLS:
        raise ControlError(
            f"no control {spec!r}; expected one of {', '.join(CONTROLS)}, with how many draws, "
            "such as random-heads:20"
        )
    return CONTROLS[match[1]](*([int(match[2])] if match[2] else []))
