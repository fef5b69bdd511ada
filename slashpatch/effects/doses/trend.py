"""How a metric follows the dose of an edit, on each prompt by itself."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..statistics import interval, p_value


def rank_correlations(
    doses: Float[Tensor, "dose"], values: Float[Tensor, "dose prompt"]
) -> Float[Tensor, "prompt"]:
    """Return Spearman's rank correlation of dose and value, for each prompt.

    Pearson's correlation of the ranks, equal values sharing their mean rank. 0 where a prompt's
    values are all equal: it follows no trend (*ours*; the correlation is undefined there).
    """
    x, y = _ranks(doses[:, None]), _ranks(values)
    x, y = x - x.mean(0), y - y.mean(0)
    size = x.square().sum(0).sqrt() * y.square().sum(0).sqrt()
    return torch.where(size > 0, (x * y).sum(0) / size.clamp(min=1e-300), 0.0)


def slopes(
    doses: Float[Tensor, "dose"], values: Float[Tensor, "dose prompt"]
) -> Float[Tensor, "prompt"]:
    """Return the least-squares slope of value on dose, for each prompt."""
    x = doses - doses.mean()
    return (x[:, None] * values).sum(0) / x.square().sum()


def trend(
    doses: Float[Tensor, "dose"],
    values: Float[Tensor, "dose prompt"],
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Return mean rank correlation and mean slope over prompts, with intervals and p-values.

    One number per prompt, so that the doses, which share prompts, are not counted as independent.
    """
    found: dict[str, Any] = {}
    for name, each in (
        ("spearman", rank_correlations(doses, values)),
        ("slope", slopes(doses, values)),
    ):
        low, high = interval(each, seed, confidence)
        if name == "spearman":  # a correlation ends at 1, whatever the resampling says
            low, high = low.clamp(-1, 1), high.clamp(-1, 1)
        found |= {
            name: float(each.mean()),
            f"{name}_low": float(low),
            f"{name}_high": float(high),
            f"{name}_p": float(p_value(each, seed)),
        }
    return found


def _ranks(values: Float[Tensor, "dose column"]) -> Float[Tensor, "dose column"]:
    """Return the ranks of each column from 0; equal values share their mean rank."""
    below = (values[None] < values[:, None]).double().sum(1)
    equal = (values[None] == values[:, None]).double().sum(1)
    return below + (equal - 1) / 2
