"""Heads that form during training: tables, and the view on the terminal while a model trains."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..data.progress import terminal
from .style import printable, shortened
from .tables import heatmap, number

if TYPE_CHECKING:
    from ..scanning.emergence_result import Emergence

#: How many steps and heads a table has at most.
_STEPS, _HEADS = 16, 16


def emergence_table(found: Emergence, kappa: float = 0.1) -> Group:
    """Return a table of the steps, and one of when each head first reached κ."""
    titles, rows = step_cells(found, kappa)
    steps = Table()
    for index, name in enumerate(titles):
        steps.add_column(name, justify="right" if index != len(titles) - 1 else "left")
    for cells in rows:
        steps.add_row(*map(Text, cells))
    title = Text(
        f"{len(found.steps)} steps of {printable(found.provenance['model'])}, {_prompts(found)}",
        style="bold",
    )
    titles, rows, more = head_cells(found, kappa)
    if not rows:
        return Group(title, steps, Text(f"no head reaches κ = {kappa:g}"))
    heads = Table()
    for index, name in enumerate(titles):
        heads.add_column(name, justify="right" if index else "left")
    for cells in rows:
        heads.add_row(*map(Text, cells))
    when = Text(f"when heads first reached κ = {kappa:g}", style="bold")
    parts: list[RenderableType] = [title, steps, Text(), when, heads]
    return Group(*parts, *([Text(more)] if more else []))


def step_cells(found: Emergence, kappa: float) -> tuple[list[str], list[list[str]]]:
    """Return titles and cells of a table of at most 16 steps; the strongest head comes last."""
    summary = found.summary(kappa)
    chosen = summary
    if len(summary) > _STEPS:
        places = np.linspace(0, len(summary) - 1, _STEPS).round().astype(int)
        chosen = summary.iloc[places]
    columns: dict[str, tuple[str, str]] = {"step": ("step", "{:.0f}")}
    for name, title in (("loss", "loss"), ("eval_loss", "eval loss")):
        if summary[name].notna().any():
            columns[name] = (title, "{:.3f}")
    for name, title in (("copying_loss", "copying loss"), ("prefix_matching", "prefix matching")):
        if name in summary:
            columns[name] = (title, "{:.3f}")
    columns["slash_heads"] = (f"heads ≥ {kappa:g}", "{:.0f}")
    # Where no step was known they are counted, and the name tells more.
    named = any(
        str(step) not in name
        for step, name in zip(summary["step"], summary["checkpoint"], strict=True)
    )
    rows = []
    for row in chosen.to_dict(orient="records"):
        cells = [
            "–" if math.isnan(row[name]) else form.format(row[name])
            for name, (_, form) in columns.items()
        ]
        if "prefix_matching" in columns:
            at = list(columns).index("prefix_matching")
            cells[at] = f"{row['prefix_head']} {cells[at]}"
        if named:
            cells.insert(1, shortened(row["checkpoint"], 40))
        bar = "█" * round(16 * max(row["score"], 0))
        rows.append([*cells, f"{row['head']} Δ{row['offset']} {number(row['score'])} {bar}"])
    titles = [title for title, _ in columns.values()]
    if named:
        titles.insert(1, "checkpoint")
    return [*titles, "strongest head"], rows


def head_cells(found: Emergence, kappa: float) -> tuple[list[str], list[list[str]], str]:
    """Return titles and cells of when heads first reached κ, and what is said of the others."""
    table = found.first_steps(kappa)
    rows = [
        [
            row["name"],
            str(row["offset"]),
            str(row["first"]),
            "–" if row["before"] < 0 else str(row["before"]),
            "–" if row["since"] < 0 else str(row["since"]),
            number(row["highest"]),
            number(row["last"]),
        ]
        for row in table.head(_HEADS).to_dict(orient="records")
    ]
    left = len(table) - len(rows)
    more = f"and {left} more heads and offsets: first_steps({kappa:g})" if left else ""
    titles = ["head", "Δ", "first at step", "not yet at", "stays from", "highest", "last"]
    return titles, rows, more


def _prompts(found: Emergence) -> str:
    """Return how many prompts there were, and what uniform attention would score on them."""
    record = found.provenance["prompts"]
    n, tokens = record["n"], found.provenance["n_tokens"] / record["n"]
    # Row i of uniform attention has 1/(i+1) everywhere; the mean over rows at Δ=0.
    uniform = sum(1 / (i + 1) for i in range(round(tokens))) / max(1, round(tokens))
    return (
        f"{n} prompts of {tokens:.0f} tokens ({printable(record['source'])}; uniform attention "
        f"would score {uniform:.3f})"
    )


class LiveHeads:
    """A view on the terminal while a model trains: the grid of heads and the strongest ones.

    What others print meanwhile stands above it. The methods are `start`, `update` and `stop`.
    """

    def __init__(
        self,
        found: Emergence,
        total: int,
        kappa: float = 0.1,
        console: Console | None = None,
    ) -> None:
        self.total, self.kappa = total, kappa
        self._shown = found
        self._live = Live(
            live_view(found, total, kappa),
            console=terminal() if console is None else console,
            auto_refresh=False,
            vertical_overflow="crop",
        )

    def start(self) -> None:
        """Begin to draw."""
        self._live.start()

    def update(self, found: Emergence, step: int | None = None, loss: float | None = None) -> None:
        """Draw the newest measurements, with the step and the loss of the training."""
        self._shown = found
        self._live.update(live_view(found, self.total, self.kappa, step, loss), refresh=True)

    def stop(self) -> None:
        """Leave the last view on the terminal."""
        self._live.stop()


def live_view(
    found: Emergence,
    total: int,
    kappa: float,
    step: int | None = None,
    loss: float | None = None,
) -> RenderableType:
    """Return the grid of heads at the newest step, and the strongest heads with their history."""
    if found.frame.empty:
        return Text("no measurement yet")
    best = found.best()
    newest = int(best["step"].iloc[-1])
    now = best[best["step"] == newest]
    step = newest if step is None else step
    told = "" if loss is None else f", loss {loss:.3f}"
    n = int((now["score"] >= kappa).sum())
    title = f"step {step} of {total}{told}: {n} slash heads (κ = {kappa:g}) at step {newest}"
    n_layers, n_heads, _ = found.provenance["layers_heads_vocabulary"]
    import torch

    grid = heatmap(torch.tensor(now["score"].to_numpy()).reshape(n_layers, n_heads), title)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("head")
    table.add_column("Δ", justify="right")
    table.add_column("score", justify="right")
    table.add_column("since the first step", no_wrap=True)
    for row in now.sort_values("score", ascending=False).head(6).to_dict(orient="records"):
        history = found.frame.loc[found.frame["name"] == row["name"], f"score_{row['offset']}"]
        table.add_row(
            row["name"], str(row["offset"]), number(row["score"]), _spark(history.tolist())
        )
    return Group(grid, Text(), table)


def _spark(values: list[float], width: int = 40) -> Text:
    """Return values from 0 to 1 as a line of bars, at most `width` of them."""
    places = np.linspace(0, len(values) - 1, min(width, len(values))).round().astype(int)
    bars = " ▁▂▃▄▅▆▇█"
    heights = [min(max(values[place], 0.0), 1.0) * (len(bars) - 1) for place in places.tolist()]
    return Text("".join(bars[math.ceil(height)] for height in heights), style="yellow")
