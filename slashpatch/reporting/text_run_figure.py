"""A run on text as a table and a figure: when slashes, rank one, induction and copying appeared."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .style import ink, line_style, new_figure, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..theory.text.run import TextRun

#: The panels of the figure, from top to bottom, and the quantities in each.
_PANELS = {
    "slash score": ("strongest slash", "slash below induction", "the same on random tokens"),
    "rank one (r1)": ("r1 of its queries", "r1 of its keys"),
    "cone (cosine to the mean)": (
        "cone of its queries",
        "cone of its keys",
        "cone of its layer's input",
    ),
    "prefix matching": ("induction",),
    "loss (nats)": ("copying loss",),
}
_COLUMNS = {
    "r1 of its queries": "r1_q",
    "r1 of its keys": "r1_k",
    "cone of its queries": "cone_q",
    "cone of its keys": "cone_k",
    "cone of its layer's input": "cone_x",
    "induction": "prefix_matching",
    "copying loss": "copying_loss",
}


def curve(run: TextRun, change: pd.Series) -> pd.Series:
    """Return a quantity at every measured step, by step; `change` is a row of `run.changes()`."""
    quantity = str(change["quantity"])
    found = run.random if quantity == "the same on random tokens" else run.text
    column = _COLUMNS.get(quantity, f"score_{change['offset']}")
    head = change["head"] or found.frame["name"].iloc[0]  # the copying loss is one for all heads
    rows = found.frame[found.frame["name"] == head]
    return rows.set_index("step")[column].astype(float)


def eval_loss(run: TextRun) -> pd.Series:
    """Return the loss on held-out text at the steps where it was taken, by step."""
    return run.text.frame.drop_duplicates("step").set_index("step")["eval_loss"].dropna()


def named(change: pd.Series) -> str:
    """Return a change's quantity with its head and offset, if it has them."""
    head = f", {change['head']}" if change["head"] else ""
    offset = f" Δ={change['offset']}" if change["offset"] >= 0 else ""
    return f"{change['quantity']}{head}{offset}"


def change_cells(run: TextRun) -> tuple[list[str], list[list[str]]]:
    """Return titles and cells of the table of changes."""
    titles = ["quantity", "head", "Δ", "before", "after", "step", "quarter to three quarters"]
    rows = []
    for row in run.changes().to_dict(orient="records"):
        changed = not math.isnan(row["step"])
        rows.append(
            [
                str(row["quantity"]),
                str(row["head"]),
                str(row["offset"]) if row["offset"] >= 0 else "",
                f"{row['before']:.2f}",
                f"{row['after']:.2f}",
                f"{row['step']:.0f}" if changed else "no change",
                f"{row['early']:.0f} to {row['late']:.0f}" if changed else "",
            ]
        )
    return titles, rows


def text_run_table(run: TextRun) -> Group:
    """Return a table of what changed during a run, and at which step."""
    titles, rows = change_cells(run)
    table = Table()
    for index, title in enumerate(titles):
        table.add_column(title, justify="left" if index < 2 else "right")
    for cells in rows:
        table.add_row(*map(Text, cells))
    return Group(Text(text_run_title(run), style="bold"), table)


def text_run_title(run: TextRun) -> str:
    """Return one line that names a run by its settings."""
    of = run.settings
    size = f"{of.layers} layers of {of.heads} heads"
    return f"training on text: {size}, {of.steps} steps, seed {of.seed}"


@styled
def text_run_figure(run: TextRun, kappa: float = 0.3) -> Figure:
    """Draw what changed during a run, each curve with the step at which it did.

    A vertical line stands where a curve crosses half of its change for the last time; the band
    around it goes from a quarter to three quarters. `kappa` is drawn over the slash scores.
    """
    changes = run.changes()
    same = changes["quantity"].eq("slash below induction") & changes["head"].eq(
        changes["head"].iloc[0]
    )
    changes = changes[~(same & changes["offset"].eq(changes["offset"].iloc[0]))]
    figure = new_figure(9, 9.5)
    axes = figure.subplots(len(_PANELS), 1, sharex=True)
    for axis, (title, quantities) in zip(axes, _PANELS.items(), strict=True):
        rows = changes[changes["quantity"].isin(quantities)]
        for index, (_, change) in enumerate(rows.iterrows()):
            _draw_change(axis, curve(run, change), change, index)
        axis.set_title(title)
        axis.grid(alpha=0.3)
        if title != "loss (nats)":
            axis.set_ylim(0, 1.02)
    held_out = eval_loss(run)
    style = {**line_style(1), "marker": ""}
    axes[-1].plot(held_out.index, held_out, label="loss on held-out text", **style)
    axes[-1].set_ylim(bottom=0)
    axes[0].axhline(kappa, color=ink(), lw=0.6, ls="--")
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes[-1].set_xlim(run.text.steps[0], run.text.steps[-1])
    axes[-1].set_xlabel("training step")
    figure.suptitle(text_run_title(run), fontsize=11)
    return figure


def _draw_change(axis: Axes, values: pd.Series, change: pd.Series, index: int) -> None:
    style = {**line_style(index), "marker": ""}
    changed = not math.isnan(change["step"])
    when = f"step {change['step']:.0f}" if changed else "no change"
    axis.plot(values.index, values, label=f"{named(change)}\n{when}", **style)
    if changed:
        axis.axvspan(change["early"], change["late"], color=style["color"], alpha=0.12, lw=0)
        axis.axvline(change["step"], color=style["color"], lw=1)
