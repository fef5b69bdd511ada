"""Figures of doses and circuits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .charts.effect_rows import circuit_draws, circuit_rows, dose_rows, metrics_of
from .charts.palette import CATEGORIES
from .style import ink, line_style, new_figure, shortened, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..effects.result import Result


@styled
def dose_figure(result: Result) -> Figure:
    """Draw the effect by dose, a panel for each metric; the band is the interval of each dose."""
    names = metrics_of(result)
    figure = new_figure(7.5, 0.8 + 3.0 * len(names))
    axes = figure.subplots(len(names), 1, squeeze=False, sharex=True)[:, 0]
    for axis, name in zip(axes, names, strict=True):
        curves = dose_rows(result, name).groupby("series", sort=False)
        for index, (series, rows) in enumerate(curves):
            style = line_style(index)
            axis.plot(rows["dose"], rows["effect"], markersize=4, label=str(series), **style)
            axis.fill_between(
                rows["dose"], rows["low"], rows["high"], color=style["color"], alpha=0.18
            )
        axis.axhline(0, color=ink(), lw=0.8, ls="--")
        axis.set_ylabel(f"effect on {shortened(name, 24)}")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[-1].set_xlabel("dose: the number in the edit")
    measured = "; ".join(map(str, result.provenance.get("measured", ())))
    axes[0].set_title(shortened(f"{result.provenance['model']}: {measured}", 80))
    return figure


@styled
def circuit_figure(result: Result) -> Figure:
    """Draw each share of a circuit with its interval; ticks are single random sets."""
    rows = circuit_rows(result)
    place = {label: at for at, label in enumerate(rows["row"])}
    figure = new_figure(7.5, 1.2 + 0.32 * len(rows))
    axis = figure.subplots()
    draws = circuit_draws(result)
    axis.plot(draws["share"], draws["row"].map(place), "|", color=ink(), alpha=0.6, ms=11)
    ends = [rows["share"] - rows["low"], rows["high"] - rows["share"]]
    axis.errorbar(
        rows["share"],
        range(len(rows)),
        xerr=[end.clip(lower=0).astype(float) for end in ends],
        fmt="o",
        color=CATEGORIES[0],
        capsize=2,
    )
    for at, style in ((0, "--"), (1, ":")):
        axis.axvline(at, color=ink(), lw=0.8, ls=style)
    axis.set_yticks(range(len(rows)), [shortened(label) for label in rows["row"]], fontsize=8)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    metric = shortened(str(result.provenance.get("metric", "the metric")), 24)
    axis.set_xlabel(f"share of what ablating all heads changes in {metric}")
    measured = "; ".join(map(str, result.provenance.get("measured", ())))
    axis.set_title(shortened(f"{result.provenance['model']}: {measured}", 80))
    axis.grid(axis="x", alpha=0.3)
    return figure
