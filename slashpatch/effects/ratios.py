"""Ratios of two mean effects over the same prompts."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor


def ratio_of_means(
    numerator: Float[Tensor, "prompt"],
    denominator: Float[Tensor, "prompt"],
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """Return the ratio of two means over prompts, and its confidence interval.

    Fieller's interval (J. R. Stat. Soc. B 16, 1954): the ratios r for which a paired t-test does
    not reject that numerator − r · denominator has a mean of zero. Unlike a mean of the prompts'
    ratios it is not ruled by prompts whose denominator is small. NaN for one prompt, and where the
    denominator itself is not clearly different from zero, so that the ratios that are not rejected
    have no end.
    """
    from scipy.stats import t

    x, y = numerator.double(), denominator.double()
    n = len(x)
    mean_x, mean_y = float(x.mean()), float(y.mean())
    nan = float("nan")
    ratio = mean_x / mean_y if mean_y != 0 else nan
    if n < 2 or mean_y == 0:
        return ratio, nan, nan
    dx, dy = x - x.mean(), y - y.mean()
    squared = float(t.ppf((1 + confidence) / 2, n - 1)) ** 2 / (n * (n - 1))
    xx, xy, yy = (squared * float((a * b).sum()) for a, b in ((dx, dx), (dx, dy), (dy, dy)))
    # (mean_x − r mean_y)² ≤ xx − 2 r xy + r² yy, a quadratic in r.
    a, b, c = mean_y**2 - yy, mean_x * mean_y - xy, mean_x**2 - xx
    if a <= 0:
        return ratio, nan, nan
    root = math.sqrt(max(b * b - a * c, 0.0))
    return ratio, (b - root) / a, (b + root) / a
