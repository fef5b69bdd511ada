"""A logit taken apart by frequency, and the slash profile that two mean vectors predict."""

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
    """The logit of pre-RoPE q and k at a distance, by pair, and the part that is not rotated.

    Term l is scale · gain² · Re(q_l k*_l e^{iθ_l offset}); all terms and the rest sum to the logit.
    `offset` (tokens; any real number) broadcasts over the rows. Source: RoFormer, arXiv 2104.09864.
    """
    (q_re, q_im, q_rest), (k_re, k_im, k_rest) = rotary.split(q), rotary.split(k)
    angle = offset[..., None].to(rotary.inv_freq) * rotary.inv_freq
    real, imag = q_re * k_re + q_im * k_im, q_im * k_re - q_re * k_im
    terms = rotary.scale * rotary.gain**2 * (real * angle.cos() - imag * angle.sin())
    return terms, rotary.scale * (q_rest * k_rest).sum(-1)


def predicted_profile(
    q_mean: Float[Tensor, "d_head"],
    k_mean: Float[Tensor, "d_head"],
    offsets: Tensor,
    rotary: Rotary,
) -> Float[Tensor, "offset"]:
    """The logit by offset if every token had the mean query and the mean key.

    profile(Δ) = scale · Re Σ_l q̄_l k̄*_l e^{iθ_l Δ}. Source: the sum of cosines of arXiv 2601.08297,
    with means in place of a shared direction (*ours*).
    """
    n = len(offsets)
    terms, rest = logit_terms(q_mean.expand(n, -1), k_mean.expand(n, -1), offsets, rotary)
    return terms.sum(-1) + rest


def concentration(
    mean: Float[Tensor, "*heads d_head"], mean_abs: Float[Tensor, "*heads pair"], rotary: Rotary
) -> Float[Tensor, "*heads pair"]:
    """|E x_l| / E|x_l| of each pair, in [0, 1]: 1 where all tokens share one complex number.

    `mean_abs` is the mean modulus of each pair. *Ours*.
    """
    real, imag, _ = rotary.split(mean)
    return torch.hypot(real, imag) / mean_abs.clamp(min=torch.finfo(mean.dtype).tiny)


def margin(profile: Float[Tensor, "offset"], at: int) -> float:
    """Logit at one place of a profile over the best of all others.

    Of the profile that mean query and mean key predict it is the frequency condition: all tokens
    alike, the head attends mostly to that offset only if it is positive, and then by a factor of
    e^margin over the next best. Infinite where there is no other offset. Raises OffsetError for a
    place outside the profile. *Ours*, after condition 2 of arXiv 2601.08297.
    """
    if not 0 <= at < len(profile):
        raise OffsetError(f"a profile of {len(profile)} offsets has no place {at}")
    others = torch.cat([profile[:at], profile[at + 1 :]])
    return float(profile[at] - others.max()) if len(others) else float("inf")
