"""Intervals and tests of means: their rates in simulations, and what they do at the edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slashpatch.maths import resampling
from slashpatch.maths.resampling import (
    LEAST,
    halves,
    least_p,
    mean_inference,
    ratio_interval,
)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def slow(sample, seed, confidence):
    """The interval and p-value of one sample, by a loop over resamples as the text defines them."""
    from scipy.stats import t as student

    n, mean, sd = len(sample), sample.mean(), sample.std()
    z = (sample - mean) / sd
    generator = seeded(seed)
    b = resampling.RESAMPLES
    index = torch.randint(0, n, (b, n), generator=generator)
    noise = resampling.NOISE * torch.randn(b, n, generator=generator, dtype=torch.float64)
    resampled = [z[i] + e for i, e in zip(index, noise, strict=True)]
    t = torch.stack([math.sqrt(n) * r.mean() / r.std() for r in resampled]).sort().values
    share = n / (n + resampling.FEW)
    k = max(1, math.floor((1 - confidence) / 2 * share * (b + 1) + 1e-9))
    limit = float(student.ppf((1 + confidence) / 2, n - 1))
    observed = math.sqrt(n) * mean / sd
    beyond = min(int((t >= observed).sum()), int((t <= observed).sum()))
    p = max(2 * (beyond + 1) / (b + 1) / share, 2 * student.sf(abs(float(observed)), n - 1))
    se = sd / math.sqrt(n)
    low = mean - max(float(t[-k]), limit) * se
    high = mean - min(float(t[k - 1]), -limit) * se
    return float(low), float(high), min(p, 1)


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(resampling, "RESAMPLES", 999)


@pytest.mark.parametrize("n", [6, 8, 17])
@pytest.mark.parametrize("confidence", [0.95, 0.8])
def test_all_columns_at_once_are_what_the_definition_says_of_each(few_resamples, n, confidence):
    sample = normal(n, 2, 2, seed=n).exp() - 1
    low, high, p = mean_inference(sample, seed=4, confidence=confidence)
    for at in ((0, 0), (1, 0), (1, 1)):
        by_hand = slow(sample[(slice(None), *at)], 4, confidence)
        assert (float(low[at]), float(high[at]), float(p[at])) == pytest.approx(by_hand)


def _drawn(kind, n, cells, seed):
    z, generator = normal(n, cells, seed=seed), seeded(seed + 1)
    if kind == "log-normal":
        return z.exp() - math.exp(0.5)
    if kind == "t, 3 degrees":
        return z / (normal(3, n, cells, seed=seed + 2).square().mean(0)).sqrt()
    if kind == "bimodal":
        return z / 2 + 4 * torch.randint(2, (n, cells), generator=generator) - 2
    return z


@pytest.mark.parametrize("n", [6, 8, 16, 32])
@pytest.mark.parametrize(
    ("kind", "least"),
    [("normal", 0.94), ("log-normal", 0.92), ("t, 3 degrees", 0.92), ("bimodal", 0.92)],
)
def test_intervals_cover_and_tests_reject_at_their_rates(n, kind, least, monkeypatch):
    monkeypatch.setattr(resampling, "RESAMPLES", 3_999)
    sample = _drawn(kind, n, 1500, seed=20)
    low, high, p = mean_inference(sample, seed=1)
    assert float(((low <= 0) & (high >= 0)).double().mean()) >= least
    assert float((p <= 0.05).double().mean()) <= 1 - least


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(LEAST, 12),
    seed=st.integers(0, 2**20),
    shift=st.floats(-3, 3),
    ties=st.booleans(),
)
def test_p_says_what_the_interval_says(n, seed, shift, ties):
    sample = normal(n, 5, seed=seed) + shift
    sample = sample.round() if ties else sample
    low, high, p = mean_inference(sample, seed=seed)
    apart = torch.minimum(low.abs(), high.abs()) > 1e-9
    outside = (low > 0) | (high < 0)
    assert torch.equal(outside[apart], (p <= 0.05)[apart])
    assert bool(((low <= sample.mean(0)) & (sample.mean(0) <= high)).all())
    assert bool((low.isfinite() & high.isfinite()).all())
    assert bool(((p >= least_p(n)) & (p <= 1)).all())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), factor=st.floats(1e-6, 1e6))
def test_units_do_not_matter_and_columns_do_not_move_one_another(seed, factor):
    sample = normal(9, 3, seed=seed)
    low, high, p = mean_inference(sample, seed=1)
    scaled = mean_inference(factor * sample, seed=1)
    torch.testing.assert_close(scaled.low, factor * low)
    torch.testing.assert_close(scaled.p, p)
    alone = mean_inference(sample[:, 1], seed=1)
    torch.testing.assert_close(alone.high, high[1])
    negative = mean_inference(-sample, seed=1)
    # Other resamples for the mirrored sample, so only about the same.
    torch.testing.assert_close(negative.high, -low, atol=0.3, rtol=0.3)


def test_samples_without_spread_or_with_ties():
    zeros, fives = torch.zeros(8), torch.full((8,), 0.1)
    one_differs = torch.tensor([0.0] * 7 + [1.0])
    low, high, p = mean_inference(torch.stack([zeros, fives, one_differs], dim=1))
    assert (float(low[0]), float(high[0]), float(p[0])) == (0, 0, 1)
    tenth = float(torch.tensor(0.1).double())
    assert (float(low[1]), float(high[1]), float(p[1])) == (tenth, tenth, least_p(8))
    assert -math.inf < float(low[2]) < 0 < 1 / 8 < float(high[2]) < math.inf
    assert float(p[2]) > 0.05


@pytest.mark.parametrize("n", range(LEAST))
def test_few_numbers_have_no_interval(n):
    for values in mean_inference(torch.ones(n, 3)):
        assert values.shape == (3,)
        assert values.isnan().all()
    low, high = ratio_interval(torch.ones(n), torch.ones(n))
    assert low.isnan()
    assert high.isnan()
    assert least_p(n) == 1


def test_not_a_number_stays_one():
    sample = normal(8, 2)
    sample[3, 0] = math.nan
    low, high, p = mean_inference(sample)
    assert low.isnan().tolist() == high.isnan().tolist() == p.isnan().tolist() == [True, False]


@pytest.mark.parametrize("sign", [1, -1])
def test_ratios(sign):
    bottom = sign * (2 + normal(12, 1500, seed=1).exp())
    top = 0.7 * bottom + normal(12, 1500, seed=2) * bottom.abs() / 3
    low, high = ratio_interval(top, bottom, seed=3)
    known = ~low.isnan()  # the others have a denominator that may be zero
    assert float(known.double().mean()) > 0.95
    covered = float(((low <= 0.7) & (high >= 0.7))[known].double().mean())
    assert 0.93 <= covered <= 0.99
    ratio = top.mean(0) / bottom.mean(0)
    assert bool(((low < ratio) & (ratio < high))[known].all())


def test_ratios_that_are_constant_or_unknown():
    bottom = 3 + normal(8, seed=1)
    low, high = ratio_interval(bottom / 4, bottom)
    assert float(low) == pytest.approx(0.25) == float(high)
    low, high = ratio_interval(bottom, normal(8, seed=2))  # a denominator that may be zero
    assert low.isnan()
    assert high.isnan()
    low, high = ratio_interval(0 * bottom, bottom)
    assert (float(low), float(high)) == (0, 0)


def test_a_ratio_to_a_constant_is_a_mean():
    top = normal(10, 3, seed=5) + 2
    low, high = ratio_interval(top, torch.full((10, 3), 4.0), seed=7)
    of_mean = mean_inference(top / 4, seed=7)
    torch.testing.assert_close(low, of_mean.low)
    torch.testing.assert_close(high, of_mean.high)


@given(n=st.integers(0, 30), seed=st.integers(0, 2**32))
def test_halves(n, seed):
    picking, estimating = halves(n, seed)
    assert sorted(picking + estimating) == list(range(n))
    assert len(estimating) - len(picking) in (0, 1)
    assert (picking, estimating) == halves(n, seed)
