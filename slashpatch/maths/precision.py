"""What rounding explains: tolerances come from a dtype, not from what passes."""

from __future__ import annotations

import math

import torch


def rounding(dtype: torch.dtype) -> float:
    """Machine epsilon of attention in a dtype: that of float32 at best, which softmax and the
    tables of cos and sin have in wider models too.
    """
    return float(max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps))


def attention_slack(dtype: torch.dtype, largest_score: float) -> float:
    """How far two runs of the same attention may differ, relative to its largest output.

    The product, its scale and its mask are rounded by half an eps each, on either side, which
    scales a weight by as much; so are weights and outputs. Where scores are so large that this says
    nothing, half of the output is allowed (*ours*): another attention differs by more.
    """
    eps = rounding(dtype)
    return min(math.expm1(min(3 * eps * largest_score, 1.0)) + 8 * eps, 0.5)


#: Logits at or below this are masked: a mask holds -inf or the lowest number of a dtype, which may
#: be float16's where the scores themselves are wider.
MASKED = torch.finfo(torch.float16).min / 2
