"""Progress bars and spinners on stderr, shown on terminals only."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")

_hidden: ContextVar[bool] = ContextVar("slashpatch_hidden_progress", default=False)
_title: ContextVar[str] = ContextVar("slashpatch_progress_title", default="")


@contextmanager
def under_title(title: str) -> Iterator[None]:
    """Put a title before those of the bars inside: which step of a long run they belong to."""
    token = _title.set(f"{title}: ")
    try:
        yield
    finally:
        _title.reset(token)


@contextmanager
def without_progress() -> Iterator[None]:
    """Show no bars and spinners inside, where another display is on the terminal already."""
    token = _hidden.set(True)
    try:
        yield
    finally:
        _hidden.reset(token)


def progress_over(
    items: Sequence[T], what: str, show: bool | None = None, n: Sequence[int] | None = None
) -> Iterator[T]:
    """Yield the items while a progress bar shows the time left.

    `n` is how much each item counts. The bar is shown if `show` is True, or if it is None and
    stderr is a terminal; it is erased at the end.
    """
    if _hidden.get() or not (sys.stderr.isatty() if show is None else show):
        yield from items
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    weights = [1] * len(items) if n is None else list(n)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(_title.get() + what, total=sum(weights))
        for item, weight in zip(items, weights, strict=True):
            yield item
            bar.advance(task, weight)


class WorkersBar:
    """A progress bar with the workers that are alive, rows per second, and the time left.

    Args:
        what: Its title.
        total: Number of rows.
        n_workers: How many workers were asked for.
        show: Whether to show it; None: if stderr is a terminal.
    """

    def __init__(self, what: str, total: int, n_workers: int, show: bool | None = None) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._n_workers = n_workers
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[workers]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=terminal() if show is None else _stderr_shown(),
            transient=True,
            disable=_hidden.get() or not (sys.stderr.isatty() if show is None else show),
        )
        self._task = self._bar.add_task(
            _title.get() + what, total=total, workers="starting", rate=""
        )

    def __enter__(self) -> WorkersBar:
        self._bar.start()
        return self

    def alive(self, n: int) -> None:
        """Show how many workers are alive, and the rate so far."""
        speed = self._bar.tasks[0].speed
        rate = "" if speed is None else f"{speed:.3g} rows/s"
        self._bar.update(self._task, workers=f"{n} of {self._n_workers} workers", rate=rate)

    def advance(self, n: int) -> None:
        """Show that some more rows are finished."""
        self._bar.advance(self._task, n)

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()


def busy(what: str) -> AbstractContextManager[object]:
    """Show a spinner on stderr while the block runs, if stderr is a terminal."""
    if _hidden.get():
        return nullcontext()
    return terminal().status(what)


def terminal() -> Console:
    """Return a console on stderr that takes it for a terminal only if it is one.

    In notebooks rich would display what is printed; kernels set FORCE_COLOR, which rich reads as a
    terminal.
    """
    from rich.console import Console

    # Given the stream, because code that runs meanwhile may redirect stderr.
    return Console(file=sys.stderr, force_jupyter=False, force_terminal=sys.stderr.isatty())


def _stderr_shown() -> Console:
    """Return a console on stderr for a bar that was asked for."""
    from rich.console import Console

    return Console(stderr=True)


class Stages:
    """Shows the current stage of a long job: with a spinner on terminals, else one line a stage."""

    def __init__(self, title: str) -> None:
        self.title = title

    def __enter__(self) -> Stages:
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = terminal()
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._bar.start()
        self._task = self._bar.add_task(self.title)
        return self

    def next(self, stage: str) -> None:
        """Show that the next stage has started."""
        self._bar.update(self._task, description=f"{self.title}: {stage}")
        if not self._console.is_terminal:
            print(f"{self.title}: {stage}", file=sys.stderr, flush=True)

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
