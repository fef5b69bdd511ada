"""Scans, monitors and edits as HTML."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..figures import grid_figure
from ..style import printable
from ..tables import interval, number
from .block import Block, Table
from .svg import inline_svg

if TYPE_CHECKING:
    from torch import Tensor

    from ...edits.base import Edit
    from ...scanning.monitor import SlashMonitor
    from ...scanning.result import Scan

#: How many rows a table has, how many offsets a grid, and how many heads an edit's line.
_ROWS, _NUMBERS, _HEADS = 10, 80, 12


def scan_html(scan: Scan, kappa: float = 0.1) -> str:
    """Return the grid of heads and the slash heads of a scan, the highest scores first."""
    entries = scan.slash_heads(kappa)
    sources = ", ".join(str(part["source"]) for part in scan.provenance["prompts"])
    n_layers, n_heads, _ = scan.sums.shape
    rows = [
        [str(entry.head), str(entry.offset), number(entry.score), interval(*entry.interval)]
        for entry in entries[:_ROWS]
    ]
    n = len({entry.head for entry in entries})
    return Block(
        f"Slash scores of {scan.provenance['model']}",
        [
            f"{n_layers} × {n_heads} heads, offsets {_range(scan.offsets)}, "
            f"{int(scan.counts.max())} prompts with {scan.n_tokens} tokens ({sources})"
        ],
        [_grid(scan.scores, scan.offsets, kappa)],
        [
            Table(
                ["head", "offset Δ", "score", "95 % interval"],
                rows,
                caption=f"{n} slash heads (score of at least κ = {kappa:g})",
                more=_more(len(entries) - len(rows), "heads and offsets", "to_dataframe()"),
            )
        ],
    ).html()


def monitor_html(monitor: SlashMonitor) -> str:
    """Return what a monitor has seen so far: detections, and each head's score."""
    from ...bridge.provenance import model_name

    model = model_name(monitor.model)
    n_rows = int(monitor.n_rows.max())
    line = f"{n_rows} rows (tokens) so far, offsets {_range(monitor.offsets)}"
    if not n_rows:
        return Block(f"Slash monitor of {model}", [f"{line}: the model has not run yet"]).html()
    heads, detected = monitor.slash_heads(), {found.head for found in monitor.detections}
    rows = [
        [
            str(found.head),
            str(found.offset),
            number(found.score),
            str(found.n_rows),
            "yes" if found.head in detected else "no",
        ]
        for found in heads[:_ROWS]
    ]
    return Block(
        f"Slash monitor of {model}",
        [f"{line}; {len(detected)} heads detected (κ = {monitor.kappa:g})"],
        [_grid(monitor.scores, monitor.offsets, monitor.kappa)],
        [
            Table(
                ["head", "offset Δ", "score so far", "rows", "detected"],
                rows,
                caption=f"heads and offsets whose score is at least κ = {monitor.kappa:g} now",
                more=_more(len(heads) - len(rows), "heads and offsets", "slash_heads()"),
            )
        ],
    ).html()


def edit_html(edit: Edit) -> str:
    """Return an edit as text, what it does in a sentence, and its heads."""
    heads: Sequence[Any] = edit.heads
    names = ", ".join(map(str, heads[:_HEADS]))
    more = f" and {len(heads) - _HEADS} more" if len(heads) > _HEADS else ""
    noun = "head" if len(heads) == 1 else "heads"
    lines = [_sentence(type(edit)), f"{len(heads)} {noun}: {names}{more}"]
    return Block(str(edit), lines).html()


def _sentence(kind: type) -> str:
    """Return the first sentence of a class's docstring; its name if it has none of its own."""
    text = inspect.cleandoc(kind.__doc__ or "")
    if not text or text.startswith(f"{kind.__name__}("):  # what dataclass writes
        return f"{kind.__name__}, an edit of attention heads without a description."
    first = " ".join(text.split("\n\n")[0].split())
    end = first.find(". ")
    return (first if end < 0 else first[: end + 1]).replace("`", "")


def _grid(scores: Tensor, offsets: Sequence[int], kappa: float) -> str:
    n_layers, n_heads, _ = scores.shape
    label = (
        f"Grid of {n_layers} layers by {n_heads} heads: colour gives each head's highest slash "
        f"score, a number its offset where the score is at least {kappa:g}."
    )
    title = f"highest score of each head (number: its offset, from κ = {kappa:g} on)"
    return inline_svg(
        lambda: grid_figure({title: (scores, offsets)}, None, kappa, _NUMBERS), printable(label)
    )


def _range(offsets: Sequence[int]) -> str:
    """Return offsets as a short text."""
    first, last = offsets[0], offsets[-1]
    if tuple(offsets) == tuple(range(first, last + 1)):
        return f"{first}–{last}" if last > first else str(first)
    shown = ", ".join(map(str, offsets[:8]))
    return f"{shown}, … {last}" if len(offsets) > 9 else ", ".join(map(str, offsets))


def _more(n: int, what: str, where: str) -> str:
    return f"and {n} more {what}: {where} has them" if n > 0 else ""
