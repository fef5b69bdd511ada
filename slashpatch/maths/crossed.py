"""Intervals over two crossed sources of chance: prompts, and the draws of a control."""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from .resampling import LEAST, TIE, Weights, as_generator, chunks, tails

#: Resamples; fewer than those of a mean, because each takes more work.
RESAMPLES = 4_999


class BeyondDraws(NamedTuple):
    """An effect beyond the mean of a control's draws.

    Attributes:
        estimate: The mean effect, minus the mean over draws and prompts.
        low: Lower end of the interval over prompts and draws.
        high: Upper end.
        p_rank: The share of the edit and its draws whose mean effect is at least as large as the
            edit's, in absolute value. It speaks of other draws of the control.
    """

    estimate: Float[Tensor, "*of"]
    low: Float[Tensor, "*of"]
    high: Float[Tensor, "*of"]
    p_rank: Float[Tensor, "*of"]


def beyond_draws(
    effects: Float[Tensor, "prompt *of"],
    draws: Float[Tensor, "draw prompt *of"],
    seed: int | torch.Generator = 0,
    confidence: float = 0.95,
) -> BeyondDraws:
    """Return an edit's effect beyond that of a control's draws, as of other prompts and draws.

    Prompts and draws are resampled, each on its own (Owen, "The pigeonhole bootstrap", 2007, arXiv
    0712.1111). The difference is studentised by V = S_P² / P + S_D² / D, of the differences per
    prompt and the means per draw, which counts what is left of both twice and so is a little large.
    Limits are those of `mean_inference`, at Satterthwaite's degrees of freedom of V. (The two put
    together are *ours*.) The rank p-value is (1 + draws as large) / (1 + draws) (Phipson and Smyth,
    "Permutation p-values should never be zero", 2010): it takes the edit to be one more draw.

    Args:
        effects: The edit's effect on each prompt.
        draws: The effect of each draw on the same prompts.
        seed: A seed, or a generator on the CPU.
        confidence: Level of the interval. It is NaN for fewer than 6 prompts or 6 draws (`LEAST`).
    """
    shape, (d, p) = effects.shape[1:], draws.shape[:2]
    edit = effects.double().reshape(p, -1)
    control = draws.double().reshape(d, p, -1)
    as_large = (control.mean(1).abs() >= edit.mean(0).abs()).double().sum(0)
    estimate = edit.mean(0) - control.mean((0, 1))
    if p < LEAST or d < LEAST:
        low = high = torch.full_like(estimate, torch.nan)
    else:
        low, high = _interval(edit, control, estimate, as_generator(seed), confidence)
    found = (estimate, low.clone(), high, (1 + as_large) / (1 + d))
    return BeyondDraws(*(values.view(shape) for values in found))


def _interval(
    edit: Float[Tensor, "prompt of"],
    control: Float[Tensor, "draw prompt of"],
    estimate: Float[Tensor, "of"],
    generator: torch.Generator,
    confidence: float,
) -> tuple[Float[Tensor, "of"], Float[Tensor, "of"]]:
    """Return both ends of the interval."""
    d, p = control.shape[:2]
    over_prompts = (edit - control.mean(0)).var(0) / p
    over_draws = control.mean(1).var(0) / d
    variance = over_prompts + over_draws
    largest = torch.maximum(edit.abs().amax(0), control.abs().amax((0, 1)))
    constant = variance.sqrt() <= 1e-14 * largest
    se = torch.where(constant, torch.ones_like(variance), variance.sqrt())
    df = variance**2 / (over_prompts**2 / (p - 1) + over_draws**2 / (d - 1))
    df = torch.where(constant, torch.full_like(df, p - 1), df)
    # Both centred, so that sums of squares keep their digits: Ē* − X̄** is then around zero.
    edit = (edit - edit.mean(0)) / se
    control = (control - control.mean((0, 1))) / se
    spread = torch.stack([over_prompts * p, over_draws * d]).sqrt() / se
    of_prompts, of_draws = (Weights.draw(n, generator, RESAMPLES) for n in (p, d))
    parts = []
    for at in chunks(len(estimate), RESAMPLES * max(d, p)):
        t = _studentised(edit[:, at], control[:, :, at], spread[:, at], of_prompts, of_draws)
        parts.append(tails(t, torch.zeros_like(df[at]), df[at], confidence)[:2])
    lower, upper = (torch.cat(part) for part in zip(*parts, strict=True))
    low, high = estimate - upper * se, estimate - lower * se
    return torch.where(constant, estimate, low), torch.where(constant, estimate, high)


def _studentised(
    edit: Float[Tensor, "prompt of"],
    control: Float[Tensor, "draw prompt of"],
    spread: Float[Tensor, "2 of"],
    of_prompts: Weights,
    of_draws: Weights,
) -> Float[Tensor, "resample of"]:
    """Return each resample's difference over its standard error; `spread` scales the noise."""
    d, p = control.shape[:2]
    mean_of_draws = einsum(of_draws.counts, control, "b d, d p of -> b p of") / d
    mean_of_prompts = einsum(of_prompts.counts, control, "b p, d p of -> b d of") / p
    difference, by_prompt = _moments(edit - mean_of_draws, of_prompts, spread[0])
    _, by_draw = _moments(mean_of_prompts, of_draws, spread[1])
    difference = difference - spread[1] * of_draws.total / d
    return difference / (by_prompt / p + by_draw / d).clamp(min=TIE**2).sqrt()


def _moments(
    values: Float[Tensor, "resample some of"], weights: Weights, spread: Float[Tensor, "of"]
) -> tuple[Float[Tensor, "resample of"], Float[Tensor, "resample of"]]:
    """Return mean and variance of n resampled values, which differ in each resample, with noise."""
    n = values.shape[1]
    counts, noise = weights.counts[:, :, None], weights.noise[:, :, None]
    mean = ((counts * values).sum(1) + spread * weights.total) / n
    squares = (counts * values**2 + 2 * spread * noise * values).sum(1)
    squares = squares + spread**2 * weights.squared
    return mean, (squares / n - mean**2).clamp(min=0) * n / (n - 1)
