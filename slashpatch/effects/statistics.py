"""Confidence intervals and p-values of paired effects.

The unit is the prompt, because the tokens of one prompt are not independent.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

_RESAMPLES = 5_000
_PERMUTATIONS = 10_000
#: Largest number of prompts for which all sign patterns are tried.
_EXACT = 12


def interval(
    sample: Float[Tensor, "prompt *of"], seed: int = 0, confidence: float = 0.95
) -> tuple[Float[Tensor, "*of"], Float[Tensor, "*of"]]:
    """Return the bootstrap confidence interval of the mean over prompts; NaN for one prompt.

    TransformerLens' percentile bootstrap, at a level that is widened for few prompts so that on
    normal data it agrees with Student's t interval (Hesterberg, "What teachers should know about
    the bootstrap", 2015, arXiv 1411.5279, "expanded percentile"). It cannot go beyond the most
    extreme prompts, so with fewer than about five prompts it covers less than `confidence`.
    """
    from scipy.stats import norm, t
    from transformer_lens.utilities.statistics import bootstrap_ci, derive_generator

    sample = sample.double()
    n = len(sample)
    if n < 2:
        nothing = torch.full_like(sample[0], torch.nan)
        return nothing, nothing.clone()
    tail = norm.cdf(-math.sqrt(n / (n - 1)) * t.ppf((1 + confidence) / 2, n - 1))
    return bootstrap_ci(
        sample,
        dim=0,
        confidence=max(1 - 2 * float(tail), 1e-6) if tail > 1e-9 else 1 - 1e-9,
        n_resamples=_RESAMPLES,
        generator=derive_generator(seed, "bootstrap"),
    )


def p_value(effects: Float[Tensor, "prompt *of"], seed: int = 0) -> Float[Tensor, "*of"]:
    """Return the two-sided sign-flip p-value of a zero mean effect; NaN for one prompt.

    TransformerLens' test: exact for up to 12 prompts (its smallest p-value is 2^(1−n)), else from
    10,000 seeded sign patterns.
    """
    from transformer_lens.utilities.statistics import derive_generator, sign_flip_permutation_pvalue

    if len(effects) < 2:
        return torch.full_like(effects[0].double(), torch.nan)
    return sign_flip_permutation_pvalue(
        effects.double(),
        dim=0,
        n_permutations=_PERMUTATIONS,
        exact_max_n=_EXACT,
        generator=derive_generator(seed, "sign flips"),
    )


def least_p(n: int) -> float:
    """Return the smallest p-value that n prompts can give."""
    return 2.0 ** (1 - n) if n <= _EXACT else 1 / (_PERMUTATIONS + 1)


def false_discovery(p: Float[Tensor, "*of"]) -> Float[Tensor, "*of"]:
    """Return Benjamini-Hochberg adjusted p-values (scipy's), over all that are not NaN."""
    from scipy.stats import false_discovery_control

    adjusted = torch.full_like(p, torch.nan)
    known = ~p.isnan()
    if bool(known.any()):
        adjusted[known] = torch.as_tensor(false_discovery_control(p[known].numpy()))
    return adjusted


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
    low, high = interval(effects, seed, confidence)
    return {
        "baseline": before.mean(0),
        "edited": after.mean(0),
        "effect": effects.mean(0),
        "low": low,
        "high": high,
        "p": p_value(effects, seed),
    }
