"""Estimated effects of a screen: exact changes of z, times gradients of the metric.

effect ≈ Σ over positions of (z_edited − z_clean) · ∂metric/∂z. The change of z is exact; only what
lies downstream of the head is linear in it. The gradient is taken at the clean run, and again where
a few random heads are moved by their own exact changes: a head whose effect the clean gradient
hides (because the model repairs itself, or a softmax is saturated) is seen from there. *Ours*.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ...bridge.workers.options import Workers
from ...bridge.workers.pool import WorkerPool
from ...data.prompts import PromptSet
from ...errors import MetricError
from ...patching.fused import fused_where_exact
from ...patching.worker_pool import units_of
from ..metrics.by_name import Metric
from ..running.evaluation import MetricRunner
from ..running.gradients import ByLayer, gradients, no_slope
from ..running.inputs import Batch, batches
from .exact_changes import exact_changes
from .variants import Variant

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Gradients at randomly moved heads, beside the one at the clean run, and the share of heads moved.
MOVED_RUNS, MOVED_SHARE = 2, 0.05


def contributions(
    runner: MetricRunner,
    prompts: PromptSet,
    variants: Sequence[Variant],
    seed: int,
    batch_size: int | None = None,
    chosen: Sequence[int] | None = None,
    workers: Workers | WorkerPool | None = None,
    progress: bool | None = None,
) -> Float[Tensor, "run prompt variant"]:
    """Return each variant's estimated effect on each prompt, by each of the gradients.

    Args:
        runner: Of one metric.
        prompts: The prompts.
        variants: Each acts in one layer, ordered by layer. The result has them by their `index`,
            which must count from 0.
        seed: Random seed of the moved heads.
        batch_size: Prompts per forward pass; None: by memory.
        chosen: Indices of the prompts to estimate on, in whose order the result has them; None:
            all.
        workers: Worker processes, or a pool of them; None: this process.
        progress: Whether to show a progress bar; None: on a terminal only.

    Raises MetricError as `gradients`, for a gradient of zero on all prompts, and for estimates that
    are not finite.
    """
    job = EstimateJob(runner.metrics, prompts, batch_size, chosen, tuple(variants), seed)
    made = job.batches(runner.model)
    order = torch.cat([batch.index for batch in made]).argsort()
    units = units_of(runner.model, job, range(len(made)), "estimating", workers, progress)
    # Autograd cannot use what is computed inside torch.inference_mode.
    with torch.inference_mode(False), closing(units) as found:
        parts = dict(found)
    if not any(sloped for _, sloped in parts.values()):
        raise no_slope(runner.names[0])
    whole = torch.cat([parts[at][0] for at in range(len(made))], dim=1)[:, order]
    bad = (~whole.isfinite()).any(0).any(0)
    if bool(bad.any()):
        which = next(variant for variant in variants if bool(bad[variant.index]))
        raise MetricError(f"the estimated effect of {which.edit} is not a finite number")
    return whole


@dataclass(frozen=True)
class EstimateJob:
    """The gradients and exact changes of a screen; a unit is a batch. Attributes as above."""

    metrics: tuple[Metric, ...]
    prompts: PromptSet
    batch_size: int | None
    chosen: Sequence[int] | None
    variants: tuple[Variant, ...]
    seed: int

    def batches(self, model: TransformerBridge) -> list[Batch]:
        """Return the batches, the same in each process."""
        cfg = model.cfg
        return batches(self.prompts, cfg.d_vocab, self.batch_size, cfg.device, self.chosen)

    def start(self, model: TransformerBridge) -> Callable[[int], tuple[Tensor, bool]]:
        """Return a function that estimates on one batch, and says whether a gradient is not 0."""
        runner, made = MetricRunner(model, self.metrics), self.batches(model)

        def run(at: int) -> tuple[Float[Tensor, "run batch variant"], bool]:
            with fused_where_exact(model):
                return _of_batch(runner, made[at], self.variants, self.seed)

        return run


def _of_batch(
    runner: MetricRunner, batch: Batch, variants: Sequence[Variant], seed: int
) -> tuple[Float[Tensor, "run batch variant"], bool]:
    """Return the estimates of one batch, and whether any gradient is not zero."""
    layers = range(variants[0].edit.layers[0], runner.info.n_layers)
    clean = gradients(runner, batch, layers)
    at_clean = {layer: clean.z[layer] for layer in layers}
    moves = _random_changes(runner, batch, at_clean, variants, seed)
    found = [clean.gradient]
    for run in range(MOVED_RUNS):
        moved = _some_heads(moves, batch, run, seed)
        found.append(gradients(runner, batch, layers, moved).gradient)
    out = torch.zeros(len(found), len(batch.index), len(variants), dtype=torch.float64)

    def add(together: Sequence[Variant], change: Tensor) -> None:
        layer = together[0].edit.layers[0]
        for run, by_layer in enumerate(found):
            by_head = (
                torch.einsum("bphd, bphd -> bh", change.float(), by_layer[layer].float())
                .cpu()  # some devices have no float64
                .double()
            )
            for variant in together:
                out[run, :, variant.index] = by_head[:, variant.edit.heads_in(layer)].sum(1)

    exact_changes(runner.model, batch, at_clean, variants, add)
    return out, any(bool(part.any()) for by_layer in found for part in by_layer.values())


def _random_changes(
    runner: MetricRunner, batch: Batch, clean: ByLayer, variants: Sequence[Variant], seed: int
) -> ByLayer:
    """Return the change of z of every head under one variant of each, drawn at random."""
    from transformer_lens.utilities.statistics import derive_generator

    generator = derive_generator(seed, "screen variants")
    order = torch.randperm(len(variants), generator=generator).tolist()
    used: set[object] = set()
    drawn = []
    for place in order:
        heads = set(variants[place].edit.heads)
        if used.isdisjoint(heads):
            used |= heads
            drawn.append(variants[place])
    drawn.sort(key=lambda variant: variant.edit.layers[0])
    moves = {layer: torch.zeros_like(z) for layer, z in clean.items()}

    def keep(together: Sequence[Variant], change: Tensor) -> None:
        layer = together[0].edit.layers[0]
        heads = [head for variant in together for head in variant.edit.heads_in(layer)]
        moves[layer][:, :, heads] = change[:, :, heads].to(moves[layer].dtype)

    exact_changes(runner.model, batch, clean, drawn, keep)
    return moves


def _some_heads(moves: ByLayer, batch: Batch, run: int, seed: int) -> ByLayer:
    """Return the changes of a random share of heads, others than in the other runs and prompts."""
    from transformer_lens.utilities.statistics import derive_generator

    kept = []
    for prompt in batch.index.tolist():
        generator = derive_generator(seed, "screen moved heads", run, prompt)
        n_layers, n_heads = max(moves) + 1, next(iter(moves.values())).shape[2]
        kept.append(torch.rand(n_layers, n_heads, generator=generator) < MOVED_SHARE)
    chosen = torch.stack(kept)
    return {
        layer: z * chosen[:, layer, None, :, None].to(z.device, z.dtype)
        for layer, z in moves.items()
    }
