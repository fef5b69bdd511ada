"""Runs that write their result to a file, and finished rows to a journal while they run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..data.journal import Journal, require_same
from ..errors import SweepError
from .result import Result


def resumable(
    target: Path | None,
    resume: bool,
    origin: dict[str, Any],
    kind: str,
    n_rows: int,
    width: int,
    run: Callable[[Journal | None], Result],
    n_runs: int | None = None,
) -> Result:
    """Return what `run` returns for a journal of finished rows, and save it; or what was saved.

    Args:
        target: The result's file; None: nothing is written. The journal is next to it, with
            ".unfinished" after its name, and deleted at the end.
        resume: Whether to continue from such a journal, or to load a finished result.
        origin: What identifies the run.
        kind: Kind of the result.
        n_rows: Number of rows of the result.
        width: How many numbers a row of the journal has.
        run: Runs what the journal does not hold, and returns the result.
        n_runs: Number of rows of the journal, beside the clean run, whose index is −1; None: as
            many as the result has.

    Raises SweepError for a file of another run.
    """
    if target is None:
        return run(None)
    unfinished = target.with_name(target.name + ".unfinished")
    if resume and target.exists() and not unfinished.exists():
        done = Result.load(target)
        require_same(origin, done.provenance, target)
        if done.kind != kind or len(done.frame) != n_rows:
            raise SweepError(f"{str(target)!r} is not a finished {kind}; choose another file")
        return done
    indexes = range(-1, n_rows if n_runs is None else n_runs)
    with Journal(unfinished, origin, resume, indexes, width) as journal:
        result = run(journal)
        result.save(target)
        journal.remove()
    return result
