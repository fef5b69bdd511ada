"""Tables and heatmaps as rich renderables, and their conversion to plain text."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from ..data.heads import Head

if TYPE_CHECKING:
    from torch import Tensor

    from ..scanning.result import Scan

#: Characters of the heatmap, by the lowest score that they stand for.
_SHADES = {0.1: "·", 0.2: "░", 0.4: "▒", 0.6: "▓", 0.8: "█"}
_WIDTH = 100
_WIDE_HEADS = 12


def plain(*renderables: RenderableType) -> str:
    """Return renderables as text without colour, for pipes and `print`, also in notebooks."""
    console = Console(
        file=io.StringIO(), width=_WIDTH, no_color=True, force_terminal=False, force_jupyter=False
    )
    console.print(*renderables)
    return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined]


def number(value: float) -> str:
    """Return a number with three decimals, or a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def interval(low: float, high: float) -> str:
    """Return an interval as text, or a dash where there is none (a single prompt)."""
    return "–" if math.isnan(low) else f"{low:.3f} to {high:.3f}"


def scan_table(
    scan: Scan, kappa: float = 0.1, top: int | None = 20, control: Scan | None = None
) -> Group:
    """Return a table of slash heads, best first, with intervals over prompts.

    `control`, a scan of random tokens, adds a column with its scores.
    """
    entries = scan.slash_heads(kappa)
    shown = entries if top is None else entries[:top]
    source = ", ".join(part["source"] for part in scan.provenance["prompts"])
    title = Text(
        f"{len({entry.head for entry in entries})} slash heads (κ = {kappa:g}, {source})",
        style="bold",
    )
    table = Table()
    for column in ("head", "Δ", "score", "95 % interval"):
        table.add_column(column, justify="left" if column == "head" else "right", no_wrap=True)
    if control is not None:
        table.add_column("random tokens", justify="right", no_wrap=True)
    for entry in shown:
        row = [str(entry.head), str(entry.offset), number(entry.score), interval(*entry.interval)]
        if control is not None:
            at = (entry.head.layer, entry.head.head, control.offsets.index(entry.offset))
            row.append(number(float(control.scores[at])))
        table.add_row(*row)
    if len(shown) < len(entries):
        return Group(title, table, Text(f"and {len(entries) - len(shown)} more heads and offsets"))
    return Group(title, table)


def heatmap(scores: Tensor, title: str) -> Text:
    """Return scores [layer, head] in [0, 1] as shades and colours: a line for each layer."""
    n_layers, n_heads = scores.shape
    cell = 3 if n_heads <= _WIDE_HEADS else 1
    gap = " " if n_heads <= _WIDE_HEADS else ""
    text = Text(f"{title}\n")
    names = [f"H{head}" if cell == 3 else str(head % 10) for head in range(n_heads)]
    text.append("      " + "".join(f"{name:<{cell}}{gap}" for name in names) + "\n", style="dim")
    for layer in range(n_layers):
        text.append(f" L{layer:<3} ", style="dim")
        for head in range(n_heads):
            shade, colour = _shade(float(scores[layer, head]))
            text.append(shade * cell + gap, style=colour)
        text.append("\n")
    text.append("      " + "  ".join(f"{_SHADES[low] * 2} {low}+" for low in _SHADES))
    return text


def _shade(score: float) -> tuple[str, str]:
    """Return the character and the colour of a score."""
    shade = " "
    for low, character in _SHADES.items():
        shade = character if score >= low else shade
    return shade, "cyan" if score < 0.4 else "yellow"


def side_by_side(left: RenderableType, right: RenderableType, width: int) -> RenderableType:
    """Return two renderables side by side, or one below the other if `width` is too small."""
    measured = [
        Measurement.get(Console(width=10_000), Console(width=10_000).options, item).maximum
        for item in (left, right)
    ]
    if sum(measured) + 3 > width:
        return Group(left, Text(), right)
    grid = Table.grid(padding=(0, 3))
    grid.add_row(left, right)
    return grid


def strongest(scan: Scan, min_offset: int = 0) -> tuple[Head, int, float]:
    """Return the head, offset and score of the highest score at offsets from `min_offset` up."""
    columns = [i for i, offset in enumerate(scan.offsets) if offset >= min_offset]
    scores = scan.scores[:, :, columns].nan_to_num(-1)
    index = int(scores.argmax())
    layer, rest = divmod(index, scores.shape[1] * scores.shape[2])
    head, column = divmod(rest, scores.shape[2])
    return Head(layer, head), scan.offsets[columns[column]], float(scores[layer, head, column])
