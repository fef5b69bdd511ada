"""Tables and figures of the shallow transformer's training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .charts.palette import CATEGORIES, SCORES
from .style import ink, new_figure, plain_numbers, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from ..theory import Run

#: Number of steps in the table of a training run.
_SHOWN = 10


def over_seeds(values: Sequence[float], form: str = ".2f") -> str:
    """Return mean and Student's 95 % interval over seeds as text.

    Where some values are infinite, the text is the mean of the others and how many they are.
    """
    if any(math.isnan(value) for value in values):
        return "–"
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < len(values):
        reached = f"{sum(finite) / len(finite):{form}} in " if finite else "in "
        return f"{reached}{len(finite)} of {len(values)} seeds"
    mean = sum(finite) / len(finite)
    if len(finite) < 2:
        return f"{mean:{form}}"
    from scipy.stats import t

    variance = sum((value - mean) ** 2 for value in finite) / (len(finite) - 1)
    half = float(t.ppf(0.975, len(finite) - 1)) * (variance / len(finite)) ** 0.5
    return f"{mean:{form}} ± {half:{form}}"


def training_report(runs: Sequence[Run], kappa: float) -> Group:
    """Return a table of training: some steps, mean ± half the interval over seeds.

    Below it are the steps until layers 1 and 2 reach κ, and the out-of-distribution score.
    """
    settings = runs[0].settings
    names, rows = training_cells(runs)
    table = Table(*names)
    for cells in rows:
        table.add_row(*cells)
    outside = [run.out_of_distribution() for run in runs]
    lines = [
        f"the slash passes {kappa:g} after (steps): "
        + over_seeds([run.time_to(kappa) for run in runs], ".0f"),
        f"layer 2 passes {kappa:g} after (steps): "
        + over_seeds([run.time_to(kappa, "matching") for run in runs], ".0f"),
        "slash score out of distribution (twice the length, tokens never seen): "
        + over_seeds(outside),
    ]
    title = (
        f"{settings.task}, Δ={settings.offset}, cone {settings.cone:g}, frequencies "
        f"{settings.frequencies}, {settings.optimizer} at {settings.rate:g}: "
        + (f"mean ± half the 95 % interval over {len(runs)} seeds" if len(runs) > 1 else "one seed")
    )
    return Group(Text(title, style="bold"), table, *map(Text, lines))


def training_cells(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Return titles and cells of a table of some steps, mean ± half the interval over seeds."""
    offset = runs[0].settings.offset
    columns = {
        "loss": "loss",
        f"score_{offset}": f"slash score at Δ={offset}",
        "matching": "layer 2 matches",
        "r1_q": "r1 Q",
        "r1_k": "r1 K",
        "margin": "margin",
    }
    rows = runs[0].rows
    chosen = sorted({round(at * (len(rows) - 1) / (_SHOWN - 1)) for at in range(_SHOWN)})
    cells = [
        [f"{rows[at]['step']:.0f}"]
        + [over_seeds([run.rows[at][name] for run in runs]) for name in columns]
        for at in chosen
    ]
    return ["step", *columns.values()], cells


@styled
def training_figure(runs: Sequence[Run], kappa: float) -> Figure:
    """Draw slash score and layer 2's matching over steps, and the final predicted profile.

    Thin lines are single seeds.
    """
    settings = runs[0].settings
    figure = new_figure(10, 4)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    others = [d for d in range(4) if d != settings.offset]
    styles = {
        f"score_{settings.offset}": (CATEGORIES[0], "-", f"slash score at Δ={settings.offset}"),
        "matching": (CATEGORIES[1], "--", "layer 2 attends to the answer"),
        **{f"score_{d}": ("grey", ":", f"score at Δ={d}") for d in others},
    }
    for column, (color, line, label) in styles.items():
        frames = [run.history for run in runs]
        for frame in frames:
            left.plot(frame["step"], frame[column], line, color=color, alpha=0.35, lw=1)
        mean = sum(frame[column].to_numpy() for frame in frames) / len(frames)
        left.plot(frames[0]["step"], mean, line, color=color, lw=2, label=label)
    left.axhline(kappa, color=ink(), lw=0.6)
    left.set_xscale("symlog", linthresh=8)
    left.xaxis.set_major_formatter("{x:g}")
    left.set_xlim(left=0)
    left.set_ylim(0, 1.02)
    left.set_xlabel("step")
    seeds = f"mean of {len(runs)} seeds" if len(runs) > 1 else f"seed {settings.seed}"
    left.set_title(
        f"{settings.task}, cone {settings.cone:g}, frequencies {settings.frequencies}, "
        f"{settings.optimizer}: {seeds}",
        fontsize=9,
    )
    left.legend(fontsize=8, loc="upper left")
    for run in runs:
        right.plot(run.profile(), color=CATEGORIES[0], alpha=1 if len(runs) == 1 else 0.6, lw=1.2)
    right.axvline(settings.offset, color=ink(), lw=0.6)
    right.set_xlabel("offset Δ")
    right.set_title("logit that mean q and k predict", fontsize=10)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return figure


