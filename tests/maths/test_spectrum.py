import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from slashpatch.maths.spectrum import (
    amplitude_and_phase,
    concentration,
    logit_terms,
    predicted_profile,
)

from .test_rotary import rotaries, rotary, vectors


@given(rotaries, st.integers(0, 99), st.integers(0, 300), st.integers(0, 300))
def test_terms_sum_to_the_logit(r, seed, i, j):
    q, k = vectors(r, seed), vectors(r, seed + 1)
    rotated_q, rotated_k = (r.rotate(x, torch.full((3,), p)) for x, p in ((q, i), (k, j)))
    terms, rest = logit_terms(q, k, torch.full((3,), i - j), r)
    logit = r.scale * (rotated_q * rotated_k).sum(-1)
    torch.testing.assert_close(terms.sum(-1) + rest, logit, atol=1e-9, rtol=1e-9)


@given(rotaries, st.integers(0, 99))
def test_the_profile_of_constant_tokens_is_their_logit(r, seed):
    q, k = vectors(r, seed)[0], vectors(r, seed + 1)[0]
    profile = predicted_profile(q, k, torch.arange(10), r)
    for offset in range(10):
        terms, rest = logit_terms(q[None], k[None], torch.tensor([offset]), r)
        torch.testing.assert_close(profile[offset], (terms.sum(-1) + rest)[0])


@given(rotaries, st.integers(0, 99), st.integers(0, 3))
def test_amplitudes_and_phases_make_the_profile(r, seed, unrotated):
    q, k = (vectors(r, seed + more, unrotated=unrotated) for more in (0, 1))
    amplitude, phase = amplitude_and_phase(q, k, r)
    assert (amplitude >= 0).all()
    assert (phase.abs() <= math.pi).all()
    offsets = torch.arange(50)
    angle = r.inv_freq * offsets[:, None, None] + phase
    rest = r.scale * (q[:, 2 * r.n_pairs :] * k[:, 2 * r.n_pairs :]).sum(-1)
    found = (amplitude * angle.cos()).sum(-1) + rest
    for row in range(len(q)):
        expected = predicted_profile(q[row], k[row], offsets, r)
        torch.testing.assert_close(found[:, row], expected, atol=1e-9, rtol=1e-9)


def test_a_phase_moves_the_peak_of_its_cosine():
    """A query turned back by θ·3 finds the same key three tokens before it."""
    r = rotary(n_pairs=1)
    k = vectors(r, 0, rows=1, unrotated=0)
    q = r.rotate_by(k, -3 * r.inv_freq)
    amplitude, phase = amplitude_and_phase(q, k, r)
    torch.testing.assert_close(phase[0], -3 * r.inv_freq)
    torch.testing.assert_close(amplitude[0], r.scale * (k**2).sum(-1))


def test_concentration_is_one_for_constant_pairs_and_small_for_scattered_ones():
    r = rotary(n_pairs=4)
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)).double()
    x[:, [0, 4]] = 3.0  # pair 0 is the same for all tokens
    real, imag, _ = r.split(x)
    found = concentration(x.mean(0), torch.hypot(real, imag).mean(0), r)
    torch.testing.assert_close(found[0], torch.tensor(1.0).double())
    assert (found[1:] < 0.1).all()
