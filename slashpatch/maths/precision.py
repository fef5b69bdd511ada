"""Tolerances derived from a dtype's rounding, and the value that marks masked logits.

Comparisons in slashpatch take their tolerance from here; none is tuned until a test passes.
"""

from __future__ import annotations

import math

import torch


def rounding(dtype: torch.dtype) -> float:
    """Return the machine epsilon of attention computed in a dtype, at least that of float32.

    Models in float64 too compute their softmax and their tables of cos and sin in float32.
    """
    return float(max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps))


def attention_slack(dtype: torch.dtype, largest_score: float) -> float:
    """Return how far two computations of the same attention may differ through rounding alone.

    The result is relative to the largest output. Product, scale and mask are each rounded by half
    an eps in both computations: an error e in a logit scales its weight by exp(e). Weights and
    outputs are rounded too. Large scores would make this bound useless, so it is at most 0.5
    (*ours*): two different attentions differ by more.
    """
    eps = rounding(dtype)
    return min(math.expm1(min(3 * eps * largest_score, 1.0)) + 8 * eps, 0.5)


def logits_slack(dtype: torch.dtype, n_layers: int) -> float:
    """Return how far two computations of the same logits may differ through rounding alone.

    The result is relative to the largest logit: 64 roundings a layer, at most 0.5 (*ours*).
    """
    return min(64 * (n_layers + 1) * rounding(dtype), 0.5)


#: Logits at or below this value are masked. Masks contain −inf or the lowest number of a dtype, and
#: that dtype may be float16 where the scores themselves are float32.
MASKED = torch.finfo(torch.float16).min / 2
