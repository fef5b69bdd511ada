"""Ratios of two means over the same prompts, such as the share of an effect that is left."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from ..maths.resampling import LEAST, ratio_interval


def ratio_of_means(
    part: Float[Tensor, "prompt"],
    whole: Float[Tensor, "prompt"],
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Return mean(part) / mean(whole) over prompts, and the ends of its interval.

    The interval is that of `slashpatch.maths.resampling.ratio_interval`: NaN for few prompts. All
    are NaN where the mean of `whole` is not clearly different from zero, because the ratio may then
    be anything.
    """
    low, high = (
        float(end) for end in ratio_interval(part.double(), whole.double(), seed, confidence)
    )
    mean = float(whole.double().mean())
    if mean == 0 or (math.isnan(low) and len(part) >= LEAST):
        return (math.nan,) * 3
    return float(part.mean()) / mean, low, high
