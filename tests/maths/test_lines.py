import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slashpatch.maths.lines import (
    all_slash_sums,
    contrasts_and_ranks,
    is_peak,
    line_scores,
    n_judged,
    sum_of_ranks_p,
)

from .test_slash_scores import causal_pattern


def by_hand(pattern):
    """Line scores of [pos, pos] from their definition: the mean without the first key."""
    n = len(pattern)
    return [
        sum(float(pattern[i, i - offset]) for i in range(offset + 1, n)) / (n - 1 - offset)
        for offset in range(n - 1)
    ]


def contrasts_by_hand(scores, window=16, gap=2):
    """(before, after, rank) of each offset that has a whole window after it."""
    rows = []
    for offset in range(len(scores) - gap - window):
        near = min(gap, max(offset - 1, 0))
        earlier = scores[max(0, offset - near - window) : max(0, offset - near)]
        later = scores[offset + gap + 1 : offset + gap + 1 + window]
        around = earlier + later
        before, after = (
            scores[offset] - sorted(side)[(len(side) - 1) // 2] if side else 0.0
            for side in (earlier, later)
        )
        rank = (1 + sum(x >= scores[offset] for x in around)) / (1 + len(around))
        rows.append((before, after, rank if earlier else 1.0))
    return rows


@given(
    st.integers(0, 99), st.integers(2, 40), st.integers(0, 6), st.integers(1, 9), st.integers(0, 3)
)
def test_scores_contrasts_and_ranks_by_definition(seed, pos, padding, window, gap):
    pattern = causal_pattern(seed, 2, 3, pos)
    padded = torch.full((2, 3, pos + padding, pos + padding), float("nan"))
    padded[:, :, :pos, :pos] = pattern
    real = (torch.arange(pos + padding) < pos).expand(2, -1)
    scores = line_scores(*all_slash_sums(padded, real), pos)
    found = contrasts_and_ranks(scores, window, gap)
    for batch in range(2):
        for head in range(3):
            mine = scores[batch, head].tolist()
            assert mine == pytest.approx(by_hand(pattern[batch, head]), abs=1e-6)
            expected = contrasts_by_hand(mine, window, gap)
            assert found[0].shape[-1] == len(expected) == n_judged(pos, window, gap)
            for place, part in enumerate(found):
                values = [row[place] for row in expected]
                assert part[batch, head].tolist() == pytest.approx(values, abs=1e-12)


@pytest.mark.parametrize("n", [4, 8, 30])
def test_sums_of_ranks_are_as_likely_as_drawn(n):
    generator = torch.Generator().manual_seed(n)
    drawn = torch.rand(200_000, n, generator=generator, dtype=torch.float64).sum(-1)
    at = torch.linspace(0.1 * n, 0.6 * n, 12, dtype=torch.float64)
    p = sum_of_ranks_p(at, torch.tensor(float(n), dtype=torch.float64))
    shares = torch.stack([(drawn <= total).double().mean() for total in at])
    torch.testing.assert_close(p, shares, atol=0.01, rtol=0)
    below_one = torch.tensor([0.5], dtype=torch.float64)
    p = sum_of_ranks_p(below_one, torch.tensor([float(n)], dtype=torch.float64))
    assert float(p) == pytest.approx(0.5**n / math.factorial(n), rel=1e-9)


@given(st.integers(0, 99), st.integers(300, 600))
def test_blocks_of_rows_make_no_difference(seed, pos):
    pattern = causal_pattern(seed, 1, 2, pos)
    sums, first = all_slash_sums(pattern, torch.ones(1, pos, dtype=torch.bool))
    for offset in (0, 1, pos // 2, pos - 1):
        diagonal = pattern.double().diagonal(-offset, -2, -1)
        torch.testing.assert_close(sums[..., offset], diagonal.sum(-1), atol=1e-9, rtol=0)
        assert torch.equal(first[..., offset], pattern[..., offset, 0].double())


@pytest.mark.parametrize("n", [200, 4000])
def test_uniform_rows_a_sink_and_a_decay_have_no_contrast_on_both_sides(n):
    distance = torch.arange(n)
    rows = torch.arange(1, n + 1)
    uniform = torch.tensor([(1 / rows[d:]).mean() for d in range(n)], dtype=torch.float64)
    decay = torch.exp(-distance / 20).double()
    sink = 0.7 / (n - distance).double()  # attention to token 3, say, at each offset once
    for scores in (uniform, decay, uniform + decay, uniform + sink):
        before, after, rank = contrasts_and_ranks(scores)
        assert float(torch.minimum(before, after).max()) < 1e-3 / n
        assert float(rank[20:].min()) > 0.3


def test_peaks_and_their_flanks():
    scores = torch.tensor([0.1, 0.5, 0.4, 0.1, 0.2, 0.1, 0.3, 0.3, 0.0])
    assert is_peak(scores, 2).nonzero().flatten().tolist() == [1, 6]
    assert is_peak(scores, 1).nonzero().flatten().tolist() == [1, 4, 6]
