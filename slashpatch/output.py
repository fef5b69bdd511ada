"""What the commands print, and where: tables on a console, one JSON document, refused paths."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import OutputError
from .files import require_writable

if TYPE_CHECKING:
    from rich.console import Console

FIGURE_SUFFIXES = (".png", ".svg", ".pdf")


def require_output(path: Path | None, suffixes: tuple[str, ...]) -> None:
    """Raise OutputError for a path that cannot be written, or says nothing that we write.

    Call it before long work.
    """
    if path is None:
        return
    if path.suffix not in suffixes:
        raise OutputError(
            f"cannot write {str(path)!r}: expected a name that ends in {', '.join(suffixes)}"
        )
    require_writable(path)


def print_written(console: Console, *paths: Path | None) -> None:
    """Say which files were written."""
    for path in paths:
        if path is not None:
            console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def new_console() -> Console:
    """Stdout; plain text, wide enough for the tables, where it is no terminal."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120, no_color=True)


def print_json(record: dict[str, Any]) -> None:
    """One JSON document; NaN, which JSON lacks, is null."""
    print(json.dumps(without_nan(record), ensure_ascii=False, indent=1, allow_nan=False))


def without_nan(value: Any) -> Any:
    """The same with None for NaN and infinities, which JSON lacks."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return value
