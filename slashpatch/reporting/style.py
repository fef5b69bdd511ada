"""The style of matplotlib figures: the colours of the charts, and texts taken literally."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from .charts.palette import CATEGORIES, DASHES, MARKERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = TypeVar("Draw", bound=Callable[..., Any])

#: Parameters of matplotlib that are colours of text, axes and ticks.
_INKS = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")


def styled(draw: Draw) -> Draw:
    """Decorate a function that draws a figure, so that it draws in this style."""

    @functools.wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> Any:
        from cycler import cycler
        from matplotlib import rc_context

        style: Any = {
            "axes.prop_cycle": cycler(color=CATEGORIES),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "legend.fontsize": 8,
            "legend.frameon": False,
            "text.parse_math": False,  # prompts and model names may contain $
        }
        with rc_context(style):
            return draw(*args, **kwargs)

    return drawn  # type: ignore[return-value]


@contextmanager
def inked(color: str) -> Iterator[None]:
    """Draw text, axes and ticks in a colour inside the block."""
    from matplotlib import rc_context

    style: Any = dict.fromkeys(_INKS, color)
    with rc_context(style):
        yield


def ink() -> str:
    """Return the colour of text, for lines that belong to it."""
    from matplotlib import rcParams

    return str(rcParams["text.color"])


def line_style(index: int) -> dict[str, Any]:
    """Return colour, marker and dashes of the category with this index; they repeat after seven."""
    dash = DASHES[index % len(DASHES)]
    return {
        "color": CATEGORIES[index % len(CATEGORIES)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": "-" if dash == (1, 0) else (0, dash),
    }


def plain_numbers() -> Any:
    """Return a formatter of logarithmic axes without TeX, which this style does not read."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    return Plain(minor_thresholds=(2, 0.5))


def new_figure(width: float | int, height: float | int) -> Figure:
    """Return an empty figure, in inches, which notebooks show."""
    from .shown_figure import ShownFigure

    return ShownFigure(figsize=(width, height), layout="constrained")


def shortened(text: str, longest: int = 48) -> str:
    """Return a text of at most `longest` printable characters, for a label."""
    shown = printable(text)
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def printable(text: Any) -> str:
    """Return a text in which characters that do not print, such as newlines, are escaped.

    Direction marks and surrogates are among these, so a text cannot disturb what stands around it.
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(text)
    )
