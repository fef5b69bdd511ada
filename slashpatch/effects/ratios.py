"""Ratios of means over prompts, such as the share of an effect that a part of it makes."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from .statistics import interval


def ratio_of_means(
    part: Float[Tensor, "prompt"],
    whole: Float[Tensor, "prompt"],
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Return mean(part) / mean(whole) over prompts, and the ends of its interval.

    The interval is that of the mean of the linearised ratio, R + (part − R · whole) / mean(whole)
    (the delta method: Cochran, Sampling Techniques, 1977, section 6.4). All NaN where the interval
    of the mean of `whole` holds 0 (*ours*): the ratio then says nothing.
    """
    part, whole = part.double(), whole.double()
    below, above = (float(end) for end in interval(whole, seed, confidence))
    mean = float(whole.mean())
    if mean == 0 or below <= 0 <= above:
        return (float("nan"),) * 3
    ratio = float(part.mean()) / mean
    low, high = interval(ratio + (part - ratio * whole) / mean, seed, confidence)
    return ratio, float(low), float(high)
