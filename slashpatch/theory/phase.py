"""Two knobs, several seeds: where slash heads emerge."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.files import TABLE_SUFFIXES, require_output, write_table
from ..data.journal import Journal
from ..data.progress import progress_over
from ..errors import TheoryError
from .settings import Settings, as_number
from .training import train

if TYPE_CHECKING:
    import pandas as pd

#: None of them is the name of a knob.
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
        offset reaches κ for good; infinite if it does not), `final_score`, `final_matching` (layer
        2's) and `final_margin`.

    Raises:
        TheoryError for a knob that is none, SweepError for an unfinished file of another diagram,
        OutputError.
    """
    base = Settings() if settings is None else settings
    as_number("kappa", kappa, 0.0, 1.0)
    if not isinstance(base, Settings):
        raise TheoryError(f"expected a Settings; got {settings!r}")
    known = [key for key in base.to_dict() if key != "seed"]
    for knob in (rows, columns):
        good = isinstance(knob, (tuple, list)) and len(knob) == 2 and knob[0] in known
        values = list(knob[1]) if good and isinstance(knob[1], Iterable) else []
        if not values or isinstance(knob[1], str):
            raise TheoryError(f"a knob is one of {', '.join(known)}, with its values; got {knob!r}")
    if rows[0] == columns[0]:
        raise TheoryError(f"two knobs are needed; got {rows[0]} twice")
    seeds = list(seeds)
    if not seeds:
        raise TheoryError("no seeds were given; expected at least one")
    if resume and path is None:
        raise TheoryError("resume goes with a path: the file whose diagram goes on")
    todo = [
        dataclasses.replace(base, **{rows[0]: row, columns[0]: column}, seed=seed)
        for row, column, seed in itertools.product(rows[1], columns[1], seeds)
    ]
    if len(set(todo)) < len(todo):
        raise TheoryError("the same settings and seed are asked for twice; leave one out")
    if path is None:
        return _frame(todo, rows[0], columns[0], _all(todo, None, kappa, progress))
    target = Path(path)
    require_output(target, TABLE_SUFFIXES)
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

    records = []
    for index, one in enumerate(todo):
        record = {row: _said(getattr(one, row)), column: _said(getattr(one, column))}
        record["seed"] = one.seed
        record |= dict(zip(_MEASURED, found[index], strict=True))
        record.setdefault("steps", one.steps)
        records.append(record)
    return pd.DataFrame(records)


def _said(value: Any) -> Any:
    """A knob's value as a table has it."""
    if value is None:
        return "default"
    return ", ".join(map(repr, value)) if isinstance(value, tuple) else value
