"""The figure of heads that form during training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .charts.training_rows import coloured
from .style import ink, line_style, new_figure, shortened, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..scanning.emergence_result import Emergence

#: What panels of a figure show besides slash scores: the measure, its column and the axis' label.
_PANELS = (
    ("prefix", "prefix_matching", "prefix matching"),
    ("rank", "r1_q", "r1 of queries"),
    ("rank", "r1_k", "r1 of keys"),
    ("cone", "cone_q", "cosine of queries to their mean"),
    ("cone", "cone_k", "cosine of keys to their mean"),
)


@styled
def emergence_figure(found: Emergence, kappa: float = 0.1, log_steps: bool = False) -> Figure:
    """Draw each head's slash score over steps, and a panel for each other measure.

    Heads that reach κ are coloured, at most seven of them, those with the highest scores.
    """
    panels = [panel for panel in _PANELS if panel[0] in found.measures]
    losses = [
        (name, label)
        for name, label in (
            ("loss", "training loss"),
            ("eval_loss", "evaluation loss"),
            ("copying_loss", "loss on repeated tokens"),
        )
        if name in found.frame and found.frame[name].notna().any()
    ]
    n = 1 + len(panels) + ("bands" in found.measures) + bool(losses)
    columns = 1 if n == 1 else 2
    rows = math.ceil(n / columns)
    figure = new_figure(7.5 if columns == 1 else 11, 0.5 + 3.1 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
    best = found.best()
    chosen = coloured(best, kappa)
    _draw_scores(axes[0], found, best, chosen, kappa)
    for axis, (_, column, label) in zip(axes[1:], panels, strict=False):
        _draw_heads(axis, found.frame, column, chosen)
        axis.set_title(label)
    if "bands" in found.measures:
        _draw_bands(axes[1 + len(panels)], found, best)
    if losses:
        _draw_losses(axes[n - 1], found.frame.drop_duplicates("step"), losses)
    for axis in axes[n:]:
        axis.remove()
    for axis in axes[:n]:
        if log_steps:
            axis.set_xscale("symlog", linthresh=max(1, _second(found.steps)))
            axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlim(found.steps[0], max(found.steps[-1], found.steps[0] + 1))
        axis.grid(alpha=0.3)
    for axis in axes[max(0, n - columns) : n]:
        axis.set_xlabel("training step")
        axis.tick_params(labelbottom=True)
    figure.suptitle(
        shortened(f"{found.provenance['model']}: heads over {len(found.steps)} steps", 90),
        fontsize=11,
    )
    return figure


def _second(steps: tuple[int, ...]) -> int:
    return next((step for step in steps if step > 0), 1)


def _draw_scores(
    axis: Axes, found: Emergence, best: pd.DataFrame, chosen: list[tuple[str, int]], kappa: float
) -> None:
    names = {name for name, _ in chosen}
    others = best[~best["name"].isin(names)]
    for index, (_, rows) in enumerate(others.groupby("name", sort=False)):
        label = "other heads" if index == 0 else None
        axis.plot(rows["step"], rows["score"], color="grey", lw=0.7, alpha=0.5, label=label)
    for index, (name, offset) in enumerate(chosen):
        rows = found.frame[found.frame["name"] == name]
        axis.plot(
            rows["step"],
            rows[f"score_{offset}"],
            label=f"{name} Δ={offset}",
            markersize=3,
            **line_style(index),
        )
    axis.axhline(kappa, color=ink(), lw=0.6, ls="--")
    axis.set_ylim(0, 1.02)
    axis.set_title("slash score")
    axis.legend(loc="upper left")


def _draw_heads(
    axis: Axes, frame: pd.DataFrame, column: str, chosen: list[tuple[str, int]]
) -> None:
    names = [name for name, _ in chosen]
    for name, rows in frame.groupby("name", sort=False):
        if name not in names:
            axis.plot(rows["step"], rows[column], color="grey", lw=0.7, alpha=0.5)
    for index, name in enumerate(names):
        rows = frame[frame["name"] == name]
        axis.plot(rows["step"], rows[column], markersize=3, **line_style(index))
    axis.set_ylim(min(0.0, float(frame[column].min())), 1.02)


def _draw_bands(axis: Axes, found: Emergence, best: pd.DataFrame) -> None:
    """Draw the bands' shares of one head: that with the highest score at the last step."""
    last = best[best["step"] == best["step"].iloc[-1]]
    name = str(last.loc[last["score"].idxmax(), "name"])
    rows = found.frame[found.frame["name"] == name]
    for index, band in enumerate(("high", "medium", "low")):
        label = f"{band} frequencies"
        axis.plot(
            rows["step"], rows[f"band_{band}"], markersize=3, label=label, **line_style(index)
        )
    axis.axhline(0, color=ink(), lw=0.6)
    axis.set_title(f"share of the predicted peak of {name}")
    axis.legend()


def _draw_losses(axis: Axes, steps: pd.DataFrame, losses: list[tuple[str, str]]) -> None:
    for index, (column, label) in enumerate(losses):
        known = steps[steps[column].notna()]
        axis.plot(known["step"], known[column], markersize=3, label=label, **line_style(index))
    axis.set_title("loss (nats)")
    axis.set_ylim(bottom=0)
    axis.legend()
