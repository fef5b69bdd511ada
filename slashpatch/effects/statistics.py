"""Confidence intervals and p-values of paired effects.

The unit is the prompt, because the tokens of one prompt are not independent. The resampling is in
`maths/resampling.py`, its simulated coverage in docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..maths.crossed import BeyondDraws
from ..maths.crossed import beyond_draws as _beyond_draws
from ..maths.resampling import LEAST, Inference, halves, least_p, mean_inference

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "LEAST",
    "adjusted",
    "beyond_draws",
    "compared",
    "false_discovery",
    "few_prompts",
    "interval",
    "largest",
    "least_p",
    "p_value",
    "split",
]


def interval(
    sample: Float[Tensor, "prompt *of"], seed: int = 0, confidence: float = 0.95
) -> tuple[Float[Tensor, "*of"], Float[Tensor, "*of"]]:
    """Return the confidence interval of the mean over prompts, by `mean_inference`.

    It speaks of other prompts of the same kind. NaN for fewer than 6 prompts (`LEAST`), which
    cannot carry an interval.
    """
    low, high, _ = _inference(sample, seed, confidence)
    return low, high


def p_value(effects: Float[Tensor, "prompt *of"], seed: int = 0) -> Float[Tensor, "*of"]:
    """Return the two-sided p-value of a zero mean effect over prompts, by `mean_inference`.

    It is below 0.05 where the 95 % interval leaves out zero, and does not take the effects to be
    symmetric. Effects that are 0 at each prompt have p = 1; effects that are the same other number
    at each, `least_p`. NaN for fewer than 6 prompts (`LEAST`).
    """
    return _inference(effects, seed, 0.95).p


def beyond_draws(
    effects: Float[Tensor, "prompt *of"],
    draws: Float[Tensor, "draw prompt *of"],
    seed: int = 0,
    confidence: float = 0.95,
) -> BeyondDraws:
    """Return an edit's effect beyond a control's draws, by `maths.crossed.beyond_draws`."""
    from transformer_lens.utilities.statistics import derive_generator

    return _beyond_draws(effects, draws, derive_generator(seed, "bootstrap draws"), confidence)


def _inference(sample: Float[Tensor, "prompt *of"], seed: int, confidence: float) -> Inference:
    from transformer_lens.utilities.statistics import derive_generator

    return mean_inference(sample, derive_generator(seed, "bootstrap"), confidence)


def false_discovery(p: Float[Tensor, "*of"]) -> Float[Tensor, "*of"]:
    """Return Benjamini-Hochberg adjusted p-values (scipy's), over all that are not NaN."""
    from scipy.stats import false_discovery_control

    adjusted = torch.full_like(p, torch.nan)
    known = ~p.isnan()
    if bool(known.any()):
        adjusted[known] = torch.as_tensor(false_discovery_control(p[known].numpy()))
    return adjusted


def few_prompts(n: int) -> tuple[str, ...]:
    """Return a remark, if n prompts are too few for intervals."""
    if n >= LEAST:
        return ()
    return (
        f"{n} {'prompt' if n == 1 else 'prompts'}: too few for intervals and p-values, which need "
        f"at least {LEAST}.",
    )


def split(n: int, seed: int, label: str) -> tuple[list[int], list[int]]:
    """Return the prompts to pick on, and those to estimate on; one prompt has to serve for both."""
    from transformer_lens.utilities.statistics import derive_generator

    picking, estimating = halves(n, derive_generator(seed, label))
    return picking or estimating, estimating


def largest(
    names: Sequence[str], effects: Float[Tensor, "prompt of"], seed: int, confidence: float
) -> tuple[str, ...]:
    """Return a remark on the largest effect: picked on one half of the prompts, and estimated anew.

    On the prompts that it is picked on, the largest of many looks larger than it is. None for fewer
    than two names or than two halves that carry an interval.
    """
    if len(names) < 2 or len(effects) < 2 * LEAST:
        return ()
    picking, estimating = split(len(effects), seed, "largest")
    best = int(effects[picking].mean(0).abs().argmax())
    effect = effects[estimating, best]
    low, high = interval(effect, seed, confidence)
    return (
        f"Largest on {len(picking)} of the prompts: {names[best]}. On the other {len(estimating)}, "
        f"its effect is {float(effect.mean()):+.3g} [{float(low):+.3g}, {float(high):+.3g}].",
    )


def adjusted(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return rows as a table; where there is a column p, add q, adjusted over all rows with p."""
    import pandas as pd

    frame = pd.DataFrame(rows)
    if "p" in frame:
        frame["q"] = false_discovery(torch.tensor(frame["p"].to_numpy())).numpy()
    return frame


def compared(
    before: Float[Tensor, "prompt *of"],
    after: Float[Tensor, "prompt *of"],
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Return both means, and the paired effect (after − before) with interval and p-value."""
    before, after = before.double(), after.double()
    effects = after - before
    low, high, p = _inference(effects, seed, confidence)
    return {
        "baseline": before.mean(0),
        "edited": after.mean(0),
        "effect": effects.mean(0),
        "low": low,
        "high": high,
        "p": p,
    }
