"""Coverage of intervals, and p-values under the null, by simulation."""

import pytest
import torch

from slashpatch.effects.statistics import compared, false_discovery, interval, p_value


def normal(generator, n, cells):
    return torch.randn(n, cells, generator=generator, dtype=torch.float64)


def skewed(generator, n, cells):
    return torch.empty(n, cells, dtype=torch.float64).exponential_(generator=generator) - 1


@pytest.mark.parametrize(
    ("draw", "n", "confidence", "least"),
    [
        (normal, 8, 0.95, 0.93),
        (normal, 16, 0.95, 0.93),
        (normal, 16, 0.8, 0.77),
        (normal, 40, 0.95, 0.93),
        (skewed, 40, 0.95, 0.91),  # a skewed mean is harder for any interval
    ],
)
def test_intervals_cover_at_their_rate(draw, n, confidence, least):
    sample = draw(torch.Generator().manual_seed(0), n, 1500)
    low, high = interval(sample, seed=1, confidence=confidence)
    covered = float(((low <= 0) & (high >= 0)).double().mean())
    assert least <= covered <= confidence + 0.02
    # A plain percentile interval of few prompts covers less than it says.
    if draw is normal and n == 8:
        from transformer_lens.utilities.statistics import bootstrap_ci

        plain_low, plain_high = bootstrap_ci(sample, dim=0)
        assert float(((plain_low <= 0) & (plain_high >= 0)).double().mean()) < 0.92


@pytest.mark.parametrize("n", [10, 20])
def test_p_values_are_uniform_under_the_null(n):
    from scipy.stats import kstest

    p = p_value(normal(torch.Generator().manual_seed(2), n, 2000), seed=3)
    assert kstest(p.numpy(), "uniform").pvalue > 0.01
    for level in (0.01, 0.05, 0.2):
        assert float((p <= level).double().mean()) <= level + 0.015


def test_p_values_see_effects():
    effects = 1 + normal(torch.Generator().manual_seed(0), 20, 5)
    assert float(p_value(effects).max()) < 0.01
    assert bool((p_value(-effects) == p_value(effects)).all())


def test_few_prompts():
    low, high = interval(torch.tensor([[1.0, 2.0]]))
    assert low.isnan().all()
    assert high.isnan().all()
    assert p_value(torch.tensor([[1.0, 2.0]])).isnan().all()
    low, high = interval(torch.tensor([1.0, 2.0]))  # no more than the prompts themselves
    assert (float(low), float(high)) == (1.0, 2.0)


def test_equal_seeds_give_equal_results_and_columns_do_not_move_one_another():
    sample = normal(torch.Generator().manual_seed(0), 20, 3)
    both = compared(0 * sample, sample, seed=5)
    one = compared(0 * sample[:, :1], sample[:, :1], seed=5)
    for key, value in one.items():
        torch.testing.assert_close(both[key][:1], value, atol=1e-12, rtol=0)
    again = compared(0 * sample, sample, seed=5)
    assert all(torch.equal(both[key], again[key]) for key in both)
    assert not torch.equal(both["low"], compared(0 * sample, sample, seed=6)["low"])


def test_nothing_changed():
    same = torch.ones(20, dtype=torch.float64)
    said = compared(same, same)
    assert (float(said["effect"]), float(said["low"]), float(said["high"])) == (0, 0, 0)
    assert float(said["p"]) == 1


def test_false_discovery():
    p = torch.tensor([0.01, torch.nan, 0.04, 0.5], dtype=torch.float64)
    q = false_discovery(p)
    assert q[1].isnan()
    torch.testing.assert_close(q[[0, 2, 3]], torch.tensor([0.03, 0.06, 0.5], dtype=torch.float64))
    assert false_discovery(torch.tensor([torch.nan])).isnan().all()
