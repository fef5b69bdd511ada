"""Predicted against measured steps and offsets, over settings drawn at random (*ours*)."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import TheoryError
from .data import seeded
from .many_runs import Measured, Table, cell, table_of_runs
from .prediction import predict
from .run import Run, Slash, read_slash
from .settings import Settings, as_integer, as_number

if TYPE_CHECKING:
    import pandas as pd

_COMPARED = (
    *(f"{by}_{name}" for by in ("measured", "predicted", "closed_form") for name in Slash._fields),
    "fastest_rate",
)
#: The settings that are drawn.
_DRAWN = ("cone", "frequencies", "n_pairs", "base", "vocabulary", "length", "segment", "offset",
          "learning_rate")  # fmt: skip


def draw_settings(n: int, seed: int, steps: int = 1000) -> list[Settings]:
    """Return n settings of the copying task, drawn at random.

    Cone uniform in [0, 2]; learning rate log-uniform in [5, 40]; offset 1 to 4; segment 6 to 12;
    length from twice the segment to 64; vocabulary from four times the segment to 64. Half of the
    settings have a named band (all, high, medium, low) of 6 to 24 pairs with a base log-uniform in
    [100, 10⁵], half have 1 to 12 frequencies θ log-uniform in [0.01, π]. All others are the
    defaults. The ranges are *ours*. Raises TheoryError for n below 1.
    """
    n = as_integer("n", n, 1, 10**6)
    return [_draw(seeded(seed, "settings", index), steps) for index in range(n)]


def _draw(generator: torch.Generator, steps: int) -> Settings:
    def uniform(low: float, high: float) -> float:
        drawn = torch.rand((), generator=generator, dtype=torch.float64).item()
        return low + (high - low) * drawn

    def log_uniform(low: float, high: float) -> float:
        return math.exp(uniform(math.log(low), math.log(high)))

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    segment = integer(6, 12)
    knobs: dict[str, Any] = {
        "cone": uniform(0.0, 2.0),
        "learning_rate": log_uniform(5.0, 40.0),
        "offset": integer(1, 4),
        "segment": segment,
        "length": integer(2 * segment, 64),
        "vocabulary": integer(4 * segment, 64),
        "steps": steps,
    }
    if integer(0, 1):
        knobs["frequencies"] = ("all", "high", "medium", "low")[integer(0, 3)]
        knobs["n_pairs"] = integer(6, 24)
        knobs["base"] = log_uniform(1e2, 1e5)
    else:
        thetas = [log_uniform(0.01, math.pi) for _ in range(integer(1, 12))]
        knobs["frequencies"] = tuple(sorted(thetas, reverse=True))
    return Settings(**knobs)


def compare(
    settings: Sequence[Settings],
    *,
    seeds: Iterable[int] = (0, 1, 2),
    kappa: float | int = 0.5,
    path: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Train a model for each of the settings and seeds, and predict each without training.

    Args:
        settings: The settings, whose own seeds are ignored; see `draw_settings`.
        seeds: Seeds of initial weights and data.
        kappa: The slash score from which there is a slash. *Ours*.
        path: A .parquet, .csv or .json file to write. Until all runs are finished, they are in a
            file beside it, from which `resume` continues.
        resume: Continue the unfinished file beside `path`.
        progress: Whether to show a progress bar; None: on a terminal only.

    Returns:
        A row for each of the settings and seeds: `setting` (its index), `seed`, and the settings
        that `draw_settings` draws. Then `step`, `first_step`, `offset` and `final_offset` of
        `slashpatch.theory.Slash`: measured in training (`measured_step`, …), predicted
        (`predicted_step`, …) and by the closed form (`closed_form_step`, …). Steps are infinite,
        and offsets NaN, where there is no slash. `fastest_rate` is the largest of
        `Prediction.rates`.

    Raises:
        TheoryError: No or invalid settings, those that `predict` refuses, or the same run twice.
        SweepError: An unfinished file of another comparison.
        OutputError: A path that cannot be written.
    """
    kappa = as_number("kappa", kappa, 0.0, 1.0)
    given, seeds = list(settings), list(seeds)
    if not given or not seeds or not all(isinstance(one, Settings) for one in given):
        raise TheoryError(
            "compare needs a list of Settings and at least one seed; got "
            f"{len(given)} settings and {len(seeds)} seeds"
        )
    for one in given:
        predict(dataclasses.replace(one, steps=0), kappa=kappa)  # refuses what cannot be predicted
    todo = [dataclasses.replace(one, seed=seed) for one in given for seed in seeds]
    if len(set(todo)) < len(todo):
        raise TheoryError("two runs have the same settings and seed; leave one of them out")

    def measure(run: Run) -> list[float]:
        found = predict(run.settings, kappa=kappa)
        seen = read_slash(run.rows, run.settings.offset, kappa)
        numbers = [
            -1.0 if value is None else float(value)
            for slash in (seen, found.slash, found.closed_form)
            for value in slash
        ]
        return [*numbers, max(found.rates)]

    def build(measured: Measured) -> pd.DataFrame:
        import pandas as pd

        records = []
        for index, run in enumerate(todo):
            record: dict[str, Any] = {"setting": index // len(seeds), "seed": run.seed}
            record |= {name: cell(getattr(run, name)) for name in _DRAWN}
            for name, number in zip(_COMPARED, measured[index], strict=True):
                none = name.endswith("offset") and number < 0
                record[name] = math.nan if none else number
            records.append(record)
        return pd.DataFrame(records)

    header = {"comparison": "of predicted and measured steps", "kappa": kappa}
    return table_of_runs(
        todo, Table(header, len(_COMPARED), measure, build), path, resume, progress
    )
