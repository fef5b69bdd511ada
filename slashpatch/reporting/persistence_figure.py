"""The figure of persistence: scores on natural text against scores on random tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .charts.persistence import REACHED, persistence_rows, thresholds
from .style import line_style, new_figure, shortened, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..effects.result import Result

#: How many of the highest heads are named.
_NAMED = 6


@styled
def persistence_figure(result: Result) -> Figure:
    """Draw natural against random scores, with both thresholds and the line where they agree."""
    rows = persistence_rows(result)
    kappa, kappa_random = thresholds(result)
    figure = new_figure(6.2, 5.2)
    axis = figure.subplots()
    axis.axline((0, 0), slope=1, color="gray", lw=0.8)
    axis.axvline(kappa, color="gray", lw=0.8, ls="--")
    axis.axhline(kappa_random, color="gray", lw=0.8, ls="--")
    for index, reached in enumerate(REACHED):
        part, style = rows[rows["reached"] == reached], line_style(index)
        axis.plot(
            part["natural"],
            part["random"],
            ls="none",
            marker=style["marker"],
            color=style["color"],
            markersize=4,
            alpha=0.8,
            label=f"{reached} ({len(part)})",
        )
    for row in rows.head(_NAMED).to_dict(orient="records"):
        axis.annotate(
            shortened(f"{row['name']} Δ{row['offset']}"),
            (row["natural"], row["random"]),
            xytext=(4, 3),
            textcoords="offset points",
            fontsize=7,
        )
    axis.set_xlim(-0.02, 1)
    axis.set_ylim(-0.02, 1)
    axis.set_xlabel(f"score on natural text (dashed: κ = {kappa:g})")
    axis.set_ylabel(f"score on random tokens (dashed: κ = {kappa_random:g})")
    name = shortened(result.provenance["model"], 60)
    axis.set_title(f"{name}: each head at each offset\n(line: both scores are equal)")
    axis.legend(title="reaches κ on")
    axis.grid(alpha=0.3)
    return figure
