"""Fit the constants of optimal ablation: the vectors that hurt a metric least."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from .. import bridge
from ..bridge.passes import leaving_no_trace
from ..bridge.prefix_cache import PrefixCache
from ..bridge.provenance import provenance
from ..data.heads import Head, HeadsLike
from ..data.progress import progress_over
from ..data.prompts import PromptSet, tokens_digest
from ..edits import Constants
from ..errors import EditError, MetricError
from .metrics.by_name import as_metric
from .metrics.logits import LogitDifference
from .running.conditions import require_options
from .running.evaluation import MetricRunner
from .running.gradients import differentiable, weights_fixed
from .running.inputs import Batch, batches, prompts_for

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Steps without a better value after which the step size is halved, and the share of the first
#: step size below which the fit ends. *Ours*.
_PATIENCE, _LEAST_RATE = 4, 1 / 30
#: Bytes that the clean logits may take; above this, they are computed again in each step.
_KEPT_BYTES = 1024 * 2**20
_INSTEAD = "fit by loss, copying or kl, and measure by your metric"


def fit_ablation(
    model: TransformerBridge,
    wanted: HeadsLike,
    prompts: Any = None,
    metric: Any = "loss",
    *,
    random_tokens: bool = False,
    n_prompts: int = 8,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    steps: int = 60,
    learning_rate: float = 0.3,
    seed: int = 1,
    progress: bool | None = None,
) -> Constants:
    """Fit the constant outputs that replace some heads at the least cost, on prompts.

    Optimal ablation (Li and Janson, arXiv 2409.09951): the constants a* that minimise the expected
    metric of the model whose heads output a*. One vector for each head, those of all heads
    together: the constants of two heads are not those of each alone. The fit starts from mean
    ablation on these prompts and keeps the best step, so on these prompts it is at least as good.
    Adam on all prompts at once, whose step size is halved where it finds nothing better (*ours*).
    The model is run as it is, active patches included. Measure on other prompts, as `ablations`
    does; `measure` remarks which of its prompts the fit has seen.

    Args:
        model: A TransformerBridge in evaluation mode.
        wanted: Query heads, which are ablated together.
        prompts: As for `measure`; None: natural text, or repeated random tokens for copying
            metrics.
        metric: What to minimise, averaged over prompts: "loss", "copying", "kl", or a function of
            logits with a gradient that gives one number per prompt, the lower the better.
        random_tokens: Use uniform random tokens instead of natural text.
        n_prompts: Number of prompts.
        max_tokens: Length of generated prompts, at most the model's context; None: 65, or the
            context if that is shorter.
        batch_size: Prompts per forward pass; None: by memory.
        steps: Largest number of steps, each a forward and a backward pass over all prompts; 0 gives
            mean ablation.
        learning_rate: First step size, in units of each head's root mean square deviation of z from
            its mean.
        seed: Random seed of the prompts.
        progress: Whether to show a progress bar; None: on a terminal only.

    Raises:
        EditError: No heads, or steps or a learning rate out of range.
        HeadError: Heads that the model does not have.
        MetricError: A metric without a gradient, or that is better the higher it is.
        PromptError: Prompts that are empty, longer than the context, or unfit for the metric.
    """
    require_options(seed, 0.95, n_prompts=n_prompts, batch_size=batch_size)
    require_steps(steps, learning_rate)
    runner = MetricRunner(model, [lower_is_better(metric)])
    chosen = tuple(sorted(runner.info.require(wanted)))
    if not chosen:
        raise EditError("fit_ablation needs at least one head; got none")
    fitted_on = prompts_for(
        model,
        runner.metrics,
        prompts,
        random_tokens=random_tokens,
        n_prompts=n_prompts,
        max_tokens=max_tokens,
        default=65,
        seed=seed,
    )
    return fitted_constants(
        runner, chosen, fitted_on, batch_size, steps, learning_rate, seed, progress
    )


def fitted_constants(
    runner: MetricRunner,
    chosen: tuple[Head, ...],
    prompts: PromptSet,
    batch_size: int | None = None,
    steps: int = 60,
    learning_rate: float = 0.3,
    seed: int = 1,
    progress: bool | None = None,
) -> Constants:
    """Return the constants of some heads for a runner's one metric, fitted on these prompts.

    The other arguments are those of `fit_ablation`.
    """
    model = runner.model
    made = batches(prompts, model.cfg.d_vocab, batch_size, model.cfg.device)
    mean, deviation = _moments(runner, chosen, made)
    clean = _clean_logits(runner, made)
    prefixes = [PrefixCache(model, batch.tokens) for batch in made]
    for prefix in prefixes:
        prefix.advance(chosen[0].layer)

    def loss(z: Tensor) -> tuple[float, Tensor]:
        return _loss_and_gradient(runner, chosen, made, prefixes, clean, z)

    z, losses = minimised(loss, mean, deviation, steps, learning_rate, progress)
    details = {
        "metric": runner.names[0],
        "prompts": prompts.record,
        "seen": [tokens_digest(prompt) for prompt in prompts.tokens],
        "steps": len(losses) - 1,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    origin = provenance(model, **details)
    return Constants(chosen, z.float().cpu(), tuple(losses), provenance=origin)


def minimised(
    loss: Callable[[Tensor], tuple[float, Tensor]],
    start: Float[Tensor, "head d_head"],
    scale: Float[Tensor, "head"],
    steps: int,
    learning_rate: float,
    progress: bool | None = None,
) -> tuple[Float[Tensor, "head d_head"], list[float]]:
    """Return the best point that Adam finds, and the loss at each of its points, the start first.

    Args:
        loss: Returns the loss at a point, and its gradient.
        start: The first point.
        scale: The unit of a step in each row.
        steps: Largest number of steps.
        learning_rate: First step size, in these units.
        progress: Whether to show a progress bar; None: on a terminal only.
    """
    unit = scale[:, None]
    u = torch.zeros_like(start).requires_grad_()
    best, losses = start, list[float]()
    adam = torch.optim.Adam([u], lr=learning_rate)
    halving = torch.optim.lr_scheduler.ReduceLROnPlateau(
        adam, factor=0.5, patience=_PATIENCE, threshold=1e-5
    )
    for step in progress_over(range(steps + 1), "fitting constants", show=progress):
        point = start + unit * u.detach()
        value, gradient = loss(point)
        if not losses or value < min(losses):
            best = point
        losses.append(value)
        if step == steps or adam.param_groups[0]["lr"] < _LEAST_RATE * learning_rate:
            break
        u.grad = gradient * unit
        adam.step()
        halving.step(value)
    return best, losses


def _loss_and_gradient(
    runner: MetricRunner,
    chosen: tuple[Head, ...],
    made: list[Batch],
    prefixes: list[PrefixCache],
    clean: list[Tensor] | None,
    z: Float[Tensor, "head d_head"],
) -> tuple[float, Float[Tensor, "head d_head"]]:
    """Return the metric's mean over all prompts with heads' outputs replaced, and its gradient."""
    point = z.detach().clone().requires_grad_()
    hooks = list(_replacing(runner, chosen, point))
    total, n = 0.0, sum(len(batch.index) for batch in made)
    with torch.enable_grad(), weights_fixed(runner.model):
        for at, batch in enumerate(made):
            before = None
            if runner.compares:
                before = runner.logits(batch.tokens) if clean is None else clean[at]
            with prefixes[at].skipped():
                logits = runner.logits(batch.tokens, hooks, gradients=True)
            label = "the constants that were tried"
            value = differentiable(runner, logits, batch, label, before, instead=_INSTEAD)
            part = value.double().sum() / n
            part.backward()
            total += float(part.detach())
    gradient = torch.zeros_like(z) if point.grad is None else point.grad
    if not bool(gradient.isfinite().all()):
        raise MetricError(
            f"the gradient of {runner.names[0]} is not finite; with float16 it easily overflows, "
            "try bfloat16 or float32"
        )
    return total, gradient


def _replacing(
    runner: MetricRunner, chosen: tuple[Head, ...], point: Tensor
) -> Iterator[tuple[str, Any]]:
    """Yield hooks that put rows of `point` in the place of the heads' outputs."""
    for layer in sorted({head.layer for head in chosen}):
        rows = [row for row, head in enumerate(chosen) if head.layer == layer]
        columns = [chosen[row].head for row in rows]

        def replace(
            z: Tensor, hook: Any, rows: list[int] = rows, columns: list[int] = columns
        ) -> Tensor:
            whole = z.clone()
            whole[:, :, columns] = point[rows].to(z)
            return whole

        yield runner.info.hook(layer, "z"), replace


