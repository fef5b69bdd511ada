"""The axis of a cone, and the other strong directions."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from slashpatch.maths import cone


@given(st.integers(2, 12), st.integers(1, 30), st.integers(0, 8), st.integers(0, 99))
def test_directions_are_orthonormal_and_their_shares_are_of_the_second_moment(width, n, more, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64) + 1
    directions, shares = cone.axis_and_principal(x.T @ x / n, x.mean(0), more)
    count = 1 + min(more, width - 1)
    torch.testing.assert_close(directions @ directions.T, torch.eye(count, dtype=torch.float64))
    expected = (x @ directions.T).square().sum(0) / x.square().sum()
    torch.testing.assert_close(shares, expected, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(directions[0], x.mean(0) / x.mean(0).norm())


def test_wide_inputs_give_the_same_directions(monkeypatch):
    x = torch.randn(50, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = cone.axis_and_principal(x.T @ x, x.mean(0), 5)
    monkeypatch.setattr(cone, "_WIDE", 10)
    few = cone.axis_and_principal(x.T @ x, x.mean(0), 5)
    torch.testing.assert_close((whole[0] @ few[0].T).abs(), torch.eye(6, dtype=torch.float64),
                               atol=1e-6, rtol=0)  # fmt: skip
    torch.testing.assert_close(whole[1], few[1], atol=1e-8, rtol=1e-6)


@given(st.integers(1, 9), st.integers(2, 12), st.integers(0, 99))
def test_without_a_component_nothing_is_left_along_it(n, width, seed):
    generator = torch.Generator().manual_seed(seed)
    x, u = torch.randn(n, width, generator=generator), torch.randn(width, generator=generator)
    u = u / u.norm()
    assert float((cone.without_component(x, u, u) @ u).abs().max()) < 1e-5
