"""Train many runs into one table, resumable."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.files import TABLE_SUFFIXES, require_output, write_table
from ..data.journal import Journal
from ..data.progress import progress_over
from ..errors import TheoryError
from .run import Run
from .settings import Settings
from .training import train

if TYPE_CHECKING:
    import pandas as pd

#: What was measured of each run, by its index.
Measured = dict[int, list[float]]


@dataclass(frozen=True)
class Table:
    """What a table of runs holds.

    Attributes:
        header: JSON values that, with the settings of all runs, identify the table.
        width: How many numbers are measured of a run.
        measure: Returns them.
        build: Returns the table of all runs.
    """

    header: dict[str, Any]
    width: int
    measure: Callable[[Run], list[float]]
    build: Callable[[Measured], pd.DataFrame]


def table_of_runs(
    todo: list[Settings],
    table: Table,
    path: str | os.PathLike[str] | None,
    resume: bool,
    progress: bool | None,
) -> pd.DataFrame:
    """Train the runs, and return their table; write it to `path` too.

    Finished runs are in a file beside `path` until all are, and `resume` continues that file.
    Raises TheoryError for `resume` without a path, SweepError for an unfinished file of other runs,
    OutputError for a path that cannot be written.
    """
    if path is None:
        if resume:
            raise TheoryError("resume needs a path: the file whose table is to be continued")
        return table.build(_train_all(todo, table, None, progress))
    target = Path(path)
    require_output(target, TABLE_SUFFIXES)
    runs = [{name: _as_json(value) for name, value in run.to_dict().items()} for run in todo]
    header = {**table.header, "runs": runs}
    unfinished = target.with_name(target.name + ".unfinished")
    with Journal(unfinished, header, resume, range(len(todo)), table.width) as journal:
        frame = table.build(_train_all(todo, table, journal, progress))
        write_table(frame, target)
        journal.remove()
    return frame


def _train_all(
    todo: list[Settings], table: Table, journal: Journal | None, progress: bool | None
) -> Measured:
    """Train the runs that the journal does not have; return the measurements of all by index."""
    finished = {} if journal is None else journal.rows
    left = [index for index in range(len(todo)) if index not in finished]
    for index in progress_over(left, "training", show=progress):
        new = {index: table.measure(train(todo[index], progress=False))}
        if journal is None:
            finished.update(new)
        else:
            journal.write(new)
    return finished


def _as_json(value: Any) -> Any:
    """Return a value as JSON returns it: tuples become lists."""
    return list(value) if isinstance(value, tuple) else value


def cell(value: Any) -> Any:
    """Return a setting's value as a cell of a table."""
    if value is None:
        return "default"
    return ", ".join(map(repr, value)) if isinstance(value, tuple) else value
