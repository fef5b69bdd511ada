"""Forest plots: effects of edits above their controls' draws, and several effects in each row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .charts.effect_rows import draw_rows, forest_rows, metrics_of, part_rows, quantity_of
from .charts.palette import CATEGORIES
from .style import ink, line_style, new_figure, shortened, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..effects.result import Result


@styled
def forest_figure(result: Result, metrics: int | None = None, rows: int = 20) -> Figure:
    """Draw effects and controls of `measure`, a panel for each metric.

    Args:
        result: A result of `measure`.
        metrics: How many metrics to draw; None for all.
        rows: How many rows to draw for a metric; the others are left out, which its title says.
    """
    names = metrics_of(result)[:metrics]
    tables = {name: forest_rows(result, name) for name in names}
    heights = [1.0 + 0.3 * min(rows, len(table)) for table in tables.values()] or [1.0]
    figure = new_figure(7.5, 0.6 + sum(heights))
    axes = figure.subplots(max(1, len(names)), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, name in zip(axes, names, strict=False):
        _draw_metric(axis, result, name, rows)
    handles, labels = axes[0].get_legend_handles_labels()
    if len(handles) > 1:
        figure.legend(handles, labels, loc="outside lower right", ncols=2)
    figure.suptitle(
        shortened(f"{result.provenance['model']}: effects, edited − clean", 80), fontsize=11
    )
    return figure


def _draw_metric(axis: Axes, result: Result, metric: str, most: int) -> None:
    table = forest_rows(result, metric)
    shown = table.head(most)
    place = {label: index for index, label in enumerate(shown["row"])}
    draws = draw_rows(result, metric)
    draws = draws[draws["row"].isin(place)]
    axis.plot(
        draws["effect"], draws["row"].map(place), "|", color=ink(), alpha=0.6, ms=11, zorder=3
    )
    for what, color, marker in (("edit", CATEGORIES[0], "o"), ("control", CATEGORIES[1], "s")):
        some = shown[shown["what"] == what]
        if some.empty:
            continue
        axis.errorbar(
            some["effect"],
            some["row"].map(place),
            xerr=np.stack([some["effect"] - some["low"], some["high"] - some["effect"]])
            .clip(min=0)
            .astype(float),
            fmt=marker,
            color=color,
            capsize=2,
            markerfacecolor=color if what == "edit" else "none",
            label=what if what == "edit" else "control: mean of its draws (ticks)",
        )
    axis.axvline(0, color=ink(), lw=0.8, ls="--")
    # A control stands below its edit, so it needs no more than its own name.
    edits = (shown["what"] == "edit").tolist()
    names = zip(shown["row"], shown["against"], edits, strict=True)
    labels = [row if is_edit else str(against) for row, against, is_edit in names]
    axis.set_yticks(range(len(shown)), [shortened(label) for label in labels], fontsize=8)
    axis.set_ylim(len(shown) - 0.5, -0.5)
    left_out = f" ({len(table) - most} more rows)" if len(table) > most else ""
    axis.set_xlabel(f"effect on {shortened(metric)}{left_out}")
    axis.grid(axis="x", alpha=0.3)


@styled
def parts_figure(result: Result, rows: int = 20) -> Figure:
    """Draw `activation_patching` or `direct_effect`: an effect with interval for each part.

    Args:
        result: A result of either.
        rows: How many things that were patched or edited to draw; the axis says how many are left.
    """
    table = part_rows(result)
    labels = list(dict.fromkeys(table["row"]))
    place = {label: at for at, label in enumerate(labels[:rows])}
    shown = table[table["row"].isin(place)]
    whats = list(dict.fromkeys(table["what"]))
    figure = new_figure(7.5, 1.2 + (0.12 + 0.18 * len(whats)) * max(1, len(place)))
    axis = figure.subplots()
    for index, what in enumerate(whats):
        some, style = shown[shown["what"] == what], line_style(index)
        beside = 0.6 * ((index + 0.5) / len(whats) - 0.5)
        axis.errorbar(
            some["effect"],
            some["row"].map(place).astype(float) + beside,
            xerr=np.stack([some["effect"] - some["low"], some["high"] - some["effect"]])
            .clip(min=0)
            .astype(float),
            fmt=style["marker"],
            color=style["color"],
            markersize=5,
            capsize=2,
            label=what,
        )
    axis.axvline(0, color=ink(), lw=0.8, ls="--")
    axis.set_yticks(range(len(place)), [shortened(label) for label in place], fontsize=8)
    axis.set_ylim(len(place) - 0.5, -0.5)
    left_out = f" ({len(labels) - rows} more)" if len(labels) > rows else ""
    axis.set_xlabel(f"{shortened(quantity_of(result), 60)}{left_out}")
    title = "activations patched" if result.kind == "pairs" else "direct and total effects"
    axis.set_title(shortened(f"{result.provenance['model']}: {title}", 80), fontsize=11)
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower right", ncols=len(whats))
    return figure