@styled
def phase_figure(frame: pd.DataFrame, kappa: float) -> Figure:
    """Draw median steps to a slash and mean final score over the values of two settings."""
    import numpy as np
    from matplotlib.colors import LogNorm

    rows, columns = frame.columns[:2]
    figure = new_figure(10, 4)
    panels = (
        ("time_to_slash", "median", f"median steps to a score of {kappa:g} (none: not reached)"),
        ("final_score", "mean", "mean final score"),
    )
    for axis, (value, how, title) in zip(figure.subplots(1, 2), panels, strict=True):
        table = _pivot(frame, value, how)
        numbers = table.to_numpy(dtype=float)
        shown = np.where(np.isfinite(numbers), numbers, np.nan)
        if value == "final_score":
            image = axis.imshow(shown, vmin=0, vmax=1, cmap=SCORES, aspect="auto")
        else:
            norm = LogNorm(1, max(2.0, float(frame["steps"].max())))
            image = axis.imshow(shown, norm=norm, cmap=f"{SCORES}_r", aspect="auto")
        for (i, j), number in np.ndenumerate(numbers):
            form = ".2f" if value == "final_score" else ".0f"
            text = f"{number:{form}}" if np.isfinite(number) else "none"
            axis.text(
                j,
                i,
                text,
                ha="center",
                va="center",
                fontsize=8,
                color="black",
                bbox={"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 1},
            )
        axis.set_xticks(range(table.shape[1]), [str(value) for value in table.columns], fontsize=8)
        axis.set_yticks(range(table.shape[0]), [str(value) for value in table.index], fontsize=8)
        axis.set_xlabel(columns)
        axis.set_ylabel(rows)
        axis.set_title(title, fontsize=10)
        figure.colorbar(image, ax=axis, format=None if value == "final_score" else plain_numbers())
    return figure


def _pivot(frame: pd.DataFrame, value: str, how: str) -> pd.DataFrame:
    """Return a table over two settings, with their values in the order in which they were given."""
    rows, columns = frame.columns[:2]
    cells = frame.groupby([rows, columns], sort=False)[value].agg(how).unstack(columns)
    return cells.loc[list(dict.fromkeys(frame[rows])), list(dict.fromkeys(frame[columns]))]


def phase_report(frame: pd.DataFrame, kappa: float) -> Group:
    """Return a table with a row for each pair of values: steps to a slash, and final values."""
    rows, columns = frame.columns[:2]
    table = Table(rows, columns, f"steps to {kappa:g}", "final score", "layer 2 matches", "margin")
    for (row, column), runs in frame.groupby([rows, columns], sort=False):
        table.add_row(
            str(row),
            str(column),
            over_seeds(runs["time_to_slash"].tolist(), ".0f"),
            over_seeds(runs["final_score"].tolist()),
            over_seeds(runs["final_matching"].tolist()),
            over_seeds(runs["final_margin"].tolist()),
        )
    steps = " or ".join(str(n) for n in dict.fromkeys(frame["steps"]))
    title = f"{frame['seed'].nunique()} seeds, {steps} steps; mean ± half the 95 % interval"
    return Group(Text(title, style="bold"), table)
