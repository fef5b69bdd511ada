"""Zero, mean, resample and optimal ablation of the same heads, in one table."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..bridge.workers.options import Workers
from ..data.files import require_output
from ..data.heads import HeadsLike
from ..data.prompts import PromptSet
from ..edits import AblateHeads, Constants
from ..errors import EditError, PromptError
from .fit_ablation import fitted_constants, lower_is_better, require_steps
from .measure import measure
from .metrics.by_name import as_metric
from .result import Result
from .running.conditions import require_options
from .running.evaluation import MetricRunner
from .running.inputs import prompts_for

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: The fewest prompts for the fit, and for what is measured.
_LEAST = 2


def ablations(
    model: TransformerBridge,
    wanted: HeadsLike,
    metrics: Any = ("loss", "kl"),
    prompts: Any = None,
    *,
    fit_metric: Any = None,
    constants: Constants | None = None,
    constants_path: str | os.PathLike[str] | None = None,
    random_tokens: bool = False,
    n_prompts: int = 16,
    n_fit: int = 8,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    steps: int = 60,
    learning_rate: float = 0.3,
    confidence: float = 0.95,
    seed: int = 0,
    progress: bool | None = None,
    workers: int | str | Workers | None = None,
) -> Result:
    """Measure zero, mean, resample and optimal ablation of some heads, ablated together.

    The constants of optimal ablation are fitted on some of the prompts (see `fit_ablation`), and
    all four ablations are measured on the others. With metrics where lower is better, optimal
    ablation has the smallest effect, up to what the fit's prompts have of their own.

    Args:
        model: A TransformerBridge; active patches are part of the clean run.
        wanted: Query heads.
        metrics: As for `measure`.
        prompts: As for `measure`; yours are split, those of the fit drawn at random.
        fit_metric: What the fit minimises; None: the first metric.
        constants: Constants that were fitted before, on other prompts; None: fit them.
        constants_path: A .safetensors file to write the fitted constants to; the edit in the table
            then prints as it can be typed.
        random_tokens: Use uniform random tokens instead of natural text.
        n_prompts: Number of prompts to measure on, which are the unit of the intervals.
        n_fit: Number of prompts for the fit. Prompts of your own are shared out in this ratio.
        max_tokens: Length of generated prompts, at most the model's context; None: 65, or the
            context if that is shorter.
        batch_size: Prompts per forward pass; None: by memory.
        steps: Largest number of steps of the fit.
        learning_rate: As for `fit_ablation`.
        confidence: Level of the intervals.
        seed: Random seed of prompts, their split, bootstrap resamples and sign flips.
        progress: Whether to show progress bars; None: on a terminal only.
        workers: Number of worker processes that measure, or a `Workers`; the fit stays here.

    Returns:
        A Result of kind "measure": rows for the four ablations. Mean and resample ablation take
        their reference from natural text, or from random tokens if the prompts are random.
        `tables["fit"]` has the metric at each step of the fit.

    Raises:
        EditError: Heads that the constants were not fitted for.
        HeadError: Heads that the model does not have.
        MetricError: A metric that is misspelt, or one to fit that has no gradient.
        OutputError: A path that cannot be written.
        PromptError: Fewer than 4 prompts, or prompts that are empty or longer than the context.
    """
    require_options(seed, confidence, n_prompts=n_prompts, n_fit=n_fit, batch_size=batch_size)
    require_steps(steps, learning_rate)
    require_output(None if constants_path is None else Path(constants_path), (".safetensors",))
    several = metrics if isinstance(metrics, (list, tuple)) else [metrics]
    measured = [as_metric(metric) for metric in several]
    runner = MetricRunner(model, measured)
    fitter = MetricRunner(
        model, [lower_is_better(measured[0] if fit_metric is None else fit_metric)]
    )
    chosen = tuple(sorted(runner.info.require(wanted)))
    if not chosen:
        raise EditError("ablations needs at least one head; got none")
    drawn = prompts_for(
        model,
        [*measured, *fitter.metrics],
        prompts,
        random_tokens=random_tokens,
        n_prompts=n_prompts if constants is not None else n_prompts + n_fit,
        max_tokens=max_tokens,
        default=65,
        seed=seed,
    )
    held_out = drawn
    if constants is None:
        fitted_on, held_out = _split(drawn, n_fit / (n_fit + n_prompts), seed)
        constants = fitted_constants(
            fitter, chosen, fitted_on, batch_size, steps, learning_rate, seed, progress
        )
        if constants_path is not None:
            constants.save(constants_path)
    reference = "random" if prompts is None and drawn.source.startswith("random") else "natural"
    edits = [
        AblateHeads(chosen),
        AblateHeads(chosen, "mean", reference, seed),
        AblateHeads(chosen, "resample", reference, seed),
        AblateHeads(chosen, "optimal", constants=constants),
    ]
    result = measure(
        model,
        edits,
        several,
        list(held_out.tokens),
        batch_size=batch_size,
        confidence=confidence,
        seed=seed,
        progress=progress,
        workers=workers,
    )
    return _with_fit(result, held_out, constants)


def _split(prompts: PromptSet, share: float, seed: int) -> tuple[PromptSet, PromptSet]:
    """Return a random share of the prompts for the fit, and the others.

    Prompts that are equal go to the same side. Raises PromptError for fewer than 2 on one side.
    """
    from transformer_lens.utilities.statistics import derive_generator

    same: dict[tuple[int, ...], list[int]] = {}
    for index, tokens in enumerate(prompts.tokens):
        same.setdefault(tuple(tokens.tolist()), []).append(index)
    groups = list(same.values())
    order = torch.randperm(len(groups), generator=derive_generator(seed, "fit and held out"))
    n_fit = min(max(round(share * len(groups)), _LEAST), len(groups) - _LEAST)
    if n_fit < _LEAST:
        raise PromptError(
            f"{len(groups)} different prompts cannot be split into those of the fit and those to "
            f"measure on; expected at least {2 * _LEAST}"
        )
    parts = []
    for places, name in ((order[:n_fit], "of the fit"), (order[n_fit:], "held out")):
        indexes = sorted(index for place in places.tolist() for index in groups[place])
        rows = tuple(prompts.tokens[index] for index in indexes)
        parts.append(PromptSet(rows, f"{prompts.source}, {name}"))
    return parts[0], parts[1]


def _with_fit(result: Result, measured_on: PromptSet, constants: Constants) -> Result:
    """Return the result with the steps of the fit, and with where the prompts came from."""
    import pandas as pd

    fit = constants.provenance
    steps = pd.DataFrame({"step": range(len(constants.losses)), "value": constants.losses})
    origin = {
        **result.provenance,
        "prompts": measured_on.record,
        "fit": {key: fit.get(key) for key in ("metric", "prompts", "learning_rate", "seed")},
    }
    remarks = list(result.remarks)
    if constants.losses:
        n = fit.get("prompts", {}).get("n", "?")
        remarks.append(
            f"on the {n} prompts of the fit, {fit.get('metric')} was {constants.losses[0]:.4f} "
            f"under mean ablation and {min(constants.losses):.4f} at the best of "
            f"{len(constants.losses) - 1} steps"
            + (", and still falling: more steps may find better" if _falling(constants) else "")
        )
    tables = {**result.tables, "fit": steps}
    return dataclasses.replace(result, tables=tables, remarks=tuple(remarks), provenance=origin)


def _falling(constants: Constants) -> bool:
    """Return whether the last tenth of the steps still lowered the metric by over 1 % of the way.

    The limit is *ours*.
    """
    losses = constants.losses
    before = min(losses[: max(1, len(losses) - len(losses) // 10 - 1)])
    return before - min(losses) > 0.01 * (losses[0] - min(losses))
