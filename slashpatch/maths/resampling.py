"""Intervals and tests of means by resampling, for skewed and heavy-tailed samples.

The bootstrap-t interval (Efron, "Nonparametric standard errors and confidence intervals", 1981;
Hall, "Theoretical comparison of bootstrap confidence intervals", 1988) resamples the *studentised*
mean, so it follows the skewness of the sample. Three additions are *ours*, chosen by simulation
(`benchmarks/statistics.py`):

- It is smoothed by normal noise (Polansky and Schucany, "Kernel smoothing to improve bootstrap
  confidence intervals", 1997) of `NOISE` standard deviations, so that samples with ties, such as
  many zeros, do not give infinite intervals.
- Both its tails are those of the level α n / (n + `FEW`), because resamples of few numbers are less
  skewed than the population.
- It is never shorter than Student's t interval, on either side.

Samples of fewer than `LEAST` numbers have no interval and no p-value: NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

#: Resamples of an interval or a test.
RESAMPLES = 19_999
#: The fewest numbers that carry an interval.
LEAST = 6
NOISE, FEW = 0.2, 12
#: Numbers in one tensor of resamples.
AT_ONCE = 2**22
#: Resampled values this close to the observed one count as equal to it.
TIE = 1e-9


class Inference(NamedTuple):
    """What a sample says of a mean: an interval, and the p-value of zero."""

    low: Float[Tensor, "*of"]
    high: Float[Tensor, "*of"]
    p: Float[Tensor, "*of"]


def as_generator(seed: int | torch.Generator) -> torch.Generator:
    """Return a generator on the CPU, from a seed or as it is."""
    return seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)


def mean_inference(
    sample: Float[Tensor, "prompt *of"],
    seed: int | torch.Generator = 0,
    confidence: float = 0.95,
) -> Inference:
    """Return the interval of the mean over the first axis, and the p-value of a zero mean.

    The p-value is below 1 − `confidence` where the interval leaves out zero. A constant sample c
    has the interval [c, c], and p = 1 if c is zero, else `least_p`. All columns use the same
    resamples.

    Args:
        sample: Independent numbers along the first axis, finite.
        seed: A seed, or a generator on the CPU.
        confidence: Level of the interval, between 0 and 1; above about 0.999 the resamples are too
            few, and their extremes are used.
    """
    shape, n = sample.shape[1:], len(sample)
    if n < LEAST:
        return no_inference(shape)
    x = sample.double().reshape(n, -1)
    mean, sd = x.mean(0), x.std(0)
    constant = x.amax(0) == x.amin(0)
    mean = torch.where(constant, x[0], mean)
    scale = torch.where(constant, torch.ones_like(sd), sd)
    z = (x - mean) / scale
    se, t = scale / math.sqrt(n), math.sqrt(n) * mean / scale
    weights = Weights.draw(n, as_generator(seed), RESAMPLES)
    df = torch.full_like(mean, n - 1)
    parts = []
    for at in chunks(z.shape[1], RESAMPLES):
        sums, squares = weights.sums(z[:, at]), weights.squares(z[:, at])
        parts.append(tails(_studentised(sums, squares, n), t[at], df[at], confidence))
    lower, upper, p = (torch.cat(part) for part in zip(*parts, strict=True))
    unchanged = constant & (mean == 0)
    low = torch.where(constant, mean, mean - upper * se)
    high = torch.where(constant, mean, mean - lower * se)
    p = torch.where(unchanged, torch.ones_like(p), p)
    p = torch.where(constant & ~unchanged, torch.full_like(p, least_p(n)), p)
    return Inference(*(values.view(shape) for values in (low, high, p)))


def least_p(n: int) -> float:
    """Return the smallest p-value of a sample of n numbers; 1 for fewer than `LEAST`."""
    return 2 * (n + FEW) / (n * (RESAMPLES + 1)) if n >= LEAST else 1.0


def ratio_interval(
    numerator: Float[Tensor, "prompt *of"],
    denominator: Float[Tensor, "prompt *of"],
    seed: int | torch.Generator = 0,
    confidence: float = 0.95,
) -> tuple[Float[Tensor, "*of"], Float[Tensor, "*of"]]:
    """Return the interval of mean(numerator) / mean(denominator), such as a retained share.

    As `mean_inference`, with the standard error of the ratio by the infinitesimal jackknife (Efron,
    "The jackknife, the bootstrap and other resampling plans", 1982, chapter 6). NaN where the
    interval of the denominator's mean holds zero, because the ratio may then be anything.
    """
    shape, n = numerator.shape[1:], len(numerator)
    if n < LEAST:
        low, high, _ = no_inference(shape)
        return low, high
    top, bottom = (x.double().reshape(n, -1) for x in (numerator, denominator))
    generator = as_generator(seed)
    state = generator.get_state()
    sure = mean_inference(bottom, generator, confidence)
    generator.set_state(state)
    ratio = top.mean(0) / bottom.mean(0)
    rest = top - ratio * bottom
    # A constant ratio has residuals of rounding only.
    constant = rest.abs().amax(0) <= 1e-12 * top.abs().amax(0)
    sd = torch.where(constant, torch.ones_like(ratio), rest.std(0))
    d, weight = rest * bottom.mean(0).sign() / sd, bottom / bottom.mean(0)
    se = sd / (math.sqrt(n) * bottom.mean(0).abs())
    weights = Weights.draw(n, generator, RESAMPLES)
    parts = []
    for at in chunks(d.shape[1], RESAMPLES):
        of_d, of_w = weights.sums(d[:, at]), weights.counts @ weight[:, at]
        moved = of_d / of_w  # (ratio* − ratio), in units of sd / mean(denominator)
        squares = (
            weights.squares(d[:, at])
            - 2 * moved * (weights.counts @ (d * weight)[:, at] + weights.noise @ weight[:, at])
            + moved**2 * (weights.counts @ weight[:, at] ** 2)
        )
        variance = (squares / (n - 1)).clamp(min=TIE**2)
        t = of_w.sign() * of_d / (n * variance).sqrt()
        zero = torch.zeros_like(sd[at])
        parts.append(tails(t, zero, zero + n - 1, confidence))
    lower, upper, _ = (torch.cat(part) for part in zip(*parts, strict=True))
    unsure = (sure.low <= 0) & (sure.high >= 0)
    low, high = ratio - upper * se, ratio - lower * se
    low, high = (
        torch.where(unsure, torch.nan, torch.where(constant, ratio, end)).view(shape)
        for end in (low, high)
    )
    return low, high


def halves(n: int, seed: int | torch.Generator) -> tuple[list[int], list[int]]:
    """Return two random halves of the indices 0 to n − 1: to pick on, and to estimate on.

    What is picked for being the largest of many looks larger on the data that it was picked on. The
    second half has the odd one. For n = 1 the first half is empty.
    """
    order = torch.randperm(n, generator=as_generator(seed)).tolist()
    return sorted(order[: n // 2]), sorted(order[n // 2 :])


class Weights(NamedTuple):
    """Resamples of n numbers with smoothing noise, as matrices that act on the numbers.

    Attributes:
        counts: How often each number is in each resample.
        noise: The sum of the noise that is added to each number in each resample.
        total: The noise of each resample, summed.
        squared: Its squares, summed.
    """

    counts: Float[Tensor, "resample prompt"]
    noise: Float[Tensor, "resample prompt"]
    total: Float[Tensor, "resample 1"]
    squared: Float[Tensor, "resample 1"]

    @classmethod
    def draw(cls, n: int, generator: torch.Generator, count: int) -> Weights:
        """Draw `count` resamples of n numbers."""
        index: Int[Tensor, "resample prompt"] = torch.randint(0, n, (count, n), generator=generator)
        noise = NOISE * torch.randn(count, n, generator=generator, dtype=torch.float64)
        zeros = torch.zeros(count, n, dtype=torch.float64)
        return cls(
            zeros.scatter_add(1, index, torch.ones_like(noise)),
            zeros.scatter_add(1, index, noise),
            noise.sum(1, keepdim=True),
            (noise**2).sum(1, keepdim=True),
        )

    def sums(self, z: Float[Tensor, "prompt of"]) -> Float[Tensor, "resample of"]:
        """Return the sum of each resample of z, which has mean 0 and standard deviation 1."""
        return self.counts @ z + self.total

    def squares(self, z: Float[Tensor, "prompt of"]) -> Float[Tensor, "resample of"]:
        """Return the sum of squares of each resample of z."""
        return self.counts @ z**2 + 2 * (self.noise @ z) + self.squared


def _studentised(sums: Tensor, squares: Tensor, n: int) -> Float[Tensor, "resample of"]:
    """Return the mean of each resample over its standard error."""
    variance = ((squares - sums**2 / n) / (n - 1)).clamp(min=TIE**2)
    return sums / (n * variance).sqrt()


def tails(
    resampled: Float[Tensor, "resample of"],
    t: Float[Tensor, "of"],
    df: Float[Tensor, "of"],
    confidence: float,
) -> tuple[Float[Tensor, "of"], Float[Tensor, "of"], Float[Tensor, "of"]]:
    """Return the lower and upper limit of the studentised mean, and the p-value of t."""
    from scipy.stats import t as student

    count, share = len(resampled), (df + 1) / (df + 1 + FEW)
    tail = (1 - confidence) / 2
    ranks = (tail * share * (count + 1) + TIE).floor().long().clamp(1, count)
    most, at = int(ranks.max()), ranks[None] - 1
    limit = torch.as_tensor(student.ppf(1 - tail, df.numpy()))
    lower = resampled.topk(most, dim=0, largest=False).values.gather(0, at)[0].minimum(-limit)
    upper = resampled.topk(most, dim=0).values.gather(0, at)[0].maximum(limit)
    above = (resampled >= t - TIE * t.abs()).sum(0)
    below = (resampled <= t + TIE * t.abs()).sum(0)
    p = 2 * (torch.minimum(above, below) + 1).double() / (count + 1) / share
    of_student = torch.as_tensor(2 * student.sf(t.abs().numpy(), df.numpy()))
    return lower, upper, p.maximum(of_student).clamp(max=1)


def no_inference(shape: torch.Size) -> Inference:
    """Return NaN for each column: too few numbers."""
    nothing = torch.full(shape, torch.nan, dtype=torch.float64)
    return Inference(nothing, nothing.clone(), nothing.clone())


def chunks(n_columns: int, size: int) -> Iterator[slice]:
    """Yield slices of columns, so that tensors of `size` rows stay small."""
    step = max(1, AT_ONCE // size)
    for start in range(0, n_columns, step):
        yield slice(start, start + step)
