"""Read the rows of a .jsonl or .csv file of clean and corrupt prompts."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from ...errors import PromptError


def read_rows(path: Path) -> list[tuple[str, Any]]:
    """Return the rows of a file, each with the place ("pairs.csv, line 2") that errors name.

    A .jsonl file has a JSON object a line. A .csv file has a line of names; a cell that is a JSON
    list of integers, or for an answer a JSON integer after "#", holds token ids. Raises
    PromptError.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read {str(path)!r} as UTF-8 text: {error}") from None
    if path.suffix == ".jsonl":
        return [
            (where, _json(line, where))
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
            for where in (f"{path.name}, line {number}",)
        ]
    if path.suffix != ".csv":
        raise PromptError(f"expected a .jsonl or .csv file of pairs; got {path.name!r}")
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="more")
    rows = []
    try:
        for row in reader:
            where = f"{path.name}, line {reader.line_num}"
            rows.append((where, {name: _cell(value) for name, value in row.items()}))
    except csv.Error as error:
        raise PromptError(f"{path.name}, line {reader.line_num}: {error}") from None
    return rows


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise PromptError(f"{where}: not a JSON object: {error}") from None


def _cell(value: Any) -> Any:
    """Return a cell's text, or the token ids that it holds."""
    if not isinstance(value, str):
        return value
    if value.startswith("#") and value[1:].isascii() and value[1:].isdigit():
        return int(value[1:])
    if value.startswith("[") and value.endswith("]"):
        try:
            ids = json.loads(value)
        except ValueError:
            return value
        return ids if all(type(token) is int for token in ids) else value
    return value
