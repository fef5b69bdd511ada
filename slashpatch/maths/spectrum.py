"""A logit decomposed by RoPE frequency, and the slash profile that mean q and mean k predict."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import OffsetError
from .rotary import Rotary


def logit_terms(
    q: Float[Tensor, "*rows d_head"],
    k: Float[Tensor, "*rows d_head"],
    offset: Tensor,
    rotary: Rotary,
) -> tuple[Float[Tensor, "*rows pair"], Float[Tensor, "*rows"]]:
    """Return the contribution of each rotary pair to a logit, and that of the unrotated dimensions.

    `q` and `k` are before RoPE, `offset` tokens apart (any real number; broadcasts over the rows).
    Term l is scale · gain² · Re(q_l k*_l e^{iθ_l offset}). The terms and the unrotated part add up
    to the logit. Source: RoFormer, arXiv 2104.09864.
    """
    (q_re, q_im, q_rest), (k_re, k_im, k_rest) = rotary.split(q), rotary.split(k)
    angle = offset[..., None].to(rotary.inv_freq) * rotary.inv_freq
    real, imag = q_re * k_re + q_im * k_im, q_im * k_re - q_re * k_im
    terms = rotary.scale * rotary.gain**2 * (real * angle.cos() - imag * angle.sin())
    return terms, rotary.scale * (q_rest * k_rest).sum(-1)


def amplitude_and_phase(
    q: Float[Tensor, "*rows d_head"], k: Float[Tensor, "*rows d_head"], rotary: Rotary
) -> tuple[Float[Tensor, "*rows pair"], Float[Tensor, "*rows pair"]]:
    """Return amplitude A_l ≥ 0 and phase φ_l of each rotary pair's share of a logit.

    `q` and `k` are before RoPE. Their logit at offset Δ is Σ_l A_l cos(θ_l Δ + φ_l), plus the
    unrotated part of `logit_terms`, with A_l = |c_l| and φ_l = arg c_l of
    c_l = scale · gain² · q_l k*_l. Phases are in radians, from −π to π. Source: the sum of cosines
    of arXiv 2601.08297; for a head's mean query and mean key it is `predicted_profile` (*ours*).
    """
    (q_re, q_im, _), (k_re, k_im, _) = rotary.split(q), rotary.split(k)
    factor = rotary.scale * rotary.gain**2
    real = factor * (q_re * k_re + q_im * k_im)
    imag = factor * (q_im * k_re - q_re * k_im)
    return torch.hypot(real, imag), torch.atan2(imag, real)


def predicted_profile(
    q_mean: Float[Tensor, "d_head"],
    k_mean: Float[Tensor, "d_head"],
    offsets: Tensor,
    rotary: Rotary,
) -> Float[Tensor, "offset"]:
    """Return the logit at each offset if every token had the mean query and the mean key.

    profile(Δ) = scale · Re Σ_l q̄_l k̄*_l e^{iθ_l Δ}, plus the unrotated dimensions. Source: the sum
    of cosines of arXiv 2601.08297, with means in place of a shared direction (*ours*).
    """
    n = len(offsets)
    terms, rest = logit_terms(q_mean.expand(n, -1), k_mean.expand(n, -1), offsets, rotary)
    return terms.sum(-1) + rest


def concentration(
    mean: Float[Tensor, "*heads d_head"], mean_abs: Float[Tensor, "*heads pair"], rotary: Rotary
) -> Float[Tensor, "*heads pair"]:
    """Return |E x_l| / E|x_l| of each pair, in [0, 1].

    It is 1 where the pair is the same complex number for all tokens, and near 0 where its phases
    are scattered. `mean` is the mean vector, `mean_abs` each pair's mean modulus. *Ours*.
    """
    real, imag, _ = rotary.split(mean)
    return torch.hypot(real, imag) / mean_abs.clamp(min=torch.finfo(mean.dtype).tiny)


def margin(profile: Float[Tensor, "offset"], at: int) -> float:
    """Return the logit at index `at` of a profile minus the largest logit of all other indices.

    For the profile of `predicted_profile` this measures the frequency condition: if all tokens were
    alike, the head would attend e^margin times as much to this offset as to the next best, so a
    slash head needs a positive margin. Infinite for a profile of one offset. Raises OffsetError for
    an index outside the profile. *Ours*, after condition 2 of arXiv 2601.08297.
    """
    if not 0 <= at < len(profile):
        raise OffsetError(
            f"a profile of {len(profile)} offsets has no index {at}; expected one from 0 to "
            f"{len(profile) - 1}"
        )
    others = torch.cat([profile[:at], profile[at + 1 :]])
    return float(profile[at] - others.max()) if len(others) else float("inf")
