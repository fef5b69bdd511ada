"""A registry of functions that show results as text.

`slashpatch.reporting` draws results and imports their classes, so results must not import it. They
ask this registry instead, which imports `slashpatch.reporting.looks` by name when it is first used.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

_LOOKS = "slashpatch.reporting.looks"
_texts: dict[type, Callable[..., str]] = {}


def register(kind: type, text: Callable[..., str]) -> None:
    """Register `text(result, **options)` as the function that shows results of a class."""
    _texts[kind] = text


def text(result: Any, **options: Any) -> str:
    """Return a result as plain text."""
    import_module(_LOOKS)
    return _texts[type(result)](result, **options)
