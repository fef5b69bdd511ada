"""Diagonals by strided views and matrix products, against loops over single entries."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slashpatch.maths.diagonals import (
    DiagonalChange,
    band_of_products,
    diagonal_sums,
    has_keys,
    lagged_products,
    shifted,
    total_at,
)

some_offsets = st.lists(st.integers(0, 12), min_size=1, max_size=4, unique=True)


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("change", "expected_entry"),
    [
        (("pattern", 0.5, 1.0), lambda x, on: 0.5 * x if on else x),
        (("pattern", 1.0, 0.0), lambda x, on: x if on else 0 * x),
        (("scores", 2.0, 0.0), lambda x, on: x + 2 if on else x),
        (("scores", 0.0, -math.inf), lambda x, on: x if on else x - math.inf),
        (("scores", -math.inf, 0.0), lambda x, on: x - math.inf if on else x),
    ],
)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(0, 5), some_offsets)
def test_changes_equal_a_loop_over_entries(change, expected_entry, seed, n_queries, past, offsets):
    stage, amount, elsewhere = change
    made = DiagonalChange(stage, tuple(offsets), amount, elsewhere)
    matrix = drawn(seed, 2, n_queries, n_queries + past)
    expected = matrix.clone()
    for row in range(n_queries):
        for column in range(n_queries + past):
            on = past + row - column in offsets
            expected[..., row, column] = expected_entry(matrix[..., row, column], on)
    assert torch.equal(made.on_matrix(matrix, past), expected)
    lags = past + torch.arange(n_queries)[:, None] - torch.arange(n_queries + past)
    number = total_at([made], stage, lags)
    by_number = matrix + number if stage == "scores" else matrix * number
    assert torch.equal(by_number.float(), expected)


def test_changes_of_one_stage_add_up():
    changes = [
        DiagonalChange("scores", (1, 2), 1.5, 0.0),
        DiagonalChange("pattern", (1,), 0.5, 1.0),
        DiagonalChange("scores", (2,), 0.0, -math.inf),
    ]
    lags = torch.arange(4)
    assert total_at(changes, "scores", lags).tolist() == [-math.inf, -math.inf, 1.5, -math.inf]
    assert total_at(changes, "pattern", lags).tolist() == [1, 0.5, 1, 1]


@given(
    st.integers(0, 99), st.integers(1, 40), st.integers(0, 9), st.integers(0, 30), st.integers(1, 9)
)
def test_bands_of_products(seed, n_queries, past, first, width):
    q, k = drawn(seed, 2, 3, n_queries, 4), drawn(seed + 1, 2, 3, n_queries + past, 4)
    products = q @ k.mT
    for block in (1, 4, 32):
        band = band_of_products(q, k, first, width, block)
        expected = torch.zeros_like(band)
        for row in range(n_queries):
            for column in range(width):
                key = past + row - first - column
                if key >= 0:
                    expected[:, :, row, column] = products[:, :, row, key]
        torch.testing.assert_close(band, expected, atol=1e-5, rtol=1e-5)


@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 50), st.sampled_from([1, 4, 64]))
def test_sums_of_products_at_a_lag(seed, n_tokens, n_offsets, block):
    q, k = drawn(seed, 2, 3, n_tokens, 4), drawn(seed + 1, 2, 3, n_tokens, 4)
    products = q @ k.mT
    expected = torch.stack(
        [products.diagonal(-offset, -2, -1).sum(-1) for offset in range(n_offsets)], dim=-1
    )
    for chunk in (block * 3, 4096):
        found = lagged_products(q, k, n_offsets, block, chunk)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@given(st.integers(0, 99), st.integers(1, 20), st.integers(0, 9))
def test_sums_along_every_diagonal(seed, n_queries, past):
    rows = drawn(seed, 2, 3, n_queries, past + n_queries)
    rows[..., -1:, :].nan_to_num_()
    future = torch.ones(rows.shape[-2:], dtype=torch.bool).triu(past + 1)
    rows = rows.masked_fill(future, torch.nan)  # must not be read
    expected = [rows.diagonal(past - d, -2, -1).sum(-1) for d in range(past + n_queries)]
    found = diagonal_sums(rows, past)
    torch.testing.assert_close(found, torch.stack(expected, dim=-1), atol=1e-5, rtol=1e-5)


@given(st.integers(1, 6), st.integers(0, 4), st.integers(0, 12))
def test_values_some_tokens_back(n_queries, past, offset):
    v = drawn(0, 1, 2, past + n_queries, 3)
    found = shifted(v, offset, n_queries)
    for row in range(n_queries):
        key = past + row - offset
        expected = v[:, :, key] if key >= 0 else torch.zeros(1, 2, 3)
        assert torch.equal(found[:, :, row], expected)


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -torch.inf])
def test_rows_without_keys_are_found(low):
    scores = torch.zeros(3, 4).tril(1)  # past = 1
    masked = scores.masked_fill(torch.ones(3, 4, dtype=torch.bool).triu(2), low)
    assert has_keys(masked, 1).tolist() == [True, True, True]
    masked[1, :3] = low
    assert has_keys(masked, 1).tolist() == [True, False, True]
    # A finite score in the future is no key.
    masked[1, 3] = 5.0
    assert has_keys(masked, 1).tolist() == [True, False, True]
