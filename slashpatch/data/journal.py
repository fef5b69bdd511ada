"""A file that only grows: one line for each finished row, so that a killed run loses none."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from ..errors import SweepError
from .files import cache_dir, require_writable, written_whole

_FORMAT = "slashpatch-sweep-1"


class Journal:
    """Finished rows of one run, by their index, and the header that says which run it is.

    `rows` are those found when it was opened, and those written since: `width` numbers for each of
    some `indexes`. Use it in a `with` block: no second process on this machine can write there
    meanwhile. There is no file before the first row.
    """

    def __init__(
        self,
        path: Path,
        header: dict[str, Any],
        resume: bool,
        indexes: Iterable[int],
        width: int,
    ) -> None:
        self.path = require_writable(path)
        self.header = {"format": _FORMAT, **header}
        self.resume = resume
        self.indexes = set(indexes)
        self.width = width
        self.rows: dict[int, list[float]] = {}
        self._file: BinaryIO | None = None
        # Not beside the file: a lock file must stay where it is to be of use.
        name = hashlib.sha256(str(self.path.resolve()).encode()).hexdigest()[:24]
        folder = cache_dir() / "locks"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            folder = Path(tempfile.gettempdir())
        self._lock = FileLock(folder / f"{name}.lock")

    def __enter__(self) -> Journal:
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise SweepError(
                f"another process is writing {str(self.path)!r}; wait for it, or choose another "
                "file"
            ) from None
        try:
            if self.path.exists():
                self._read()
                self._file = open(self.path, "ab")
        except BaseException:
            self._lock.release()
            raise
        return self

    def _read(self) -> None:
        if not self.resume:
            raise SweepError(
                f"{str(self.path)!r} holds an unfinished sweep; resume it (--resume, resume=True), "
                "or remove that file to start anew"
            )
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]  # a killed run may leave a part of a line
        try:
            header, *lines = [json.loads(line) for line in whole.splitlines()]
        except (ValueError, RecursionError):
            raise SweepError(f"{str(self.path)!r} is no unfinished sweep; remove it") from None
        require_same(self.header, header, self.path)
        for number, line in enumerate(lines, start=2):
            index, values = self._row(line, number)
            self.rows[index] = values
        if len(whole) < len(text):
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))

    def _row(self, line: Any, number: int) -> tuple[int, list[float]]:
        """A row as it was written. Raises SweepError for anything else."""
        given = line if isinstance(line, dict) else {}
        index, values = given.get("index"), given.get("values")
        if (
            type(index) is int
            and index in self.indexes
            and index not in self.rows
            and isinstance(values, list)
            and len(values) == self.width
            and all(type(value) in (int, float) and value == value for value in values)
            and line == row(index, [float(value) for value in values])
        ):
            return index, [float(value) for value in values]
        raise SweepError(
            f"line {number} of {str(self.path)!r} is no row of this sweep: expected a new index "
            f"and {self.width} numbers; remove the line, or the file"
        )

    def write(self, rows: dict[int, list[float]]) -> None:
        """Add finished rows; they are on the disk when this returns."""
        records: list[Any] = [row(index, values) for index, values in rows.items()]
        if self._file is None:
            with written_whole(self.path) as file:
                file.write_bytes(_lines([self.header, *records]))
            self._file = open(self.path, "ab")  # noqa: SIM115
        else:
            self._file.write(_lines(records))
            self._file.flush()
            os.fsync(self._file.fileno())
        self.rows.update(rows)

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.release()

    def remove(self) -> None:
        """Delete the file: its rows are elsewhere."""
        self.path.unlink(missing_ok=True)


def row(index: int, values: list[float]) -> dict[str, Any]:
    """A line of the file, with a sum that tells whether it is as it was written."""
    text = json.dumps([index, values])
    check = hashlib.sha256(text.encode()).hexdigest()[:8]
    return {"index": index, "values": values, "check": check}


def _lines(records: Iterable[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def require_same(own: dict[str, Any], found: Any, path: Path) -> None:
    """Raise SweepError if a file is of another run, and say in what it differs."""
    if not isinstance(found, dict):
        raise SweepError(f"{str(path)!r} is no sweep; remove it or choose another file")
    for key in own:
        if found.get(key) != own[key]:
            raise SweepError(
                f"{str(path)!r} is of another sweep: its {key} is {_short(found.get(key))}, here "
                f"it is {_short(own[key])}; choose another file, or remove that one"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
