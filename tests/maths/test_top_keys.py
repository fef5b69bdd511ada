import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slashpatch.maths.top_keys import top_keys


def by_hand(row, query, top):
    """The largest positive entries of one row up to the query: [(key, weight)], padded."""
    listed = [(key, weight) for key, weight in enumerate(row[: query + 1]) if weight > 0]
    listed = sorted(listed, key=lambda entry: (-entry[1], entry[0]))[:top]
    return listed + [(-1, 0.0)] * (top - len(listed))


def patterns(seed, n_queries, past, levels):
    """Rows with many equal entries, zeros, and weights in the future, which are not to be read."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, n_queries, past + n_queries)
    return torch.randint(0, levels, shape, generator=generator) / 8


@given(
    st.integers(0, 999), st.integers(1, 12), st.integers(0, 5), st.integers(1, 6), st.integers(1, 9)
)
def test_the_largest_entries_of_each_row(seed, n_queries, past, levels, top):
    pattern = patterns(seed, n_queries, past, levels)
    found = top_keys(pattern, [0, 2], top, [0, 3])
    assert found.keys.shape == (2, 2, n_queries, top)
    for batch in range(2):
        for place, head in enumerate((0, 2)):
            for row in range(n_queries):
                at = (batch, place, row)
                weights = pattern[batch, head, row].tolist()
                listed = list(zip(found.keys[at].tolist(), found.weights[at].tolist(), strict=True))
                assert listed == by_hand(weights, past + row, top)
                expected = [weights[past + row - d] if past + row >= d else 0 for d in (0, 3)]
                assert found.diagonals[at].tolist() == expected


@given(st.integers(0, 99), st.integers(1, 5))
def test_blocks_of_rows_are_the_whole(seed, top):
    """More rows than a block has."""
    pattern = torch.rand(1, 1, 600, 600, generator=torch.Generator().manual_seed(seed))
    found = top_keys(pattern, [0], top, [0, 1, 599])
    expected = pattern.tril().topk(top)
    for row in (0, 3, 255, 256, 257, 599):
        n = min(top, row + 1)
        assert torch.equal(found.keys[0, 0, row, :n], expected.indices[0, 0, row, :n])
        assert torch.equal(found.weights[0, 0, row], expected.values[0, 0, row])
    assert torch.equal(found.diagonals[0, 0, :, 1][1:], pattern[0, 0].diagonal(-1))
    assert found.diagonals[0, 0, :-1, 2].tolist() == [0.0] * 599


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    pattern = patterns(0, 9, 0, 6).to(dtype)
    found, expected = (top_keys(x, [1], 3, [1]) for x in (pattern, pattern.float()))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_weight_that_float32_cannot_hold_is_none():
    pattern = torch.tensor([[[[1.0, 0.0], [1.0, 1e-60]]]], dtype=torch.float64)
    assert top_keys(pattern, [0], 2, [0]).keys[0, 0, 1].tolist() == [0, -1]


def test_nan_is_not_hidden():
    pattern = torch.rand(1, 1, 5, 5)
    pattern[0, 0, 3, 1] = torch.nan
    assert top_keys(pattern, [0], 2, [0]).weights.isnan().any()
