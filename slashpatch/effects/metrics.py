"""What is measured of one pass: numbers per prompt, never averaged over prompts.

A metric is a function of any of `logits` [batch, pos, d_vocab], `tokens` [batch, pos],
`clean_logits` (the unedited model's logits), `index` (which prompts these are, [batch]) and `n_prompts`, by those
names; it returns [batch], or [batch, n] for several numbers. Metrics of attention are objects with
a `read`. A function is known by its name: two that differ must not share one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from ..errors import MetricError
from .attention_metrics import PrefixMatching, SlashScores
from .logit_metrics import (
    copy_length,
    copying_loss,
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

#: What a metric function can ask for.
_GIVEN = {"logits", "tokens", "clean_logits", "index", "n_prompts"}

#: What the command line calls them.
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
    """A metric from its name, or the function or object itself. Raises MetricError."""
    if isinstance(spec, str):
        if spec not in METRICS:
            raise MetricError(f"no metric {spec!r}; expected one of {', '.join(METRICS)}")
        return METRICS[spec]
    if inspect.isclass(spec) or not (callable(spec) or hasattr(spec, "read")):
        raise MetricError(
            "a metric is a name, a function of logits and tokens, or an object with `read` such as "
            f"SlashScores(); got {spec!r}"
        )
    if not hasattr(spec, "read"):
        try:
            asked = wanted(spec)
        except (TypeError, ValueError):
            asked = []
        unknown = sorted(set(asked) - _GIVEN)
        if unknown or not asked:
            raise MetricError(
                f"the metric {metric_name(spec)} asks for {', '.join(unknown) or 'nothing'}; it "
                f"can have {', '.join(sorted(_GIVEN))}, by these names"
            )
    return spec


def metric_name(metric: Metric) -> str:
    """How results call it: its short name, the function's own, or the object as it is written."""
    for name, known in METRICS.items():
        if known is metric or (hasattr(known, "read") and known == metric):
            return name
    return str(getattr(metric, "__name__", None) or repr(metric))


def wanted(metric: Callable[..., Tensor]) -> list[str]:
    """The arguments that a metric function must be given."""
    return [
        name
        for name, parameter in inspect.signature(metric).parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]


def kept_positions(metrics: Sequence[Metric], tokens: Int[Tensor, "batch pos"]) -> int:
    """How many of the last positions' logits all the metrics can do with."""
    n_pos = tokens.shape[1]
    keeps = [
        0 if hasattr(metric, "read") else getattr(metric, "keeps", lambda _: n_pos)(tokens)
        for metric in metrics
    ]
    return max(1, *keeps)


def needs_copies(metric: Metric) -> bool:
    """Whether a metric is of repeated tokens only."""
    return bool(getattr(metric, "repeated", False))
