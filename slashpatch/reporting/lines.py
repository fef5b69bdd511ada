"""Lines of a scan, near and far: a table, and a figure of scores by offset."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .style import ink, line_style, new_figure, plain_numbers, shortened, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..scanning.lines import SlashLine
    from ..scanning.result import Scan

#: Most points of a curve; between found lines, the highest of neighbouring offsets is drawn.
_POINTS = 600


def lines_table(
    scan: Scan, lines: Sequence[SlashLine], top: int | None = 20, control: Scan | None = None
) -> Group:
    """Return a table of lines, best first; `control`, of random tokens, adds its scores."""
    source = ", ".join(part["source"] for part in scan.provenance["prompts"])
    sums = scan.require_lines()
    n_layers, n_heads, n_offsets = sums.scores.shape
    title = Text(
        f"{len(lines)} lines in {len({line.head for line in lines})} of {n_layers * n_heads} "
        f"heads, of {n_offsets:,} offsets each ({source})",
        style="bold",
    )
    about = Text(
        "contrast: score minus the median of the offsets around it, with its 95 % interval over "
        f"{int(sums.counts.max())} prompts; q: p adjusted for all heads and offsets",
        style="dim",
    )
    table = Table()
    names = ["head", "Δ", "score", "contrast", "q"]
    for column in [*names, *(["random tokens"] if control is not None else [])]:
        table.add_column(column, justify="left" if column == "head" else "right", no_wrap=True)
    shown = lines if top is None else lines[:top]
    for line in shown:
        low, high = line.interval
        row = [
            str(line.head),
            f"{line.offset:,}",
            f"{line.score:.4f}",
            f"{line.contrast:.4f} [{low:.4f}, {high:.4f}]",
            "<0.001" if line.q < 0.001 else f"{line.q:.3f}",
        ]
        if control is not None:
            row.append(_score(control, line))
        table.add_row(*row)
    more = len(lines) - len(shown)
    return Group(title, about, table, *([Text(f"and {more} more lines")] if more else []))


def _score(scan: Scan, line: SlashLine) -> str:
    """Return the line score of another scan at a line's head and offset."""
    sums = scan.require_lines()
    if line.offset >= len(sums.counts):
        return "–"
    at = (line.head.layer, line.head.head, line.offset)
    return f"{float(sums.scores[at] / sums.counts[line.offset]):.4f}"


@styled
def lines_figure(scan: Scan, lines: Sequence[SlashLine], top: int = 6) -> Figure:
    """Draw the score by offset of the heads with the best lines, and mark their lines.

    Both axes are logarithmic. Offset 0, which a logarithmic axis lacks, is left out.
    """
    sums = scan.require_lines()
    heads = list(dict.fromkeys(line.head for line in lines))[:top]
    figure = new_figure(8.5, 4.2)
    axis = figure.subplots()
    floor = 1.0
    for index, head in enumerate(heads):
        found = [line for line in lines if line.head == head]
        scores = (sums.scores[head.layer, head.head] / sums.counts).tolist()
        at = _shown(scores, {line.offset for line in found})
        values = [scores[offset] for offset in at]
        floor = min([floor, *(value for value in values if value > 0)])
        color = line_style(index)["color"]
        axis.plot(at, values, color=color, lw=0.8, alpha=0.7, label=f"{head} ({len(found)})")
        marks = [line.offset for line in found], [line.score for line in found]
        axis.plot(*marks, "o", color=color, markersize=4)
    for line in lines[:8]:
        if line.head in heads:
            axis.annotate(
                f"{line.offset:,}",
                (line.offset, line.score),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=ink(),
            )
    axis.set_xscale("log")
    axis.set_yscale("log", nonpositive="clip")
    axis.set_ylim(bottom=max(floor / 2, 1e-7), top=1.5)
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_formatter(plain_numbers())
        each.set_minor_formatter(plain_numbers())
    axis.set_xlabel("offset Δ (tokens)")
    axis.set_ylabel("mean attention i → i−Δ")
    name = shortened(scan.provenance["model"], 60)
    axis.set_title(f"{name}: heads with the clearest lines\n(dots: lines; first token left out)")
    if heads:
        axis.legend(title="head (lines)", ncols=2)
    axis.grid(alpha=0.3)
    return figure


def _shown(scores: Sequence[float], marked: set[int]) -> list[int]:
    """Return the offsets to draw: all near ones, and the highest of each stretch of far ones."""
    chosen = set(marked)
    start, last = 1, len(scores)
    growth = max(last, 2) ** (1 / _POINTS)
    while start < last:
        stop = min(last, max(start + 1, int(start * growth)))
        chosen.add(max(range(start, stop), key=scores.__getitem__))
        start = stop
    return sorted(chosen)
