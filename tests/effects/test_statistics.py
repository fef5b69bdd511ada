"""Coverage of intervals, and p-values under the null, by simulation."""

import re

import pytest
import torch

from slashpatch.effects.statistics import (
    LEAST,
    compared,
    false_discovery,
    interval,
    largest,
    p_value,
    split,
)


def normal(generator, n, cells):
    return torch.randn(n, cells, generator=generator, dtype=torch.float64)


def skewed(generator, n, cells):
    return torch.empty(n, cells, dtype=torch.float64).exponential_(generator=generator) - 1


@pytest.mark.parametrize(
    ("draw", "n", "confidence", "least"),
    [
        (normal, 8, 0.95, 0.93),
        (normal, 16, 0.8, 0.79),
        (normal, 40, 0.95, 0.94),
        (skewed, 16, 0.95, 0.93),
        (skewed, 40, 0.95, 0.93),
    ],
)
def test_intervals_cover_at_their_rate(draw, n, confidence, least):
    sample = draw(torch.Generator().manual_seed(0), n, 1500)
    low, high = interval(sample, seed=1, confidence=confidence)
    assert float(((low <= 0) & (high >= 0)).double().mean()) >= least


@pytest.mark.parametrize("n", [10, 20])
@pytest.mark.parametrize("draw", [normal, skewed])
def test_p_values_are_not_too_small_under_the_null(n, draw):
    p = p_value(draw(torch.Generator().manual_seed(2), n, 2000), seed=3)
    for level in (0.01, 0.05, 0.2):
        assert float((p <= level).double().mean()) <= level + 0.015


def test_p_values_see_effects():
    effects = 1 + normal(torch.Generator().manual_seed(0), 20, 5)
    assert float(p_value(effects).max()) < 0.01
    assert float(p_value(-effects).max()) < 0.01


def test_few_prompts():
    low, high = interval(torch.tensor([[1.0, 2.0]]))
    assert low.isnan().all()
    assert high.isnan().all()
    assert p_value(torch.tensor([[1.0, 2.0]])).isnan().all()
    few = torch.arange(LEAST - 1.0)
    assert interval(few)[0].isnan()
    assert p_value(few).isnan()
    assert not p_value(torch.arange(float(LEAST))).isnan()


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


def test_the_largest_is_estimated_on_other_prompts_than_it_is_picked_on():
    """Of many columns of noise, the largest looks like an effect where it was picked."""
    names, looks, honest = [str(i) for i in range(200)], [], []
    for seed in range(30):
        noise = normal(torch.Generator().manual_seed(seed), 32, 200)
        (remark,) = largest(names, noise, seed, 0.95)
        name, effect, low, high = re.findall(
            r"prompts: (\d+)\. .* is (\S+) \[(\S+), (\S+)\]", remark
        )[0]
        picking, estimating = split(32, seed, "largest")
        assert not set(picking) & set(estimating)
        assert int(name) == int(noise[picking].mean(0).abs().argmax())
        of_name = noise[estimating, int(name)]
        assert float(effect) == pytest.approx(float(of_name.mean()), abs=0.01)
        honest.append(float(low) <= 0 <= float(high))
        low, high = interval(noise[picking, int(name)], seed)
        looks.append(bool(low <= 0 <= high))
    assert sum(honest) >= 27
    assert sum(looks) <= 10
    assert largest(names[:1], noise[:, :1], 0, 0.95) == ()
    assert largest(names, noise[:11], 0, 0.95) == ()
    assert split(1, 0, "largest") == ([0], [0])
