"""Gradients of a metric with respect to z, the output of each head before W_O."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...errors import MetricError
from ..metrics.by_name import Metric, metric_name, required_arguments
from .evaluation import MetricRunner, checked
from .inputs import Batch

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: By layer: z, its gradient, or a change of z.
ByLayer = dict[int, Float[Tensor, "batch pos head d_head"]]


@dataclass(frozen=True)
class Gradients:
    """z of one forward pass, and the gradient of a metric with respect to it, by layer."""

    z: ByLayer
    gradient: ByLayer


def require_gradient(metric: Metric) -> None:
    """Raise MetricError for a metric that is known to have no gradient at the clean run."""
    name = metric_name(metric)
    if hasattr(metric, "read"):
        why = "it reads the attention and not the logits"
    elif "clean_logits" in required_arguments(metric):
        why = "it compares with the clean run, where it is at its best value"
    else:
        return
    raise MetricError(f"{name} has no gradient at the clean run, because {why}; {_INSTEAD}")


def no_slope(name: str) -> MetricError:
    """Return the error of a metric whose gradient is zero on all prompts."""
    return MetricError(f"{name} has a gradient of zero here; {_INSTEAD}")


_INSTEAD = (
    "screen by another metric, such as proxy='loss' or proxy='copying' (--proxy): the estimates "
    "are then of the proxy, the exact effects of your metric"
)


def gradients(
    runner: MetricRunner, batch: Batch, layers: range, moved: ByLayer | None = None
) -> Gradients:
    """Return z and the metric's gradient with respect to z in some layers.

    Args:
        runner: Of one metric, which gives one number per prompt.
        batch: The prompts; the gradient of a prompt is that of its own number.
        layers: Layers from which on gradients are wanted; the last is the model's last.
        moved: Changes that are added to z on the way, by layer.

    Raises MetricError if the metric does not depend on z smoothly, or gives several numbers. The
    gradient may be zero on these prompts.
    """
    z: ByLayer = {}

    def keep(output: Any, hook: Any) -> Any:
        layer = hook.layer()
        if layer not in layers:
            return output
        if moved is not None:
            output = output + moved[layer]
        if layer == layers[0]:
            output = output.detach().requires_grad_()
        z[layer] = output
        return output

    hooks = [(runner.info.hook(layer, "z"), keep) for layer in layers]
    with torch.enable_grad(), weights_fixed(runner.model):
        logits = runner.logits(batch.tokens, hooks, gradients=True)
        label = "clean" if moved is None else "moved heads"
        value = differentiable(runner, logits, batch, label, instead=_INSTEAD)
        found = torch.autograd.grad(value.sum(), [z[layer] for layer in layers], allow_unused=True)
    by_layer = {
        layer: torch.zeros_like(z[layer]) if part is None else part
        for layer, part in zip(layers, found, strict=True)
    }
    if not all(bool(part.isfinite().all()) for part in by_layer.values()):
        raise MetricError(
            f"the gradient of {runner.names[0]} is not finite; with float16 it easily overflows, "
            "try bfloat16 or float32"
        )
    return Gradients({layer: part.detach() for layer, part in z.items()}, by_layer)


def differentiable(
    runner: MetricRunner,
    logits: Float[Tensor, "batch kept d_vocab"],
    batch: Batch,
    label: str,
    clean_logits: Tensor | None = None,
    *,
    instead: str,
) -> Tensor:
    """Return the value [batch] of the runner's one metric, which has a gradient.

    `label` names the run in messages, `instead` says what to do. Raises MetricError if the metric
    has no gradient, or does not give one finite number per prompt.
    """
    try:
        value = runner.of_logits(0, logits, batch, clean_logits)
    except RuntimeError as error:  # PyTorch's, of numpy() or of a change of a view
        if "grad" not in str(error):
            raise
        why = str(error).splitlines()[0].rstrip(".")
        raise MetricError(f"{runner.names[0]} has no gradient: {why}; {instead}") from error
    checked(value, batch, runner.names[0], label)
    if value.numel() != len(batch.index):
        raise MetricError(
            f"expected a metric with one number per prompt; {runner.names[0]} gives "
            f"{value.numel() // len(batch.index)}"
        )
    if not value.requires_grad:
        raise MetricError(
            f"{runner.names[0]} has no gradient, because it counts or is computed outside "
            f"autograd; {instead}"
        )
    found: Tensor = value
    return found


@contextmanager
def weights_fixed(model: TransformerBridge) -> Iterator[None]:
    """Ask for no gradients of the weights, so that what only those need is not kept."""
    weights = [w for w in model.original_model.parameters() if w.requires_grad]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
