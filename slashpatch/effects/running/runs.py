"""Runs under conditions, whose values are written to a journal as each run is finished."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ...bridge.workers.options import Workers
from ...data.journal import Journal
from ...data.prompts import PromptSet
from ...errors import MetricError
from .conditions import Condition
from .evaluate import evaluate_each
from .evaluation import MetricRunner

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: The clean run's index in a journal.
_CLEAN = -1


def run_all(
    model: TransformerBridge,
    runner: MetricRunner,
    prompts: PromptSet,
    conditions: Sequence[Condition],
    journal: Journal | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    workers: Workers | None = None,
) -> Float[Tensor, "run prompt metric"]:
    """Return the values of the clean run, the first, and of the run under each condition.

    What the journal holds is not run again; its rows are the places of the conditions, and −1 for
    the clean run. Raises MetricError for a metric that gives several numbers per prompt.
    """
    rows: dict[int, list[float]] = {} if journal is None else journal.rows
    n_prompts = len(prompts.tokens)
    left = [place for place in range(len(conditions)) if place not in rows]
    if left or _CLEAN not in rows:
        wanted = [conditions[place] for place in left]
        runs = evaluate_each(model, runner, prompts, wanted, batch_size, progress, workers)
        for run, values in runs:
            place = _CLEAN if run == 0 else left[run - 1]
            if place in rows:
                continue
            new = {place: _one_number_each(values, runner.names).flatten().tolist()}
            if journal is None:
                rows.update(new)
            else:
                journal.write(new)
    ordered = [rows[place] for place in range(_CLEAN, len(conditions))]
    return torch.tensor(ordered, dtype=torch.float64).view(
        len(ordered), n_prompts, len(runner.names)
    )


def digest_of(labels: Sequence[str]) -> str:
    """Return a text that identifies the runs of a journal: their number and a SHA-256 prefix."""
    sha = hashlib.sha256("\n".join(labels).encode()).hexdigest()[:16]
    return f"{len(labels)} runs, {sha}"


def _one_number_each(
    values: list[Float[Tensor, "prompt _"]], names: Sequence[str]
) -> Float[Tensor, "prompt metric"]:
    """Return the values of all metrics. Raises MetricError unless each has one per prompt."""
    for name, of_metric in zip(names, values, strict=True):
        if of_metric.shape[1] != 1:
            raise MetricError(
                f"expected metrics with one number per prompt; {name} gives {of_metric.shape[1]}"
            )
    return torch.cat(values, dim=1)
