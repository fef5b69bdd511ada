import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slashpatch.errors import OffsetError
from slashpatch.maths.offsets import as_offsets
from slashpatch.maths.slash_scores import real_rows, slash_rows, slash_scores, slash_sums

sizes = st.integers(1, 20)
seeds = st.integers(0, 2**31)
some_offsets = st.lists(st.integers(0, 24), min_size=1, max_size=5, unique=True)


def causal_pattern(seed, batch, heads, pos):
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(batch, heads, pos, pos, generator=generator, dtype=torch.float64)
    future = torch.ones(pos, pos, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1)


def by_hand(pattern, offset):
    """The definition, entry by entry."""
    n = pattern.shape[-1]
    entries = [pattern[..., i, i - offset] for i in range(offset, n)]
    return sum(entries) / (n - offset) if entries else torch.full(pattern.shape[:2], torch.nan)


@given(seeds, sizes, some_offsets)
def test_reference_is_the_definition(seed, pos, offsets):
    pattern = causal_pattern(seed, 2, 3, pos)
    expected = torch.stack([by_hand(pattern, offset).double() for offset in offsets], -1)
    torch.testing.assert_close(slash_scores(pattern, offsets), expected, equal_nan=True)


@given(seeds, sizes, some_offsets)
def test_rows_sum_to_the_reference(seed, pos, offsets):
    pattern = causal_pattern(seed, 2, 3, pos)
    rows = slash_rows(pattern, torch.tensor(offsets))
    n_rows = real_rows(torch.ones(2, pos, dtype=torch.bool), pos, torch.tensor(offsets)).sum(1)
    scores = rows.sum(-2) / n_rows[:, None]
    torch.testing.assert_close(scores, slash_scores(pattern, offsets), equal_nan=True)


@given(seeds, st.integers(2, 20), some_offsets, st.data())
def test_rows_of_a_cached_step_are_the_last_rows(seed, pos, offsets, data):
    pattern = causal_pattern(seed, 1, 2, pos)
    last = data.draw(st.integers(1, pos))
    whole = slash_rows(pattern, torch.tensor(offsets))
    step = slash_rows(pattern[:, :, -last:], torch.tensor(offsets))
    assert torch.equal(step, whole[:, :, -last:])


@given(seeds, sizes, st.data())
def test_sums_equal_the_reference_by_gathering_and_by_whole_rows(seed, pos, data):
    pattern = causal_pattern(seed, 2, 3, pos)
    real = torch.ones(2, pos, dtype=torch.bool)
    first = data.draw(st.integers(0, pos - 1))
    real[0, :first] = False  # padding on the left, which may hold anything
    pattern[0, :, :first] = torch.nan
    pattern[0, :, :, :first] = torch.nan
    n_rows = [[max(0, n - offset) for offset in range(pos)] for n in (pos - first, pos)]
    single = [slash_scores(pattern[:1, :, first:, first:], range(pos)),
              slash_scores(pattern[1:], range(pos))]  # fmt: skip
    rows = torch.tensor(n_rows)[:, None]
    expected = (torch.cat(single) * rows).masked_fill(rows == 0, 0)
    for most in (0, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("slashpatch.maths.slash_scores._MOST_GATHERED_OFFSETS", most)
            patch.setattr("slashpatch.maths.slash_scores._ROWS", 3)
            torch.testing.assert_close(slash_sums(pattern, range(pos), real), expected)


def test_padding_on_either_side_leaves_the_same_rows():
    real = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    rows = real_rows(real, 5, torch.tensor([0, 1, 2, 3])).sum(1)
    assert rows.tolist() == [[3, 2, 1, 0]] * 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (3, (3,)),
        (range(3), (0, 1, 2)),
        ("0-2", (0, 1, 2)),
        ("1, 4-5", (1, 4, 5)),
        ([2, 0, 2], (0, 2)),
        (torch.tensor([1, 2]), (1, 2)),
    ],
)
def test_offsets_are_read(given, expected):
    assert as_offsets(given) == expected


@pytest.mark.parametrize("bad", [-1, 1.5, True, "a", "3-1", "-2", None, [0, -3], ["x"]])
def test_bad_offsets_are_refused(bad):
    with pytest.raises(OffsetError, match="offset"):
        as_offsets(bad)


def test_no_offsets_and_too_many():
    with pytest.raises(OffsetError, match="no offsets were given"):
        as_offsets([])
    with pytest.raises(OffsetError, match="at most"):
        as_offsets(range(10**12))
    with pytest.raises(OffsetError, match="at most"):
        as_offsets("0-999999999")
