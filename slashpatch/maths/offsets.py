"""Offsets Δ: how many tokens back from the query a head attends."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterable
from typing import Any

from ..errors import OffsetError

#: More than any model's context length, so that a mistyped range does not fill the memory.
_MOST_OFFSETS = 2**21


def as_offsets(spec: Any) -> tuple[int, ...]:
    """Return the sorted, distinct offsets that an int, ints, a range or a text names.

    Texts are such as `"0-15"` or `"1,2,8-10"`. Raises OffsetError where there is no offset, or one
    that is negative or not an integer.
    """
    if hasattr(spec, "tolist"):
        spec = spec.tolist()  # tensors and arrays, zero-dimensional ones included
    if isinstance(spec, str):
        values: list[Any] = []
        for part in spec.split(","):
            match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
            if match is None:
                raise OffsetError(f"expected offsets such as 1, 0-15 or 1,2,8-10; got {spec!r}")
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                raise OffsetError(f"offset range {part.strip()!r} ends before it starts")
            values += range(first, min(last, first + _MOST_OFFSETS) + 1)
    elif isinstance(spec, Iterable):
        values = list(itertools.islice(spec, _MOST_OFFSETS + 1))
    else:
        values = [spec]
    if not values:
        raise OffsetError("no offsets were given; expected at least one, such as 1 or range(16)")
    if len(values) > _MOST_OFFSETS:
        raise OffsetError(f"expected at most {_MOST_OFFSETS:,} offsets; got more")
    offsets = set()
    for value in values:
        try:
            offset = -1 if isinstance(value, bool) else operator.index(value)
        except TypeError:
            offset = -1
        if offset < 0:
            raise OffsetError(
                f"an offset is an integer from 0 up (token i reads token i−offset); got {value!r}"
            )
        offsets.add(offset)
    return tuple(sorted(offsets))
