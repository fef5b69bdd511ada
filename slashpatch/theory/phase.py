"""Where slash heads emerge: training over a grid of two settings, with several seeds."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..errors import TheoryError
from .many_runs import Measured, Table, cell, table_of_runs
from .run import Run
from .settings import Settings, as_number

if TYPE_CHECKING:
    import pandas as pd

#: Columns of measurements; none has the name of a setting.
_MEASURED = ("time_to_slash", "final_score", "final_matching", "final_margin")


def phase_diagram(
    settings: Settings | None = None,
    *,
    rows: tuple[str, Iterable[Any]] = ("cone", (0.0, 0.25, 0.5, 1.0, 2.0)),
    columns: tuple[str, Iterable[Any]] = ("frequencies", ("high", "medium", "low", "all")),
    seeds: Iterable[int] = (0, 1, 2),
    kappa: float | int = 0.3,
    path: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Train a model for every combination of the values of two settings, with several seeds.

    Args:
        settings: All other settings; None for the defaults.
        rows: The name of a field of `Settings`, and its values.
        columns: The name of another field, and its values.
        seeds: Seeds of initial weights and data.
        kappa: The slash score from which there is a slash. *Ours*.
        path: A .parquet, .csv or .json file to write. Until all runs are finished, they are in a
            file beside it, from which `resume` continues.
        resume: Continue the unfinished file beside `path`.
        progress: Whether to show a progress bar; None: on a terminal only.

    Returns:
        A row for each pair of values and seed. `time_to_slash` is the number of steps until the
        slash score at the task's offset reaches κ and stays there (infinite if it does not);
        `final_score` that score after training; `final_matching` the attention of layer 2 to the
        answer; `final_margin` the margin of the predicted profile (see `Run.history`).

    Raises:
        TheoryError: An unknown setting or value.
        SweepError: An unfinished file of another diagram.
        OutputError: A path that cannot be written.
    """
    base = Settings() if settings is None else settings
    as_number("kappa", kappa, 0.0, 1.0)
    if not isinstance(base, Settings):
        raise TheoryError(f"settings is a Settings or None; got {settings!r}")
    known = [key for key in base.to_dict() if key != "seed"]
    for knob in (rows, columns):
        valid = isinstance(knob, (tuple, list)) and len(knob) == 2 and knob[0] in known
        values = list(knob[1]) if valid and isinstance(knob[1], Iterable) else []
        if not values or isinstance(knob[1], str):
            raise TheoryError(
                f"rows and columns need one of the settings {', '.join(known)}, and its values; "
                f"got {knob!r}"
            )
    if rows[0] == columns[0]:
        raise TheoryError(f"rows and columns need different settings; got {rows[0]} twice")
    seeds = list(seeds)
    if not seeds:
        raise TheoryError("no seeds were given; expected at least one")
    todo = [
        dataclasses.replace(base, **{rows[0]: row, columns[0]: column}, seed=seed)
        for row, column, seed in itertools.product(rows[1], columns[1], seeds)
    ]
    if len(set(todo)) < len(todo):
        raise TheoryError("two runs have the same settings and seed; leave one of them out")

    def read(run: Run) -> list[float]:
        last = run.rows[-1]
        return [float(run.time_to(kappa)), run.score, last["matching"], last["margin"]]

    def frame(measured: Measured) -> pd.DataFrame:
        return _frame(todo, rows[0], columns[0], measured)

    table = Table({"kappa": kappa}, len(_MEASURED), read, frame)
    return table_of_runs(todo, table, path, resume, progress)


def _frame(todo: list[Settings], row: str, column: str, measured: Measured) -> pd.DataFrame:
    import pandas as pd

    records = []
    for index, run in enumerate(todo):
        record = {row: cell(getattr(run, row)), column: cell(getattr(run, column))}
        record["seed"] = run.seed
        record |= dict(zip(_MEASURED, measured[index], strict=True))
        record.setdefault("steps", run.steps)
        records.append(record)
    return pd.DataFrame(records)
