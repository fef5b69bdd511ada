"""A live view of heads while a model generates text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text


def show_live(prompt: str, steps: Iterable[dict[str, Any]], console: Console) -> None:
    """Show the generated text above a table of heads; without a terminal, one line a token."""
    if not console.is_terminal:
        for step in steps:
            heads = ", ".join(
                f"{head['head']} Δ{head['offset']} {head['weight']:.2f} reads {head['reads']!r}"
                for head in step["heads"][:3]
            )
            console.print(
                f"{step['position']:5} {step['at']!r} -> {step['token']!r}: {heads or '-'}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        return
    text = Text(prompt, style="dim")
    with Live(console=console, refresh_per_second=12) as live:
        for step in steps:
            text.append(step["token"], style="not dim")
            live.update(Group(text, Text(), _heads_table(step)))


def _heads_table(step: dict[str, Any]) -> Table:
    table = Table(
        title=Text(
            f"heads at token {step['position']} {step['at']!r}, about to write {step['token']!r}"
        ),
        title_justify="left",
    )
    table.add_column("head")
    table.add_column("Δ", justify="right")
    table.add_column("reads")
    table.add_column("now", justify="right")
    table.add_column("", width=20, no_wrap=True)
    table.add_column("mean so far", justify="right")
    for head in step["heads"]:
        table.add_row(
            head["head"],
            str(head["offset"]),
            Text(repr(head["reads"])),
            f"{head['weight']:.2f}",
            Text("█" * round(20 * head["weight"]), style="yellow"),
            f"{head['score']:.2f}",
        )
    return table
