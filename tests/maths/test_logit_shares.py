"""Shares of the logits' variance, against least squares on the whole design matrix."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slashpatch.maths import logit_shares as fast


def reference(prompts, curve, n_offsets, scale, softcap=None):
    """Shares of one head: every logit is a line of y, every effect a column of X."""
    y, whole, position, token = [], [], [], []
    n_keys = sum(len(q) for q, _ in prompts)
    before = 0
    for q, k in prompts:
        for i in range(n_offsets - 1, len(q)):
            row = [scale * float(q[i] @ k[i - offset]) for offset in range(n_offsets)]
            if softcap is not None:
                row = [softcap * math.tanh(value / softcap) for value in row]
            mean = sum(row) / n_offsets
            for offset in range(n_offsets):
                whole.append(row[offset])
                y.append(row[offset] - mean)
                at_offset, at_key = [-1 / n_offsets] * n_offsets, [0.0] * n_keys
                at_offset[offset] += 1
                for other in range(n_offsets):
                    at_key[before + i - other] -= 1 / n_offsets
                at_key[before + i - offset] += 1
                position.append(at_offset)
                token.append(at_key)
        before += len(q)
    y, whole, position, token = (
        torch.tensor(one, dtype=torch.float64) for one in (y, whole, position, token)
    )
    total = y.square().sum()

    def share(x):
        left = y - x @ (torch.linalg.pinv(x, rtol=1e-10) @ y)
        return float(1 - left.square().sum() / total)

    centred = (curve - curve.mean()).repeat(len(y) // n_offsets)
    return fast.LogitShares(
        share(position),
        share(token),
        share(torch.cat([position, token], dim=1)),
        float(1 - (y - centred).square().sum() / total),
        float(1 - y.square().mean() / whole.var(correction=0)),
        float(y.square().mean().sqrt()),
        n_offsets,
    )


@given(
    st.lists(st.integers(5, 14), min_size=1, max_size=3),
    st.integers(2, 5),
    st.sampled_from([None, 2.0]),
    st.sampled_from([1, 3, 256]),
    st.integers(0, 999),
)
def test_shares_are_those_of_least_squares(lengths, n_offsets, softcap, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        torch.randn(2, 3, length, 4, generator=generator, dtype=torch.float64)
        + torch.randn(2, 3, 1, 4, generator=generator, dtype=torch.float64)
        for length in lengths
    ]  # [q or k, head, pos, d_head]
    curves = torch.randn(3, n_offsets, generator=generator, dtype=torch.float64)
    before, fast._ROWS = fast._ROWS, rows
    try:
        sums = [fast.band_sums(q, k, n_offsets, 0.7, softcap) for q, k in prompts]
    finally:
        fast._ROWS = before
    found = fast.logit_shares(sums, curves)
    for head in range(3):
        own = [(q[head], k[head]) for q, k in prompts]
        expected = reference(own, curves[head], n_offsets, 0.7, softcap)
        assert found[head] == pytest.approx(expected, abs=1e-7)


def test_logits_by_offset_alone_and_by_key_alone():
    n, angle = 30, torch.arange(30).double() * 0.9
    turning = torch.stack([angle.cos(), angle.sin()], dim=-1)[None]
    curve = (torch.arange(6) * 0.9).cos()[None].double()
    (one,) = fast.logit_shares([fast.band_sums(turning, turning, 6, 1.0)], curve)
    assert one[:4] == pytest.approx((1, one.token, 1, 1), abs=1e-7)
    assert one.query == pytest.approx(0, abs=1e-7)
    keys = torch.randn(1, n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same = torch.ones(1, n, 2, dtype=torch.float64)
    (one,) = fast.logit_shares([fast.band_sums(same, keys, 6, 1.0)], curve * 0)
    assert (one.token, one.both, one.curve) == pytest.approx((1, 1, 0), abs=1e-7)
    assert one.position < 0.3
