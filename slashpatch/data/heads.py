"""Heads by name: L16H0 is query head 0 of layer 16."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import HeadError

_NAME = re.compile(r"L(\d{1,9})H(\d{1,9})", re.IGNORECASE)
#: A layer or layers, and unless all heads are meant, a head or heads: L16H0, L16H0-3, L0-3H2, L16.
_NAMES = re.compile(
    r"L(\d{1,9})(?:-(\d{1,9}))?(?:H(\d{1,9})(?:-(\d{1,9}))?)?", re.IGNORECASE | re.ASCII
)
#: More heads than any model has: a range beyond this is a typing error.
_MOST_HEADS = 1_000_000

#: What `heads` accepts: a Head, a name, a (layer, head) pair, an array of such rows, a boolean mask
#: [layer, head], an object with `slash_heads()` (a Scan), a SlashHead, or an iterable of these.
HeadsLike = Any


@dataclass(frozen=True, order=True)
class Head:
    """One attention head: a *query* head, also under grouped-query attention.

    Prints as `L16H0`, and `Head.parse` reads that back. Heads sort by layer, then by head.

    Attributes:
        layer: Index of its layer, from 0.
        head: Index among the query heads of the layer, from 0.

    Raises:
        HeadError: Negative or non-integer indices.
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
        """Return the head that a name such as `L16H0` stands for. Raises HeadError."""
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


def heads(*specs: HeadsLike, n_heads: int | None = None) -> tuple[Head, ...]:
    """Return the heads that names, ranges, pairs, masks, scans or iterables of them stand for.

    Names are `"L16H0"`, ranges that include both ends (`"L16H0-3"`, `"L0-3H2"`, `"L0-3H0-1"`) or
    whole layers (`"L16"`, `"L0-3"`); a string may hold several: `"L16H0, L11H1-2"`. Arrays, tensors
    and pandas Series of names or of (layer, head) rows are read row by row; a boolean array
    [layer, head] stands for the heads where it is True. A scan stands for its slash heads, best
    first. The order given is kept and repeats are dropped.

    Args:
        specs: Any of these.
        n_heads: How many heads a layer of the model has, which whole layers need. Functions that
            take a model and heads know it.

    Raises:
        HeadError: What is none of these, a whole layer without `n_heads`, or a mask whose second
            axis has another length than `n_heads`.
    """
    if n_heads is not None and (
        isinstance(n_heads, bool) or not hasattr(n_heads, "__index__") or n_heads < 1
    ):
        raise HeadError(f"n_heads is an integer from 1, such as model.cfg.n_heads; got {n_heads!r}")
    return tuple(dict.fromkeys(_flatten(specs, n_heads)))


def _flatten(spec: HeadsLike, n_heads: int | None) -> Iterator[Head]:
    if _is_boolean(spec):
        yield from _where_true(spec, n_heads)
        return
    if hasattr(spec, "tolist"):
        spec = spec.tolist()  # tensors, arrays and Series: of names, or of (layer, head) rows
    if isinstance(spec, Head):
        yield spec
    elif isinstance(spec, str):
        for name in re.split(r"[,\s]+", spec.strip().rstrip(",")):
            yield from _named(name, n_heads)
    elif hasattr(spec, "slash_heads"):
        yield from _flatten(spec.slash_heads(), n_heads)
    elif isinstance(getattr(spec, "head", None), Head):
        yield spec.head
    elif _is_pair(spec):
        yield Head(*spec)
    elif isinstance(spec, Iterable):
        for item in spec:
            yield from _flatten(item, n_heads)
    else:
        raise HeadError(
            f"expected a head such as 'L16H0' or (16, 0), or a scan, got {spec!r} "
            f"of type {type(spec).__name__}"
        )


def _named(name: str, n_heads: int | None) -> Iterator[Head]:
    """Yield the heads of one name or range, layer by layer."""
    match = _NAMES.fullmatch(name)
    if match is None:
        raise HeadError(
            f"expected a head such as L16H0 (layer 16, head 0), or heads such as L16H0-3, L0-3H2 "
            f"or L16, got {name!r}; write L, the layer or layers, H, the head or heads"
        )
    layer, last_layer, head, last_head = match.groups()
    layers = _range(name, layer, last_layer)
    if head is not None:
        columns = _range(name, head, last_head)
    elif n_heads is not None:
        columns = range(n_heads)
    else:
        raise HeadError(
            f"{name!r} stands for all heads of a layer, and how many there are is not known "
            f"without the model; write a range such as {name}H0-8, or "
            f"heads({name!r}, n_heads=model.cfg.n_heads)"
        )
    if len(layers) * len(columns) > _MOST_HEADS:
        raise HeadError(
            f"{name!r} stands for {len(layers) * len(columns):,} heads; expected at most "
            f"{_MOST_HEADS:,}"
        )
    for index in layers:
        yield from (Head(index, column) for column in columns)


def _range(name: str, first: str, last: str | None) -> range:
    start, stop = int(first), int(first if last is None else last)
    if stop < start:
        raise HeadError(f"{name!r} has a range from {start} to {stop}; write the lower end first")
    return range(start, stop + 1)


def _is_boolean(spec: object) -> bool:
    """Whether `spec` is a tensor, array or Series of booleans, told from (layer, head) rows."""
    return str(getattr(spec, "dtype", "")) in ("torch.bool", "bool", "boolean")


def _where_true(mask: Any, n_heads: int | None) -> Iterator[Head]:
    """Yield the heads at which a mask [layer, head] is True, layer by layer."""
    shape = tuple(mask.shape)
    if len(shape) != 2 or (n_heads is not None and shape[1] != n_heads):
        axes = "[layer, head]" if n_heads is None else f"[layer, head] with {n_heads} heads"
        raise HeadError(f"a boolean mask of heads has shape {axes}, got {list(shape)}")
    for layer, row in enumerate(mask.tolist()):
        yield from (Head(layer, head) for head, chosen in enumerate(row) if chosen)


def _is_pair(spec: object) -> bool:
    """Whether `spec` is one (layer, head) pair: two integers."""
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
