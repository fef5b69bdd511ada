"""The forward passes of a sweep: grouped by layer, each started from the cached residual stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ...bridge.prefix_cache import PrefixCache
from ...bridge.workers.options import Workers
from ...bridge.workers.pool import WorkerPool
from ...data.journal import Journal
from ...data.prompts import PromptSet
from ...edits import Edit
from ...errors import MetricError
from ...patching.patch import patch
from ...patching.worker_pool import units_of
from ..metrics.by_name import Metric
from ..running.conditions import Condition
from ..running.evaluation import MetricRunner, RunOutputs
from ..running.inputs import Batch, batches
from .batch_rows import OnRows
from .variants import Variant

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


#: Bytes that one layer's patterns, or the logits, of variants in one forward pass may take.
_SHARED_BYTES = 512 * 2**20

#: The unit, and the index, of the clean run.
CLEAN = -1
#: Bytes of residual streams that the clean run may cache; above this, each is computed when needed.
_AHEAD_BYTES = 1024 * 2**20


class SweepRun:
    """A sweep's variants in groups that share a pass, and their rows as they are finished.

    Args:
        chosen: Indices of the prompts to run; None: all.

    Attributes:
        groups: Neighbouring variants of one layer, each group with one forward pass for a batch.
    """

    def __init__(
        self,
        model: TransformerBridge,
        runner: MetricRunner,
        prompts: PromptSet,
        variants: list[Variant],
        batch_size: int | None = None,
        per_pass: int | None = None,
        chosen: Sequence[int] | None = None,
    ) -> None:
        self.model, self.runner = model, runner
        made = batches(prompts, model.cfg.d_vocab, batch_size, model.cfg.device, chosen)
        self.groups = _groups(variants, per_pass or _default_per_pass(model, runner, made))
        self.order = torch.cat([batch.index for batch in made]).argsort()
        size = 4 * model.cfg.d_model * sum(batch.tokens.numel() for batch in made)
        layers = {variant.edit.layers[0] for variant in variants}
        ahead = layers if len(layers) * size <= _AHEAD_BYTES else set()
        self.job = SweepJob(
            runner.metrics, prompts, batch_size, self.groups, frozenset(ahead), chosen
        )

    def all(
        self,
        journal: Journal | None,
        workers: Workers | WorkerPool | None = None,
        progress: bool | None = None,
    ) -> dict[int, list[float]]:
        """Run all variants that the journal does not hold yet.

        Returns the values [prompt] of each variant by its index; −1 is the clean run.
        """
        rows = {} if journal is None else journal.rows
        # In the order of layers, so that cached residual streams only move forward.
        left = [
            place
            for place, group in enumerate(self.groups)
            if not all(variant.index in rows for variant in group)
        ]
        places = left if -1 in rows else [CLEAN, *left]
        sizes = [1 if place == CLEAN else len(self.groups[place]) for place in places]
        units = units_of(self.model, self.job, places, "sweeping", workers, progress, sizes)
        with closing(units) as found:
            for _, parts in found:
                # A run that was killed may have written a part of this group: those rows stay.
                self._write(rows, journal, {i: v for i, v in parts.items() if i not in rows})
        return rows

    def _write(
        self, rows: dict[int, list[float]], journal: Journal | None, parts: dict[int, list[Tensor]]
    ) -> None:
        """Add the values of some variants, given batch by batch, to the journal or to `rows`."""
        new = {}
        for index, values_by_batch in parts.items():
            values = torch.cat(values_by_batch)[self.order]
            if values.shape[1] != 1:
                raise MetricError(
                    f"expected a metric with one number per prompt; {self.runner.names[0]} gives "
                    f"{values.shape[1]}"
                )
            new[index] = values[:, 0].tolist()
        if journal is None:
            rows.update(new)
        else:
            journal.write(new)


def _default_per_pass(model: TransformerBridge, runner: MetricRunner, made: list[Batch]) -> int:
    """Return the number of variants that fit memory together; 1 on the CPU."""
    if torch.device(model.cfg.device).type == "cpu":
        return 1
    rows, n_pos = max((batch.tokens.shape for batch in made), key=lambda s: s[0] * s[1])
    pattern = 4 * rows * runner.info.n_heads * n_pos**2
    logits = 4 * rows * n_pos * model.cfg.d_vocab
    return max(1, _SHARED_BYTES // max(pattern, logits))


def _groups(variants: list[Variant], per_pass: int) -> list[list[Variant]]:
    """Return groups of neighbouring variants of one layer, each of which shares a pass.

    Does not depend on what a journal holds, so that a resumed sweep rounds in the same way.
    """
    groups: list[list[Variant]] = []
    for variant in variants:
        last = groups[-1] if groups else []
        can_share = (
            0 < len(last) < per_pass
            and last[0].edit.layers == variant.edit.layers
            and not any(edit.uses_per_head_keys for edit in (last[0].edit, variant.edit))
        )
        if can_share:
            last.append(variant)
        else:
            groups.append([variant])
    return groups


@dataclass(frozen=True)
class SweepJob:
    """The forward passes of a sweep. Unit −1 is the clean run, the others are groups of variants.

    Attributes:
        metrics: The one metric.
        prompts: The prompts, of which each process makes the same batches.
        batch_size: As for `sweep`.
        groups: Variants that share a pass.
        ahead: Layers whose input the clean run caches; that of others is computed when needed.
        chosen: Indices of the prompts to run; None: all.
    """

    metrics: tuple[Metric, ...]
    prompts: PromptSet
    batch_size: int | None
    groups: list[list[Variant]]
    ahead: frozenset[int]
    chosen: Sequence[int] | None = None

    def start(self, model: TransformerBridge) -> Callable[[int], dict[int, list[Tensor]]]:
        """Return a function that runs a unit; values by a variant's index, one tensor a batch."""
        return _Passes(model, self).run


