"""Run a model with and without edits on the same prompts, in this process or in workers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ...bridge.workers.options import Workers
from ...data.prompts import PromptSet
from ...errors import MetricError
from ...patching.patch import patch
from ...patching.worker_pool import units_of
from ..metrics.by_name import Metric
from .conditions import Condition
from .evaluation import MetricRunner, RunOutputs
from .inputs import Batch, batches

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Bytes that the clean logits may take while they wait to be compared with edited ones.
_KEPT_BYTES = 1024 * 2**20
#: Units for each worker, so that none waits long for the last one.
_UNITS = 4


def evaluate(
    model: TransformerBridge,
    runner: MetricRunner,
    prompts: PromptSet,
    edited: Sequence[Condition],
    batch_size: int | None = None,
    progress: bool | None = None,
    workers: Workers | None = None,
) -> list[list[Float[Tensor, "prompt _"]]]:
    """Return the values of each metric in the clean run and under each condition, in this order.

    All runs are on the same prompts, so values are paired by prompt.
    """
    each = dict(evaluate_each(model, runner, prompts, edited, batch_size, progress, workers))
    return [each[run] for run in range(len(each))]


def evaluate_each(
    model: TransformerBridge,
    runner: MetricRunner,
    prompts: PromptSet,
    edited: Sequence[Condition],
    batch_size: int | None = None,
    progress: bool | None = None,
    workers: Workers | None = None,
) -> Iterator[tuple[int, list[Float[Tensor, "prompt _"]]]]:
    """Yield (index, values of each metric) of each run as it is finished; the clean run is 0."""
    all_batches = batches(prompts, model.cfg.d_vocab, batch_size, model.cfg.device)
    runs = (Condition(), *edited)
    chunks = list(_chunks(all_batches, runner.compares, model.cfg.d_vocab))
    at_least = None if workers is None else _UNITS * workers.count
    units = list(_units(chunks, len(runs), runner.compares, at_least))
    job = _EvaluateJob(runner.metrics, prompts, runs, batch_size, units)
    order = torch.cat([batch.index for batch in all_batches]).argsort()
    parts: dict[int, dict[int, list[Tensor]]] = {}
    sizes = [len(unit.runs) for unit in units]
    with closing(
        units_of(model, job, range(len(units)), "measuring", workers, progress, sizes)
    ) as found:
        for _, values in found:
            for (run, at), of_batch in values.items():
                parts.setdefault(run, {})[at] = of_batch
            for run in [run for run, done in parts.items() if len(done) == len(all_batches)]:
                done = parts.pop(run)
                yield (
                    run,
                    [
                        _joined([done[at][metric] for at in range(len(done))], name)[order]
                        for metric, name in enumerate(runner.names)
                    ],
                )


class _Unit(NamedTuple):
    """Neighbouring batches, and the runs that they go through; the clean run is 0."""

    batches: range
    runs: range


@dataclass(frozen=True)
class _EvaluateJob:
    """The passes of a measurement.

    Attributes:
        metrics: The metrics.
        prompts: The prompts, of which each process makes the same batches.
        runs: The clean run, and the conditions.
        batch_size: As for `measure`.
        units: The units.
    """

    metrics: tuple[Metric, ...]
    prompts: PromptSet
    runs: tuple[Condition, ...]
    batch_size: int | None
    units: list[_Unit]

    def start(
        self, model: TransformerBridge
    ) -> Callable[[int], dict[tuple[int, int], list[Tensor]]]:
        """Return a function that runs a unit; values by (run, batch), one tensor a metric."""
        runner = MetricRunner(model, self.metrics)
        all_batches = batches(self.prompts, model.cfg.d_vocab, self.batch_size, model.cfg.device)
        return partial(self._run, runner, all_batches, {})

    def _run(
        self,
        runner: MetricRunner,
        all_batches: list[Batch],
        clean: dict[int, tuple[list[Tensor], RunOutputs]],
        index: int,
    ) -> dict[tuple[int, int], list[Tensor]]:
        unit = self.units[index]
        for at in set(clean) - set(unit.batches):
            del clean[at]
        for at in unit.batches:
            if at not in clean and (0 in unit.runs or runner.compares):
                clean[at] = runner.run(all_batches[at], None, self.runs[0])
        found: dict[tuple[int, int], list[Tensor]] = {}
        for run in unit.runs:
            if run == 0:
                found |= {(0, at): clean[at][0] for at in unit.batches}
                continue
            with patch(runner.model, *self.runs[run].edits):
                for at in unit.batches:
                    outputs = clean[at][1] if runner.compares else RunOutputs(None, {})
                    found[run, at], _ = runner.run(all_batches[at], outputs, self.runs[run])
        return found


def _units(
    chunks: list[range], n_runs: int, compares: bool, at_least: int | None
) -> Iterator[_Unit]:
    """Yield the units of a measurement, those of a chunk of batches after one another.

    `at_least` is how many there should be; None: each run of a chunk is one, for this process.
    Where a metric compares with the clean run, each worker must run that for its batches, so
    batches are split first, and runs only if that is not enough. Else runs are, since edits may
    need passes of their own before they act.
    """
    size, n_blocks = max(map(len, chunks)), n_runs
    if at_least is not None:
        n_batches = sum(map(len, chunks))
        n_groups = min(n_batches, at_least if compares else math.ceil(at_least / n_runs))
        size = math.ceil(n_batches / n_groups)
        n_blocks = min(n_runs, math.ceil(at_least / n_groups)) if compares else n_runs
    block = math.ceil(n_runs / n_blocks)
    for chunk in chunks:
        for start in range(chunk.start, chunk.stop, size):
            for first in range(0, n_runs, block):
                runs = range(first, min(first + block, n_runs))
                yield _Unit(range(start, min(start + size, chunk.stop)), runs)


def _chunks(all_batches: list[Batch], compares: bool, d_vocab: int) -> Iterator[range]:
    """Yield places of neighbouring batches whose clean logits fit memory together.

    All at once if no metric compares.
    """
    start = size = 0
    for at, batch in enumerate(all_batches):
        of_batch = 4 * d_vocab * batch.tokens.numel() if compares else 0
        if at > start and size + of_batch > _KEPT_BYTES:
            yield range(start, at)
            start, size = at, 0
        size += of_batch
    yield range(start, len(all_batches))


def _joined(parts: list[Tensor], name: str) -> Float[Tensor, "prompt _"]:
    """Return a metric's values of all batches. Raises MetricError if their numbers differ."""
    widths = {part.shape[1] for part in parts}
    if len(widths) > 1:
        raise MetricError(
            f"the metric {name} gave {min(widths)} numbers for one prompt and {max(widths)} for "
            "another; use prompts of one length, for example with max_tokens"
        )
    return torch.cat(parts)
