import torch
from hypothesis import given
from hypothesis import strategies as st

from slashpatch.maths.spectrum import concentration, logit_terms, predicted_profile

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


def test_concentration_is_one_for_constant_pairs_and_small_for_scattered_ones():
    r = rotary(n_pairs=4)
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)).double()
    x[:, [0, 4]] = 3.0  # pair 0 is the same for all tokens
    real, imag, _ = r.split(x)
    found = concentration(x.mean(0), torch.hypot(real, imag).mean(0), r)
    torch.testing.assert_close(found[0], torch.tensor(1.0).double())
    assert (found[1:] < 0.1).all()
