"""How results show themselves: `slashpatch.report` registers a look for each class of result.

Results lie below the room that draws them, and imports go down only. So a result asks this
registry, which loads `slashpatch.report.looks` by name the first time.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

_LOOKS = "slashpatch.report.looks"
_texts: dict[type, Callable[..., str]] = {}


def register(kind: type, text: Callable[..., str]) -> None:
    """Let `text(result, **options)` show results of a class."""
    _texts[kind] = text


def text(result: Any, **options: Any) -> str:
    """Return a result as plain text."""
    import_module(_LOOKS)
    return _texts[type(result)](result, **options)
