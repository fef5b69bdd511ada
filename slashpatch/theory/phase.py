"""Two knobs, several seeds: where slash heads emerge."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..effects.journal import Journal
from ..errors import TheoryError
from ..files import TABLE_SUFFIXES, require_writable, write_table
from ..output import require_suffix
from ..report.progress import progress_over
from .settings import Settings
from .training import train

if TYPE_CHECKING:
    import pandas as pd

_MEASURED = ("time_to_slash", "score", "matching", "margin")


def phase_diagram(
    settings: Settings | None = None,
    *,
    rows: tuple[str, Sequence[Any]] = ("cone", (0.0, 0.25, 0.5, 1.0, 2.0)),
    columns: tuple[str, Sequence[Any]] = ("frequencies", ("high", "medium", "low", "all")),
    seeds: Sequence[int] = (0, 1, 2),
    kappa: float | int = 0.3,
    path: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool | None = None,
) -> pd.DataFrame:
    """Train at every pair of values of two knobs, with several seeds.

    Args:
        settings: The others; None for the defaults.
        rows: A field of `Settings` and its values.
        columns: Another, and its values.
        seeds: Of weights and data.
        kappa: The score from which there is a slash. *Ours*.
        path: .parquet, .csv or .json to write. Finished runs stand in a file beside it until all
            are, so that a killed diagram goes on with `resume`.
        resume: Go on with what `path` has unfinished.
        progress: Whether to show a bar; when None, on a terminal only.

    Returns:
        A row per pair of values and seed: `time_to_slash` (steps until the score of the rewarded
        offset reaches κ for good; infinite if it does not), the final `score`, `matching` score
        and `margin`.

    Raises:
        TheoryError for a knob that is none, SweepError for an unfinished file of another diagram,
        OutputError.
    """
    base = settings or Settings()
    for name, values in (rows, columns):
        if name not in base.to_dict() or name == "seed" or not len(values):
            known = ", ".join(key for key in base.to_dict() if key != "seed")
            raise TheoryError(
                f"a knob is one of {known}, with its values; got {name!r}: {values!r}"
            )
    if rows[0] == columns[0]:
        raise TheoryError(f"two knobs are needed; got {rows[0]} twice")
    if not seeds:
        raise TheoryError("no seeds were given; expected at least one")
    todo = [
        dataclasses.replace(base, **{rows[0]: row, columns[0]: column}, seed=seed)
        for row, column, seed in itertools.product(rows[1], columns[1], seeds)
    ]
    if path is None:
        return _frame(todo, rows[0], columns[0], _all(todo, None, kappa, progress))
    target = require_writable(path)
    require_suffix(target, TABLE_SUFFIXES)
    runs = [{name: _listed(value) for name, value in one.to_dict().items()} for one in todo]
    header = {"kappa": kappa, "runs": runs}
    unfinished = target.with_name(target.name + ".unfinished")
    with Journal(unfinished, header, resume, range(len(todo)), len(_MEASURED)) as journal:
        frame = _frame(todo, rows[0], columns[0], _all(todo, journal, kappa, progress))
        write_table(frame, target)
        journal.remove()
    return frame


def _listed(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value


def _all(
    todo: list[Settings], journal: Journal | None, kappa: float | int, progress: bool | None
) -> dict[int, list[float]]:
    found = {} if journal is None else journal.rows
    left = [index for index in range(len(todo)) if index not in found]
    for index in progress_over(left, "training", show=progress):
        run = train(todo[index], progress=False)
        last = run.rows[-1]
        new = {index: [float(run.time_to(kappa)), run.score, last["matching"], last["margin"]]}
        if journal is None:
            found.update(new)
        else:
            journal.write(new)
    return found


def _frame(
    todo: list[Settings], row: str, column: str, found: dict[int, list[float]]
) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(
        [
            {
                row: _said(getattr(one, row)),
                column: _said(getattr(one, column)),
                "seed": one.seed,
                **dict(zip(_MEASURED, found[index], strict=True)),
                "steps": one.steps,
            }
            for index, one in enumerate(todo)
        ]
    )


def _said(value: Any) -> Any:
    return ", ".join(f"{one:g}" for one in value) if isinstance(value, tuple) else value
