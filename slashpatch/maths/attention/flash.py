"""Causal attention by torch's flash kernels, with the log-sum-exp of each row.

The kernels that return it are torch's private operators. Each is tried once against plain softmax
before it is trusted; where it is missing, refuses or disagrees, one warning says so and the callers
go by blocks of rows instead.
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
        found = torch.ops.aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, True, False, scale=scale
        )
    else:
        found = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, 0.0, True, scale=scale
        )
    # The log-sum-exp may be padded to a multiple of the kernel's block.
    return found[0], found[1][..., : q.shape[-2]]


_KERNELS: dict[str, Callable[[Heads, Heads, Heads, float], tuple[Heads, Rows]]] = {
    "cpu": _on_cpu,
    "cuda": _on_cuda,
}


def plain_attention(q: Heads, k: Heads, v: Heads, scale: float) -> tuple[Heads, Rows]:
    """Causal attention and the log-sum-exp of its logits: the readable reference, in float64."""
    logits = scale * (q.double() @ k.double().mT)
    future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    logits = logits.masked_fill(future, -torch.inf)
    return logits.softmax(-1) @ v.double(), logits.logsumexp(-1)


def flash_attention(q: Heads, k: Heads, v: Heads, scale: float) -> tuple[Heads, Rows] | None:
    """Causal attention [batch, head, pos, d_head] and its log-sum-exp, float32 or wider.

    Gradients flow through the attention, not through the log-sum-exp. None where the device or
    dtype has no kernel that can be trusted. Equals `plain_attention` within the dtype's rounding.
    """
    if not kernel_works(q.device.type, q.dtype, q.shape[-1]):
        return None
    return _KERNELS[q.device.type](q, k, v, scale)


@functools.cache
def kernel_works(device: str, dtype: torch.dtype, d_head: int) -> bool:
    """Whether the device's kernel agrees with plain softmax on a few random tokens. Warns once."""
    if device not in _KERNELS:
        return False
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 2, 5, d_head, generator=generator).to(device, dtype) for _ in range(3)
    )
    scale = 0.5 * d_head**-0.5  # not the kernel's own default
    try:
        with torch.no_grad():
            out, lse = _KERNELS[device](q, k, v, scale)
        right, right_lse = plain_attention(q, k, v, scale)
        off = max(
            float((out.double() - right).abs().max()),
            float((lse.double() - right_lse).abs().max()),
        )
        # Inputs of order 1 and a handful of keys: some tens of roundings.
        if off <= 64 * torch.finfo(dtype).eps:
            return True
        problem = f"it is off by {off:.2g}"
    except (AttributeError, RuntimeError, TypeError, ValueError, IndexError) as error:
        problem = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"torch {torch.__version__}'s flash attention cannot be used on {device} in {dtype} with "
        f"heads of width {d_head} ({problem}); slashpatch goes by blocks of rows there, which is "
        "exact too, and slower",
        RuntimeWarning,
        stacklevel=2,
    )
    return False
