"""A registry of how results look: as text, as HTML in a notebook, and as a plot.

`slashpatch.reporting` draws results and imports their classes, so results must not import it. They
ask this registry instead, which imports `slashpatch.reporting.looks` by name when it is first used.
Looks are registered by the name of a class, so that none is imported that is not shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

_LOOKS = "slashpatch.reporting.looks"


@dataclass(frozen=True)
class Look:
    """Functions that show a result; None where there is no such view.

    Attributes:
        text: `text(result, **options)`, plain text.
        html: `html(result)`, a piece of HTML.
        plot: `plot(result, backend, **options)`, a matplotlib figure or an Altair chart.
        live: `live(result, **options)`, a display on the terminal with start, update and stop.
    """

    text: Callable[..., str] | None = None
    html: Callable[[Any], str] | None = None
    plot: Callable[..., Any] | None = None
    live: Callable[..., Any] | None = None


_looks: dict[str, Look] = {}


def register(kind: str, look: Look) -> None:
    """Register how results of a class look; `kind` is its module and name below slashpatch."""
    _looks[f"slashpatch.{kind}"] = look


def text(result: Any, **options: Any) -> str:
    """Return a result as plain text."""
    look = _of(result).text
    assert look is not None
    return look(result, **options)


def html(result: Any) -> str:
    """Return a result as a piece of HTML, without scripts and without references."""
    look = _of(result).html
    assert look is not None
    return look(result)


def plot(result: Any, backend: str, **options: Any) -> Any:
    """Return a matplotlib figure or an Altair chart of a result.

    Raises PlotError for an unknown backend, ExtraError if Altair is not installed.
    """
    look = _of(result).plot
    assert look is not None
    return look(result, backend, **options)


def live(result: Any, **options: Any) -> Any:
    """Return a display on the terminal with the methods start, update and stop."""
    look = _of(result).live
    assert look is not None
    return look(result, **options)


def _of(result: Any) -> Look:
    """Return the look of a result's class, or of the nearest base class that has one."""
    import_module(_LOOKS)
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(result).__mro__]
    return next(_looks[name] for name in names if name in _looks)
