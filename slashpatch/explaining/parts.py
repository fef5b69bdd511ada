"""Parts of an explanation beside rank, bands and profile: variation and origin; JSON values."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ..maths.logit_shares import LogitShares


class Variation(NamedTuple):
    """How much a head's queries and keys vary in norm and in sign, beside r1 (*ours*).

    Attributes:
        norm_q: Standard deviation of the queries' norms over their mean; `norm_k` of the keys'.
        sign_q: Share of the queries whose component along their leading direction has the rarer
            sign, 0 to 0.5; `sign_k` of the keys.
    """

    norm_q: float
    norm_k: float
    sign_q: float
    sign_k: float


class FromAxis(NamedTuple):
    """How much of a head's mean query (or key) comes from the axis of the attention inputs.

    The mean before any norm is W x̄ + b, so it is the sum of three parts: W u uᵀx̄ of the axis u, the
    bias b, and W (x̄ − u uᵀx̄). Each one's share is its component along the mean, over the mean's
    length; the three add up to 1. *Ours*, after the cone of arXiv 2601.08297.

    Attributes:
        axis: Share of the axis.
        bias: Share of the bias.
        rest: Share of what is left.
        cosine: Cosine of the mean query (after a norm, where the model has one) to the query that
            the axis alone makes, of input u uᵀx̄ with bias and norm.
        leading: |cosine| of the leading direction of the queries to that of the axis alone.
    """

    axis: float
    bias: float
    rest: float
    cosine: float
    leading: float


class Origin(NamedTuple):
    """Where a head's near rank-one queries and keys come from: the cone of the attention inputs.

    The axis u is fitted on other prompts than those of the explanation: on built-in text, unless
    an axis was given.

    Attributes:
        cosine: Mean cosine of the attention inputs to u.
        share: Share of the inputs' second moment E|x|² along u.
        q: How much of the mean query comes from u; `k` of the mean key.
        dropped: Slash score with u dropped from the input of queries ("q"), keys ("k") or both
            ("qk"): `slashpatch.DropDirection`.
        controls: Slash scores under that edit's controls of queries and keys, one for each draw:
            "same_size", "random", "principal".
    """

    cosine: float
    share: float
    q: FromAxis
    k: FromAxis
    dropped: dict[str, float]
    controls: dict[str, list[float]]

    @property
    def lowest_control(self) -> float:
        """The lowest score under any control."""
        return min(score for draws in self.controls.values() for score in draws)


def to_record(part: LogitShares | Variation | Origin | None) -> dict[str, Any] | None:
    """Return a part as JSON values."""
    if part is None:
        return None
    record = part._asdict()
    for name, value in record.items():
        if isinstance(value, FromAxis):
            record[name] = value._asdict()
    return record


def shares_from(record: Any) -> LogitShares | None:
    """Return the shares that a file holds, if it holds some. Raises as bad JSON values do."""
    if record is None:
        return None
    numbers = {name: number(record[name]) for name in LogitShares._fields if name != "n_offsets"}
    return LogitShares(**numbers, n_offsets=index(record["n_offsets"]))


def variation_from(record: Any) -> Variation | None:
    """Return the variation that a file holds, if it holds one. Raises as bad JSON values do."""
    if record is None:
        return None
    return Variation(*(number(record[name]) for name in Variation._fields))


def origin_from(record: Any) -> Origin | None:
    """Return the origin that a file holds, if it holds one. Raises as bad JSON values do."""
    if record is None:
        return None
    q, k = (
        FromAxis(*(number(record[part][name]) for name in FromAxis._fields)) for part in ("q", "k")
    )
    dropped = {name: number(record["dropped"][name]) for name in ("q", "k", "qk")}
    controls = {
        str(name): [number(score) for score in draws] for name, draws in record["controls"].items()
    }
    if not all(controls.values()) or not controls:
        raise ValueError("its origin has a control without draws")
    return Origin(number(record["cosine"]), number(record["share"]), q, k, dropped, controls)


def number(value: Any, missing: float = math.nan) -> float:
    """Return a number of a file; `missing` for null."""
    if value is None:
        return missing
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"expected a number, got {value!r}")
    return float(value)


def index(value: Any) -> int:
    """Return an integer from 0 of a file."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"expected an integer from 0, got {value!r}")
    return value
