"""What a notebook shows of a model's heads over its training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..emergence import head_cells, step_cells
from ..emergence_figure import emergence_figure
from ..style import printable
from .block import Block, Table
from .svg import inline_svg

if TYPE_CHECKING:
    from ...scanning.emergence_result import Emergence


def emergence_html(found: Emergence, kappa: float = 0.1) -> str:
    """Return the curves of all heads, a table of steps, and when heads reached κ."""
    n_layers, n_heads, _ = found.provenance["layers_heads_vocabulary"]
    record = found.provenance["prompts"]
    lines = [
        f"{len(found.steps)} steps, {n_layers} × {n_heads} heads, {record['n']} prompts with "
        f"{found.provenance['n_tokens']} tokens ({record['source']})"
    ]
    title = f"Heads of {found.provenance['model']} over training"
    if found.frame.empty:
        return Block(title, [*lines, "no measurements yet"]).html()
    titles, rows = step_cells(found, kappa)
    heads, when, more = head_cells(found, kappa)
    label = f"Slash score of each head over {len(found.steps)} steps of training."
    tables = [Table(titles, rows, (len(titles) - 1,), caption="measured steps")]
    if when:
        caption = f"when heads first reached κ = {kappa:g}"
        tables.append(Table(heads, when, caption=caption, more=more))
    picture = inline_svg(lambda: emergence_figure(found, kappa), printable(label))
    return Block(title, lines, [picture], tables).html()