class _Passes:
    """The passes of a sweep in one process, with its cached residual streams."""

    def __init__(self, model: TransformerBridge, job: SweepJob) -> None:
        self.model, self.job = model, job
        self.runner = MetricRunner(model, job.metrics)
        self.batches = batches(
            job.prompts, model.cfg.d_vocab, job.batch_size, model.cfg.device, job.chosen
        )
        self._start_again()

    def _start_again(self) -> None:
        """Run the clean run, and cache the residual streams of later layers."""
        self.prefixes = [PrefixCache(self.model, batch.tokens) for batch in self.batches]
        self.clean = []
        for prefix, batch in zip(self.prefixes, self.batches, strict=True):
            with prefix.keeping(self.job.ahead):
                self.clean.append(self.runner.run(batch, None, Condition()))

    def run(self, place: int) -> dict[int, list[Tensor]]:
        """Return the values of a group of variants, or of the clean run."""
        if place == CLEAN:
            return {CLEAN: [values for (values,), _ in self.clean]}
        group = self.job.groups[place]
        layer = group[0].edit.layers[0]
        if layer < self.prefixes[0].layer:  # another worker ended before it finished this group
            self._start_again()
        parts: dict[int, list[Tensor]] = {variant.index: [] for variant in group}
        for prefix, batch, (_, outputs) in zip(
            self.prefixes, self.batches, self.clean, strict=True
        ):
            prefix.advance(layer)
            of_group = self._run(prefix, batch, outputs, group)
            for variant, values in zip(group, of_group, strict=True):
                parts[variant.index].append(values)
        return parts

    def _run(
        self, prefix: PrefixCache, batch: Batch, clean: RunOutputs, group: list[Variant]
    ) -> list[Float[Tensor, "batch _"]]:
        """Return the values of each variant of a group, on one batch."""
        n, size = len(group), len(batch.index)
        if n == 1:
            edits: list[Edit] = [group[0].edit]
        else:
            edits = [
                OnRows(variant.edit.heads, variant.edit, place * size, (place + 1) * size)
                for place, variant in enumerate(group)
            ]
        label = group[0].edit if n == 1 else f"{group[0].edit} to {group[-1].edit}"
        with ExitStack() as stack:
            stack.enter_context(patch(self.model, *edits))
            stack.enter_context(prefix.skipped(n))
            (values,), _ = self.runner.run(
                batch.repeated(n), clean.repeated(n), label, from_layer=prefix.layer
            )
        return list(values.split(size))
