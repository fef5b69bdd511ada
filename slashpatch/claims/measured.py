"""What one test of a claim measured: an estimate, its interval, and that of a control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ..effects.statistics import beyond_draws, interval
from ..errors import (
    BandError,
    ControlError,
    EditError,
    HeadError,
    MetricError,
    ModelError,
    OffsetError,
    PatchError,
    PromptError,
    ScanError,
)
from ..maths.resampling import ratio_interval

#: Errors by which a model refuses a test; others stop the run.
_REFUSALS = (
    BandError,
    ControlError,
    EditError,
    HeadError,
    MetricError,
    ModelError,
    OffsetError,
    PatchError,
    PromptError,
    ScanError,
)


@dataclass(frozen=True)
class Measured:
    """The numbers of one test.

    Attributes:
        test: Name of the test, a key of `slashpatch.claims.rules.RULES`.
        estimate: What was measured; NaN if it could not be.
        low: Lower end of its confidence interval; NaN if there is none.
        high: Upper end.
        n: Number of prompts, the unit of the interval.
        control: The same number for the control, mean over its draws; NaN without a control.
        draws: Number of the control's draws; 0 without.
        p_rank: Rank p-value of the edit among the draws; NaN without.
        why_not: Why it could not be measured; empty if it was.
        detail: Which heads and offsets, in words.
    """

    test: str
    estimate: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    n: int = 0
    control: float = float("nan")
    draws: int = 0
    p_rank: float = float("nan")
    why_not: str = ""
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return dict(vars(self))


def mean(
    test: str, sample: Float[Tensor, "prompt"], seed: int = 0, detail: str = "", **more: Any
) -> Measured:
    """Return the mean over prompts, with its interval."""
    sample = sample.double()
    low, high = interval(sample, seed)
    return Measured(
        test,
        float(sample.mean()),
        float(low),
        float(high),
        len(sample),
        detail=detail,
        **more,
    )


def share(
    test: str,
    part: Float[Tensor, "prompt"],
    whole: Float[Tensor, "prompt"],
    seed: int = 0,
    detail: str = "",
) -> Measured:
    """Return a ratio of two means over prompts, with its interval."""
    part, whole = part.double(), whole.double()
    low, high = ratio_interval(part, whole, seed)
    estimate = float(part.mean() / whole.mean())
    return Measured(test, estimate, float(low), float(high), len(part), detail=detail)


def beyond(
    test: str,
    sample: Float[Tensor, "prompt"],
    draws: Float[Tensor, "draw prompt"],
    seed: int = 0,
    detail: str = "",
) -> Measured:
    """Return a mean minus that of a control's draws, with an interval over prompts and draws.

    The rank p-value counts draws whose mean is at least as large in absolute value.
    """
    found = beyond_draws(sample.double(), draws.double(), seed)
    return Measured(
        test,
        float(found.estimate),
        float(found.low),
        float(found.high),
        len(sample),
        float(draws.double().mean()),
        len(draws),
        float(found.p_rank),
        detail=detail,
    )


def attempted(tests: Sequence[str], measure: Callable[[], list[Measured]]) -> list[Measured]:
    """Return what `measure` returns; where the model refuses, the tests and its reason."""
    try:
        return measure()
    except _REFUSALS as error:
        return refused(tests, str(error))


def refused(tests: Sequence[str], why: str) -> list[Measured]:
    """Return tests that could not be measured, and why."""
    return [Measured(test, why_not=why) for test in tests]
