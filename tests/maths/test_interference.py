import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slashpatch.errors import BandError, OffsetError
from slashpatch.maths.interference import margins_by_cutoff, needed_amplitude, profile_score
from slashpatch.maths.slash_scores import slash_scores
from slashpatch.maths.spectrum import margin

POWERS = 10_000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)


def drawn(seed, n_pairs, highest=math.pi):
    """Frequencies in no order, amplitudes and phases."""
    generator = torch.Generator().manual_seed(seed)
    theta, amplitude, phase = torch.rand(3, n_pairs, generator=generator, dtype=torch.float64)
    return theta * highest, amplitude, (2 * phase - 1) * math.pi


def profile_of(theta, amplitude, phase, n_offsets):
    """The sum of cosines, one by one."""
    return torch.stack(
        [sum(a * (t * d + p).cos() for t, a, p in zip(theta, amplitude, phase, strict=True))
         for d in range(n_offsets)]
    )  # fmt: skip


def slow_margins(theta, at, n_offsets, amplitude, phase):
    """A profile for each range, and its margin by the definition."""
    order = sorted(range(len(theta)), key=lambda pair: -float(theta[pair]))
    found = torch.full((len(theta), len(theta)), math.nan, dtype=torch.float64)
    for first in range(len(theta)):
        for last in range(first, len(theta)):
            some = order[first : last + 1]
            profile = profile_of(theta[some], amplitude[some], phase[some], n_offsets)
            found[first, last] = margin(profile, at) / float(amplitude[some].sum())
    return found


@given(st.integers(0, 99), st.integers(1, 4), st.integers(2, 8), st.integers(0, 7))
def test_margins_are_those_of_the_definition(seed, n_pairs, n_offsets, at):
    at = min(at, n_offsets - 1)
    theta, amplitude, phase = drawn(seed, n_pairs)
    found = margins_by_cutoff(theta, at, n_offsets, amplitude, phase)
    expected = slow_margins(theta, at, n_offsets, amplitude, phase)
    torch.testing.assert_close(found, expected, equal_nan=True, atol=1e-9, rtol=1e-9)
    found = margins_by_cutoff(theta, at, n_offsets)
    expected = slow_margins(theta, at, n_offsets, torch.ones(n_pairs), -theta * at)
    torch.testing.assert_close(found, expected, equal_nan=True, atol=1e-9, rtol=1e-9)


def test_a_frequency_alone_fails_where_its_period_fits():
    theta = torch.tensor([2 * math.pi / 8], dtype=torch.float64)
    assert float(margins_by_cutoff(theta, 1, 9)) == pytest.approx(1 - math.cos(2 * math.pi / 8))
    assert float(margins_by_cutoff(theta, 1, 10)) == pytest.approx(0, abs=1e-12)
    assert needed_amplitude(theta, 1, 10) < math.inf  # the average over shorter rows
    assert needed_amplitude(theta, 1, 1000) == math.inf


def test_low_frequencies_have_a_margin_of_half_their_mean_square():
    low = POWERS[4:]
    found = float(margins_by_cutoff(low, 1, 64)[0, -1])
    assert found == pytest.approx(float((low**2).mean() / 2), rel=1e-3)


@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 8), st.floats(0.01, math.pi))
def test_no_amplitudes_and_phases_pass_the_bound(seed, n_pairs, at, highest):
    theta, amplitude, phase = drawn(seed, n_pairs, highest)
    for given_ in ((amplitude, phase), (amplitude, None), (None, None)):
        found = margins_by_cutoff(theta, at, at + 5, *given_)[0, -1]
        assert found <= 1 - math.cos(float(theta.max())) + 1e-9


def test_at_offset_0_one_neighbour_is_missing_and_the_bound_does_not_hold():
    """A slope is enough there: the margin is of the order of θ, not of θ²."""
    theta, phase = torch.tensor([0.01]), torch.tensor([math.pi / 2])
    found = float(margins_by_cutoff(theta, 0, 20, torch.ones(1), phase))
    assert found == pytest.approx(math.sin(0.01), rel=1e-6)
    assert found > 100 * (1 - math.cos(0.01))


def test_pairs_that_add_nothing():
    theta, phase = torch.tensor([1.0, 0.5, 0.1]), torch.zeros(3)
    found = margins_by_cutoff(theta, 0, 6, torch.tensor([1.0, 0.0, 0.0]), phase)
    assert found[0, 0] == found[0, 2]
    assert bool(found[1, 1].isnan())


@given(st.integers(0, 99), st.integers(1, 12), st.integers(0, 11))
def test_the_score_of_a_profile_is_that_of_its_pattern(seed, n, at):
    at = min(at, n - 1)
    profile = 3 * torch.randn(n, generator=torch.Generator().manual_seed(seed)).double()
    lags = torch.arange(n)[:, None] - torch.arange(n)
    scores = profile[lags.clamp(min=0)].masked_fill(lags < 0, -torch.inf)
    expected = float(slash_scores(scores.softmax(-1)[None, None], [at]))
    assert profile_score(profile, at) == pytest.approx(expected)


@pytest.mark.parametrize(("first", "at"), [(0, 1), (1, 3), (4, 1)])
def test_the_needed_amplitude_gives_the_score_and_less_does_not(first, at):
    theta = POWERS[first:]
    needed = needed_amplitude(theta, at, 64, 0.5)
    unit = profile_of(theta, torch.ones(len(theta)), -theta * at, 64) / len(theta)
    assert profile_score(needed * unit, at) == pytest.approx(0.5)
    assert profile_score(0.99 * needed * unit, at) < 0.5


def test_amplitudes_up_to_the_most_are_tried(monkeypatch):
    needed = needed_amplitude(POWERS, 1, 64)
    for factor, expected in ((1.01, needed), (0.99, math.inf)):
        monkeypatch.setattr("slashpatch.maths.interference.MOST", factor * needed)
        assert needed_amplitude(POWERS, 1, 64) == pytest.approx(expected)


def test_low_frequencies_need_the_amplitude_of_the_bound():
    for theta in (POWERS[3:], POWERS[5:6]):
        assert needed_amplitude(theta, 1, 64) > math.log(2) / (1 - math.cos(float(theta[0])))


def test_what_is_refused():
    for at, n in ((0, 1), (5, 5), (-1, 5)):
        with pytest.raises(OffsetError, match="at least two offsets"):
            margins_by_cutoff(POWERS, at, n)
        with pytest.raises(OffsetError):
            profile_score(torch.zeros(n), 5)
    with pytest.raises(BandError, match="at least 0"):
        margins_by_cutoff(POWERS, 1, 9, -torch.ones(8))
    with pytest.raises(OffsetError):
        needed_amplitude(POWERS, 64, 64)
    for theta, score in ((POWERS[:0], 0.5), (POWERS, math.nan), (POWERS, 1.5)):
        with pytest.raises(BandError, match="at least one frequency and a slash score"):
            needed_amplitude(theta, 1, 64, score)
