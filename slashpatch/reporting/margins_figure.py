"""The figure of margins over the highest and the lowest frequency of a range."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .charts.palette import DIVERGING
from .style import new_figure, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: The most ticks of an axis.
_TICKS = 8
#: Colours are logarithmic beyond this margin.
_FAINT = 1e-3
#: Width of a panel in inches, about.
_SIDE = 4.0


@styled
def margins_figure(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw margins over the highest and the lowest frequency, a panel for each table.

    The tables, by the panel's title, are as `slashpatch.theory.frequency_margins` returns them. A
    column `score` with slash scores in [0, 1] is drawn as circles, whose area is the score.
    """
    from matplotlib.colors import LinearSegmentedColormap, SymLogNorm

    figure = new_figure(5.6 * len(panels) + 0.8, 5.2)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    # All margins may be NaN, which a comparison with 0.1 leaves out.
    most = max([0.1, *(float(frame["margin"].max()) for frame in panels.values())])
    colors = {
        "norm": SymLogNorm(_FAINT, vmin=-most, vmax=most),
        "cmap": LinearSegmentedColormap.from_list("margins", DIVERGING[::-1]),
    }
    for axis, (title, frame) in zip(axes, panels.items(), strict=True):
        image = _draw(axis, frame, colors)
        axis.set_title(title, fontsize=11)
    bar = figure.colorbar(image, ax=axes.tolist(), shrink=0.9, pad=0.01, extend="min")
    bar.set_ticks([-0.1, -0.01, 0, 0.01, 0.1], labels=["−0.1", "−0.01", "0", "0.01", "0.1"])
    bar.set_label("margin (blue: the offset wins; orange: another does)", fontsize=9)
    return figure


def _draw(axis: Axes, frame: pd.DataFrame, colors: dict[str, Any]) -> Any:
    """Draw one table on an axis, and return the image."""
    table = frame.pivot(index="highest", columns="lowest", values="margin")
    table = table.sort_index(ascending=False).sort_index(axis=1, ascending=False)
    image = axis.imshow(table.to_numpy(), aspect="equal", interpolation="none", **colors)
    lines = ["Each square: a set of frequencies", "↗ top right: all of them"]
    lines += ["↘ bottom right: low ones only", "╲ diagonal: one alone"]
    if "score" in frame:
        lines.append("○ slash score after training")
        _draw_scores(axis, frame, table.index.tolist())
    axis.text(0.02, 0.03, "\n".join(lines), fontsize=9, transform=axis.transAxes, linespacing=1.5)
    n = len(table)
    ticks = range(0, n, math.ceil(n / _TICKS))
    labels = [f"{theta:.1g}\n{_tokens(theta)}" for theta in table.index[list(ticks)]]
    axis.set_xticks(ticks, labels, fontsize=8)
    axis.set_yticks(ticks, labels, fontsize=8)
    axis.set_xlabel("lowest frequency: θ (radians per token), below it the wavelength (tokens)")
    axis.set_ylabel("highest frequency")
    return image


def _draw_scores(axis: Axes, frame: pd.DataFrame, thetas: Sequence[float]) -> None:
    """Draw the scores as circles, and those from 0.1 as numbers."""
    places = {theta: place for place, theta in enumerate(thetas)}
    x, y = frame["lowest"].map(places), frame["highest"].map(places)
    widest = 0.75 * 72 * _SIDE / len(places)
    area = widest**2 * frame["score"]
    axis.scatter(x, y, s=area, color="white", edgecolors="black", linewidths=0.7)
    for column, row, score in zip(x, y, frame["score"], strict=True):
        if score >= 0.1:
            text = f"{score:.2f}".removeprefix("0")
            axis.text(column, row, text, ha="center", va="center", fontsize=7, color="black")


def _tokens(theta: float) -> str:
    """Return the wavelength of a frequency, in tokens."""
    wavelength = 2 * math.pi / theta if theta > 0 else math.inf
    return (
        f"{wavelength:,.0f}"
        if wavelength < 1000
        else f"{wavelength / 1000:,.0f}k".replace("infk", "∞")
    )
