import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slashpatch.errors import BandError
from slashpatch.maths.bands import band_mask, band_pairs, canonical_band, exchanged
from slashpatch.maths.rotary import Rotary

THETA = 100.0 ** -(torch.arange(8, dtype=torch.float64) / 8)  # 1 down to about 0.018


def rotary(pairing="half", n_pairs=4, gain=1.0, seed=0):
    inv_freq = torch.rand(n_pairs, generator=torch.Generator().manual_seed(seed)).double()
    return Rotary(inv_freq, pairing, gain, 0.5)


rotaries = st.builds(
    rotary,
    st.sampled_from(["half", "adjacent"]),
    st.integers(1, 5),
    st.sampled_from([1.0, 1.3]),
    st.integers(0, 99),
)


def vectors(r, seed, rows=3, unrotated=2):
    size = 2 * r.n_pairs + unrotated
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).double()


@given(rotaries, st.integers(0, 99))
def test_split_and_join_are_inverse(r, seed):
    x = vectors(r, seed)
    assert torch.equal(r.join(*r.split(x)), x)


@given(rotaries, st.integers(0, 99), st.floats(-9, 9), st.floats(-9, 9))
def test_rotations_compose_and_invert(r, seed, a, b):
    x = vectors(r, seed)
    first, second = (torch.full((r.n_pairs,), angle, dtype=torch.float64) for angle in (a, b))
    both = r.rotate_by(x, first + second)
    torch.testing.assert_close(r.rotate_by(r.rotate_by(x, first), second), both)
    torch.testing.assert_close(r.rotate_by(r.rotate_by(x, first), -first), x)


@given(rotaries, st.integers(0, 99), st.integers(0, 500), st.integers(0, 500))
def test_a_dot_product_depends_on_the_distance_alone(r, seed, i, j):
    q, k = vectors(r, seed), vectors(r, seed + 1)

    def logit(at, to):
        rotated = (r.rotate(x, torch.full((3,), p)) for x, p in ((q, at), (k, to)))
        return torch.stack(list(rotated)).prod(0).sum(-1)

    torch.testing.assert_close(logit(i, j), logit(i + 37, j + 37))


@pytest.mark.parametrize("pairing", ["half", "adjacent"])
def test_rotate_equals_the_rope_of_transformers(pairing):
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as adjacent
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as half

    r = rotary(pairing)
    x = torch.randn(1, 2, 6, 8, dtype=torch.float32)  # [batch, head, pos, d_head]
    angle = torch.arange(6)[:, None] * r.inv_freq.float()
    angle = angle.repeat(1, 2) if pairing == "half" else angle.repeat_interleave(2, dim=1)
    apply = half if pairing == "half" else adjacent
    expected, _ = apply(x, x, angle.cos()[None], angle.sin()[None])
    torch.testing.assert_close(r.rotate(x, torch.arange(6)), expected, atol=1e-5, rtol=1e-5)


def test_thirds_are_by_frequency_whatever_the_order():
    assert band_pairs("high", THETA) == (0, 1, 2)
    assert band_pairs("medium", THETA) == (3, 4, 5)
    assert band_pairs("low", THETA) == (6, 7)
    assert band_pairs("high", THETA.flip(0)) == (7, 6, 5)
    assert band_pairs("high+medium+low", THETA) == tuple(range(8))


@given(st.integers(1, 64))
def test_thirds_partition_the_pairs(n):
    theta = torch.rand(n).double()
    found = []
    for band in ("high", "medium", "low"):
        if n >= 3:
            found += band_pairs(band, theta)
    if n >= 3:
        assert sorted(found) == list(range(n))
        assert theta[found].tolist() == sorted(theta.tolist(), reverse=True)


def test_pairs_and_wavelengths():
    assert band_pairs("pairs 2-4", THETA) == (2, 3, 4)
    assert band_pairs(slice(2, 5), THETA) == (2, 3, 4)
    assert band_pairs("pair 7", THETA) == (7,)
    waves = 2 * math.pi / THETA
    assert band_pairs("wavelength 10-60", THETA) == tuple(
        i for i in range(8) if 10 <= waves[i] < 60
    )
    assert band_pairs("wavelength 100-inf", THETA) == (5, 6, 7)
    assert band_pairs("share 0-0.25", THETA) == (0, 1)
    assert band_pairs("share 0-0.25", THETA.flip(0)) == (7, 6)
    assert band_pairs("share 0.5-1", THETA) == (4, 5, 6, 7)
    assert band_pairs("share 0-0.3", THETA) == (0, 1)
    assert band_pairs("share 0-0.32", THETA) == (0, 1, 2)
    assert band_pairs(["high", slice(7, 8)], THETA) == (0, 1, 2, 7)
    assert band_mask("low", THETA).tolist() == [False] * 6 + [True] * 2


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("high", "high"),
        (" high +  low ", "high+low"),
        ("high+high", "high"),
        (slice(0, 8), "pairs 0-7"),
        (slice(None, 8), "pairs 0-7"),
        ("pairs 3", "pairs 3-3"),
        (["low", "wavelength 8 - 64.5"], "low+wavelength 8-64.5"),
        (" shares 0 - 0.5+high", "share 0-0.5+high"),
        (("low", "high+medium"), "low+high+medium"),
    ],
)
def test_bands_have_one_canonical_text(given, text):
    assert canonical_band(given) == text
    assert canonical_band(text) == text


@pytest.mark.parametrize(
    "bad",
    ["", "hi", "pairs", "pairs 5-2", "pairs -1", "wavelength 9-3",
     "share 0-1.5", "share 0.5", "share 0.5-0.5", 7, None, [], ["high", 3],
     slice(3, 3), slice(0, None), slice(0, 8, 2), slice(-3, 2)],
)  # fmt: skip
def test_bad_bands(bad):
    with pytest.raises(BandError):
        band_pairs(bad, THETA)


def test_bands_that_the_head_lacks():
    with pytest.raises(BandError, match="is outside the 8 rotary pairs, 0 to 7"):
        band_pairs("pairs 5-8", THETA)
    with pytest.raises(BandError, match="holds none of the 8 rotary pairs"):
        band_pairs("wavelength 1-2", THETA)


def test_bands_exchange_by_rank():
    assert exchanged(8, (0, 1), (6, 7)).tolist() == [6, 7, 2, 3, 4, 5, 0, 1]
    assert exchanged(8, (0, 1, 2), (7,)).tolist() == [7, 7, 7, 3, 4, 5, 6, 0]
    assert exchanged(6, (0, 1, 2), (3, 4)).tolist() == [3, 3, 4, 0, 2, 5]
    assert exchanged(4, (1, 2), (1, 2)).tolist() == [0, 1, 2, 3]
