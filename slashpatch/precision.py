"""What rounding explains: tolerances come from a dtype, not from what passes."""

from __future__ import annotations

import torch


def rounding(dtype: torch.dtype) -> float:
    """Machine epsilon of attention in a dtype: that of float32 at best, which softmax and the
    tables of cos and sin have in wider models too.
    """
    return float(max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps))


#: Logits at or below this are masked: a mask holds -inf or the lowest number of a dtype, which may
#: be float16's where the scores themselves are wider.
MASKED = torch.finfo(torch.float16).min / 2
