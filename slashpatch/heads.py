"""Heads by name: L16H0 is query head 0 of layer 16."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .errors import HeadError

_NAME = re.compile(r"L(\d{1,9})H(\d{1,9})", re.IGNORECASE)

#: What `heads` accepts: a Head, its name, a (layer, head) pair, an object with
#: `slash_heads()` (a Scan), a SlashHead, or an iterable of these.
HeadsLike = Any


@dataclass(frozen=True, order=True)
class Head:
    """One attention head: a *query* head, also under grouped-query attention.

    `layer` and `head` count from 0. Prints as `L16H0`, and `Head.parse` reads that back.
    Raises HeadError for negative or non-integer indices.
    """

    layer: int
    head: int

    def __post_init__(self) -> None:
        for field in ("layer", "head"):
            value = getattr(self, field)
            try:
                index = -1 if isinstance(value, bool) else operator.index(value)
            except TypeError:
                index = -1
            if index < 0:
                raise HeadError(f"a head's {field} is an integer from 0; got {value!r}")
            object.__setattr__(self, field, index)

    @classmethod
    def parse(cls, text: str) -> Head:
        """Read one head from its name, such as `L16H0`. Raises HeadError."""
        match = _NAME.fullmatch(text.strip())
        if match is None:
            raise HeadError(
                f"expected a head such as L16H0 (layer 16, head 0), got {text!r}; "
                "write L, the layer, H, the head"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    __repr__ = __str__


def heads(*specs: HeadsLike) -> tuple[Head, ...]:
    """Collect heads from names, pairs, scans and iterables of them.

    Order is kept and repeats are dropped. A scan stands for its slash heads, best first.
    Strings may hold several names: `"L16H0, L11H1"`. Raises HeadError.
    """
    return tuple(dict.fromkeys(_flatten(specs)))


def _flatten(spec: HeadsLike) -> Iterable[Head]:
    if hasattr(spec, "tolist"):
        spec = spec.tolist()  # tensors and arrays of (layer, head) rows
    if isinstance(spec, Head):
        yield spec
    elif isinstance(spec, str):
        names = re.split(r"[,\s]+", spec.strip())
        yield from (Head.parse(name) for name in names)
    elif hasattr(spec, "slash_heads"):
        yield from _flatten(spec.slash_heads())
    elif isinstance(getattr(spec, "head", None), Head):
        yield spec.head
    elif _is_pair(spec):
        yield Head(*spec)
    elif isinstance(spec, Iterable):
        for item in spec:
            yield from _flatten(item)
    else:
        raise HeadError(
            f"expected a head such as 'L16H0' or (16, 0), or a scan, got {spec!r} "
            f"of type {type(spec).__name__}"
        )


def _is_pair(spec: object) -> bool:
    """Whether `spec` is (layer, head): two numbers, not two heads."""
    return (
        isinstance(spec, (tuple, list))
        and len(spec) == 2
        and all(hasattr(part, "__index__") for part in spec)
    )


def require_heads(wanted: Iterable[Head], n_layers: int, n_heads: int) -> None:
    """Raise HeadError if a head lies outside a model of `n_layers` × `n_heads` heads."""
    for head in wanted:
        if head.layer >= n_layers or head.head >= n_heads:
            raise HeadError(
                f"{head} does not exist: the model has {n_layers} layers of {n_heads} heads, "
                f"L0H0 to {Head(n_layers - 1, n_heads - 1)}"
            )
