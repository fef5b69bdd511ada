"""Print what commands return: tables on a console, or one JSON document."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.files import without_nan

if TYPE_CHECKING:
    from rich.console import Console

FIGURE_SUFFIXES = (".png", ".svg", ".pdf")


def print_written(console: Console, *paths: Path | None) -> None:
    """Print which files were written."""
    for path in paths:
        if path is not None:
            console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def new_console() -> Console:
    """Return a console on stdout; plain text of 120 columns where stdout is no terminal."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120, no_color=True)


def print_json(record: dict[str, Any]) -> None:
    """Print one JSON document; NaN, which JSON lacks, becomes null."""
    print(json.dumps(without_nan(record), ensure_ascii=False, indent=1, allow_nan=False))
