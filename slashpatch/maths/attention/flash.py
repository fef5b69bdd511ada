"""Causal attention by torch's flash-attention kernels, with the log-sum-exp of each row.

Only private operators of torch return the log-sum-exp. Before an operator is used, its result on a
few random tokens is compared with a plain softmax. Where the operator is missing, raises or
disagrees, one warning says so, and the callers compute attention in blocks of rows instead.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Heads = Float[Tensor, "batch head pos d_head"]
Rows = Float[Tensor, "batch head pos"]


def _on_cpu(q: Heads, k: Heads, v: Heads, scale: float) -> tuple[Heads, Rows]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, True, scale=scale
    )
    return out, lse


def _on_cuda(q: Heads, k: Heads, v: Heads, scale: float) -> tuple[Heads, Rows]:
    if q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0:
        result = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, True, False, scale=scale
        )
    else:
        result = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, True, scale=scale
        )
    # The kernel may pad the log-sum-exp to a multiple of its block size.
    return result[0], result[1][..., : q.shape[-2]]


_KERNELS: dict[str, Callable[[Heads, Heads, Heads, float], tuple[Heads, Rows]]] = {
    "cpu": _on_cpu,
    "cuda": _on_cuda,
}


def plain_attention(q: Heads, k: Heads, v: Heads, scale: float) -> tuple[Heads, Rows]:
    """Return causal attention and its log-sum-exp in float64: the readable reference."""
    logits = scale * (q.double() @ k.double().mT)
    future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    logits = logits.masked_fill(future, -torch.inf)
    return logits.softmax(-1) @ v.double(), logits.logsumexp(-1)


def flash_attention(q: Heads, k: Heads, v: Heads, scale: float) -> tuple[Heads, Rows] | None:
    """Return causal attention and the log-sum-exp of each row; None without a working kernel.

    Equals `plain_attention` within the dtype's rounding. The log-sum-exp is float32 or wider.
    Gradients flow through the attention only, not through the log-sum-exp.
    """
    if not kernel_works(q.device.type, q.dtype, q.shape[-1]):
        return None
    return _KERNELS[q.device.type](q, k, v, scale)


@functools.cache
def kernel_works(device: str, dtype: torch.dtype, d_head: int) -> bool:
    """Return whether the device's kernel equals plain softmax on random tokens; else warn once."""
    if device not in _KERNELS:
        return False
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 2, 5, d_head, generator=generator).to(device, dtype) for _ in range(3)
    )
    # Differs from the kernels' default, so that a kernel that ignores its argument is noticed.
    scale = 0.5 * d_head**-0.5
    try:
        with torch.no_grad():
            out, lse = _KERNELS[device](q, k, v, scale)
        expected, expected_lse = plain_attention(q, k, v, scale)
        difference = max(
            float((out.double() - expected).abs().max()),
            float((lse.double() - expected_lse).abs().max()),
        )
        # With inputs of order 1 and five keys, some tens of rounding errors add up.
        if difference <= 64 * torch.finfo(dtype).eps:
            return True
        problem = f"its result differs by {difference:.2g} from plain softmax"
    except (AttributeError, RuntimeError, TypeError, ValueError, IndexError) as error:
        problem = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"flash attention of torch {torch.__version__} cannot be used on {device} in {dtype} with "
        f"d_head = {d_head} ({problem}); slashpatch computes attention in blocks of rows instead, "
        "which is exact too, but slower",
        RuntimeWarning,
        stacklevel=2,
    )
    return False
