"""The metrics of a forward pass: one or several numbers per prompt, not averaged over prompts.

A metric of logits is a function whose arguments are any of `logits` [batch, pos, d_vocab], `tokens`
[batch, pos], `clean_logits` (the clean run's logits), `index` (the prompts' indices, [batch]) and
`n_prompts` (of the whole measurement). It returns a tensor [batch], or [batch, n] for n numbers per
prompt. A metric of attention is an object with `heads` and a method `read(pattern, tokens)`, which
returns [batch, head]. Results name a function by its `__name__`, so two functions must not share
one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from ...errors import MetricError
from ...maths.repeated_tokens import copy_length, copying_loss
from .attention import PrefixMatching, SlashScores
from .logits import (
    copying_top1,
    kl_to_clean,
    loss_by_position,
    next_token_loss,
    top1_agreement,
)

Metric = Any


for _function in (copying_loss, copying_top1):
    _function.repeated = True  # type: ignore[attr-defined]
    _function.keeps = copy_length  # type: ignore[attr-defined]

#: The argument names that a metric function may have.
_ARGUMENTS = {"logits", "tokens", "clean_logits", "index", "n_prompts"}

#: The built-in metrics, by the names that `as_metric` and the command line take.
METRICS: dict[str, Metric] = {
    "loss": next_token_loss,
    "kl": kl_to_clean,
    "top1": top1_agreement,
    "loss-by-position": loss_by_position,
    "copying": copying_loss,
    "copying-top1": copying_top1,
    "prefix-matching": PrefixMatching(),
    "slash": SlashScores(),
}


def as_metric(spec: Any) -> Metric:
    """Return the metric of this name, or the function or object itself. Raises MetricError."""
    if isinstance(spec, str):
        if spec not in METRICS:
            raise MetricError(f"there is no metric {spec!r}; expected one of {', '.join(METRICS)}")
        return METRICS[spec]
    if inspect.isclass(spec) or not (callable(spec) or hasattr(spec, "read")):
        raise MetricError(
            "a metric must be a name, a function of logits and tokens, or an object with `read` "
            f"such as SlashScores(); got {spec!r}"
        )
    if not hasattr(spec, "read"):
        try:
            arguments = required_arguments(spec)
        except (TypeError, ValueError):
            arguments = []
        unknown = sorted(set(arguments) - _ARGUMENTS)
        if unknown or not arguments:
            raise MetricError(
                f"the metric {metric_name(spec)} has "
                f"{'the unknown arguments ' + ', '.join(unknown) if unknown else 'no arguments'}; "
                f"expected some of {', '.join(sorted(_ARGUMENTS))}"
            )
    return spec


def metric_name(metric: Metric) -> str:
    """Return the metric's name in results: its name in `METRICS`, its `__name__` or its repr."""
    for name, known in METRICS.items():
        if known is metric or (hasattr(known, "read") and known == metric):
            return name
    return str(getattr(metric, "__name__", None) or repr(metric))


def required_arguments(metric: Callable[..., Tensor]) -> list[str]:
    """Return the names of a metric function's arguments that have no default."""
    return [
        name
        for name, parameter in inspect.signature(metric).parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]


def kept_positions(metrics: Sequence[Metric], tokens: Int[Tensor, "batch pos"]) -> int:
    """Return the number of last positions whose logits these metrics need."""
    n_pos = tokens.shape[1]
    keeps = [
        0 if hasattr(metric, "read") else getattr(metric, "keeps", lambda _: n_pos)(tokens)
        for metric in metrics
    ]
    return max(1, *keeps)


def needs_copies(metric: Metric) -> bool:
    """Return whether a metric needs prompts that hold the same tokens twice."""
    return bool(getattr(metric, "repeated", False))
