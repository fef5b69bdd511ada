"""Ratios of means: their interval follows the scales, and is missing where it must be."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slashpatch.effects.ratios import ratio_of_means
from slashpatch.maths.resampling import LEAST, mean_inference, ratio_interval

some = st.integers(-500, 500).map(lambda n: n / 100)
numbers = st.lists(st.tuples(some, st.floats(1, 5)), min_size=LEAST, max_size=12)


@settings(max_examples=30, deadline=None)
@given(values=numbers)
def test_the_ratio_is_of_means(values):
    part, whole = torch.tensor(values, dtype=torch.float64).T
    ratio, low, high = ratio_of_means(part, whole)
    if math.isnan(ratio):
        ends = mean_inference(whole)
        assert ends.low <= 0 <= ends.high
        return
    assert ratio == pytest.approx(float(part.sum() / whole.sum()))
    assert (low, high) == tuple(float(end) for end in ratio_interval(part, whole))
    assert low - 1e-9 <= ratio <= high + 1e-9
    assume(high - low > 1e-6)
    same = ratio_of_means(3 * part, 2 * whole)
    assert same == pytest.approx((1.5 * ratio, 1.5 * low, 1.5 * high), abs=1e-6)


def test_without_an_interval_or_a_ratio():
    one = torch.arange(3.0) + 1
    assert ratio_of_means(one, 2 * one)[0] == 0.5
    assert all(math.isnan(end) for end in ratio_of_means(one, 2 * one)[1:])
    assert all(map(math.isnan, ratio_of_means(torch.ones(8), torch.zeros(8))))
    unclear = torch.tensor([1.0, -1, 2, -2, 1, -1, 3, -3])
    assert all(map(math.isnan, ratio_of_means(torch.ones(8), unclear)))
    some = torch.arange(8.0) + 5
    assert ratio_of_means(some, some) == pytest.approx((1.0, 1.0, 1.0))
