"""Offsets: how many tokens back a head reads."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterable
from typing import Any

from ..errors import OffsetError

#: Beyond any model's context; stops a mistyped range from filling the memory.
_MOST_OFFSETS = 2**21


def as_offsets(spec: Any) -> tuple[int, ...]:
    """Read offsets from an int, ints, a range, or text such as `"0-15"` or `"1,2,8-10"`.

    Returns the sorted, distinct offsets. Raises OffsetError for anything empty, negative or not an
    integer.
    """
    if hasattr(spec, "tolist"):
        spec = spec.tolist()  # tensors and arrays, of no axis too
    if isinstance(spec, str):
        values: list[Any] = []
        for part in spec.split(","):
            match = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
            if match is None:
                raise OffsetError(f"expected offsets such as 1, 0-15 or 1,2,8-10; got {spec!r}")
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                raise OffsetError(f"offset range {part.strip()!r} runs backwards")
            values += range(first, min(last, first + _MOST_OFFSETS) + 1)
    elif isinstance(spec, Iterable):
        values = list(itertools.islice(spec, _MOST_OFFSETS + 1))
    else:
        values = [spec]
    if not values:
        raise OffsetError("no offsets were given; expected at least one, such as 1 or range(16)")
    if len(values) > _MOST_OFFSETS:
        raise OffsetError(f"at most {_MOST_OFFSETS:,} offsets can be asked for; got more")
    offsets = set()
    for value in values:
        try:
            offset = -1 if isinstance(value, bool) else operator.index(value)
        except TypeError:
            offset = -1
        if offset < 0:
            raise OffsetError(
                f"an offset is an integer from 0 (token i reads token i−offset); got {value!r}"
            )
        offsets.add(offset)
    return tuple(sorted(offsets))