def _moments(
    runner: MetricRunner, chosen: tuple[Head, ...], made: list[Batch]
) -> tuple[Float[Tensor, "head d_head"], Float[Tensor, "head"]]:
    """Return each head's mean z over all tokens, and the root mean square deviation from it."""
    sums = torch.zeros(len(chosen), runner.info.d_head, dtype=torch.float64)
    squares = torch.zeros(len(chosen), dtype=torch.float64)

    def add(z: Tensor, hook: Any) -> None:
        for row, head in enumerate(chosen):
            if head.layer == hook.layer():
                of_head = z[:, :, head.head].detach().double().cpu()
                sums[row] += of_head.sum((0, 1))
                squares[row] += of_head.square().sum()

    hooks = [(runner.info.hook(layer, "z"), add) for layer in {head.layer for head in chosen}]
    with leaving_no_trace(runner.model):
        for batch in made:
            bridge.run_for_hooks(runner.model, batch.tokens, hooks)
    n = sum(batch.tokens.numel() for batch in made)
    mean = sums / n
    deviation = ((squares / n - mean.square().sum(1)).clamp(min=0) / mean.shape[1]).sqrt()
    # A head that always writes the same has no deviation; its constant may still be moved.
    unit = torch.where(deviation > 0, deviation, mean.abs().mean(1)).clamp(min=1e-12)
    device = runner.model.cfg.device
    return mean.float().to(device), unit.float().to(device)


def _clean_logits(runner: MetricRunner, made: list[Batch]) -> list[Tensor] | None:
    """Return the clean logits of each batch for a metric that compares with them, if they fit."""
    size = sum(4 * runner.model.cfg.d_vocab * batch.tokens.numel() for batch in made)
    if not runner.compares or size > _KEPT_BYTES:
        return None
    return [runner.logits(batch.tokens) for batch in made]


def lower_is_better(metric: Any) -> Any:
    """Return the metric. Raises MetricError if it reads attention, or is better the higher."""
    found = as_metric(metric)
    if hasattr(found, "read"):
        raise MetricError(f"{metric} reads the attention and not the logits; {_INSTEAD}")
    if isinstance(found, LogitDifference):
        raise MetricError(
            "fit_ablation minimises a metric, and a logit difference is better the higher it is; "
            "pass a function that returns its negative"
        )
    return found


def require_steps(steps: Any, learning_rate: Any) -> None:
    """Raise EditError for steps below 0, or a learning rate that is no positive number."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise EditError(f"steps must be an integer of at least 0; got {steps!r}")
    number = isinstance(learning_rate, (int, float)) and not isinstance(learning_rate, bool)
    if not number or not 0 < learning_rate < float("inf"):
        raise EditError(f"learning_rate must be a positive number; got {learning_rate!r}")
