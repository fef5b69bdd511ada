"""Which sets of RoPE frequencies single out an offset, if all tokens are alike.

A head whose queries are all alike, and whose keys are, has the logit Σ_l A_l cos(θ_l δ + φ_l) at
offset δ (arXiv 2601.08297). The margin is this profile at the head's offset minus the largest value
at any other (`slashpatch.maths.spectrum.margin`), here divided by Σ_l A_l. All of this is *ours*.

A bound for an offset Δ that has a neighbour on each side, whatever amplitudes and phases are.
The mean of the profile at Δ−1 and Δ+1 is Σ_l A_l cos θ_l cos(θ_l Δ + φ_l), so the undivided margin
is at most Σ_l A_l (1 − cos θ_l), and the normalised one at most 1 − cos θ for the highest frequency
θ (up to π). Of low frequencies that is about θ²/2.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import BandError, OffsetError

#: The largest total amplitude that `needed_amplitude` tries, in nats.
MOST = 1e9


def margins_by_cutoff(
    inv_freq: Float[Tensor, "pair"],
    at: int,
    n_offsets: int,
    amplitudes: Float[Tensor, "pair"] | None = None,
    phases: Float[Tensor, "pair"] | None = None,
) -> Float[Tensor, "highest lowest"]:
    """Return the normalised margin of each range of frequencies at offset `at`.

    Entry (a, b) is for the pairs from the a-th to the b-th highest frequency θ (a ≤ b; NaN for
    a > b). Their profile over the offsets 0 to `n_offsets` − 1 has the largest possible value
    Σ_l A_l. The margin is divided by it: 1 would be perfect (all other offsets at 0), 0 says that
    another offset has the same logit. If the pairs' total amplitude is A nats, a head attends
    e^(margin · A) times as much to `at` as to the next best offset.

    Args:
        inv_freq: Frequencies θ in radians per token, in any order.
        at: The offset Δ.
        n_offsets: Number of offsets, such as the length of the context.
        amplitudes: A_l ≥ 0 of each pair; None: 1.
        phases: φ_l in radians; None: −θ_l Δ, for which all cosines are 1 at Δ.

    Raises:
        OffsetError: An offset outside the profile, or a profile of one offset.
        BandError: A negative amplitude.
    """
    if not 0 <= at < n_offsets or n_offsets < 2:
        raise OffsetError(
            f"expected at least two offsets, and one of them as the margin's; got offset {at} of "
            f"{n_offsets}"
        )
    theta, order = inv_freq.double().sort(descending=True, stable=True)
    amplitude = torch.ones_like(theta) if amplitudes is None else amplitudes.double()[order]
    phase = -theta * at if phases is None else phases.double()[order]
    if not bool((amplitude >= 0).all()):
        raise BandError("amplitudes are at least 0; turn a negative cosine by a phase of π")
    angle = theta[:, None] * torch.arange(n_offsets) + phase[:, None]
    sums = torch.cat([torch.zeros(1, n_offsets), amplitude[:, None] * angle.cos()]).cumsum(0)
    totals = torch.cat([torch.zeros(1), amplitude]).cumsum(0)
    found = torch.full((len(theta), len(theta)), torch.nan, dtype=torch.float64)
    for first in range(len(theta)):
        profiles = sums[first + 1 :] - sums[first]
        others = torch.cat([profiles[:, :at], profiles[:, at + 1 :]], dim=1).amax(1)
        found[first, first:] = (profiles[:, at] - others) / (totals[first + 1 :] - totals[first])
    return found


def profile_score(profile: Float[Tensor, "offset"], at: int) -> float:
    """Return the slash score at offset `at` of a head whose logits depend on the offset alone.

    The prompt has as many tokens as the profile has offsets: token i attends by the softmax of the
    profile's entries 0 to i, and the score is the mean over the tokens i ≥ `at` (the definition of
    the slash score, arXiv 2601.08297). In [0, 1]. Raises OffsetError for an offset outside the
    profile.
    """
    if not 0 <= at < len(profile):
        raise OffsetError(f"a profile of {len(profile)} offsets has no offset {at}")
    logits = profile.double()
    return float((logits[at] - logits.logcumsumexp(0)[at:]).exp().mean())


def needed_amplitude(
    inv_freq: Float[Tensor, "pair"], at: int, n_offsets: int, score: float = 0.5
) -> float:
    """Return the least total amplitude, in nats, at which a set of frequencies gives a slash score.

    All pairs have the same amplitude and the phases −θ_l Δ, so that every other offset has at most
    the logit of `at`, and the score only grows with the amplitude. Infinite if no amplitude up to
    `MOST` gives that score, as where another offset has the same logit. By the bound above and
    the convexity of exp, a score of 1/2 on long prompts needs about ln 2 / (1 − cos θ) at least.
    Raises OffsetError for an offset outside the profile, BandError for no frequencies or a score
    outside [0, 1].
    """
    if not len(inv_freq) or not 0 <= score <= 1:
        raise BandError(
            "expected at least one frequency and a slash score from 0 to 1; got "
            f"{len(inv_freq)} frequencies and {score}"
        )
    theta = inv_freq.double()
    unit = (theta[:, None] * (torch.arange(n_offsets) - at)).cos().mean(0)
    low, high = 0.0, 1.0
    while profile_score(high * unit, at) < score:
        if high >= MOST:
            return float("inf")
        low, high = high, min(2 * high, MOST)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if profile_score(middle * unit, at) < score else (low, middle)
    return high
