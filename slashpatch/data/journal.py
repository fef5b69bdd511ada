"""The journal of a resumable run: a file with one line for each finished row.

Rows are appended as they finish, so that a run that was killed can be resumed.
"""

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
    """The finished rows of one run, and a header that identifies the run.

    Use it in a `with` block, in which no other process on this machine can write to the file. The
    file is created with the first row.

    Args:
        path: The file.
        header: JSON values that identify the run; a file with other values is refused.
        resume: Whether an existing file may be continued; otherwise it is refused.
        indexes: The indexes of all rows of the run: integers, or names.
        width: How many numbers a row has; None: a row is a list of any JSON values.

    Attributes:
        rows: Finished rows by index: those read from the file and those written since.
    """

    def __init__(
        self,
        path: Path,
        header: dict[str, Any],
        resume: bool,
        indexes: Iterable[int | str],
        width: int | None,
    ) -> None:
        self.path = require_writable(path)
        self.header = {"format": _FORMAT, **header}
        self.resume = resume
        self.indexes = set(indexes)
        self.width = width
        self.rows: dict[Any, list[Any]] = {}
        self._file: BinaryIO | None = None
        # A lock file must not be deleted, so it would clutter the folder of the results.
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
                f"another process is writing {str(self.path)!r}; wait until it ends, or choose "
                "another file"
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
        """Read the rows of an existing file, and cut off an incomplete last line."""
        if not self.resume:
            raise SweepError(
                f"{str(self.path)!r} holds an unfinished run; resume it (--resume, resume=True), "
                "or delete the file to start again"
            )
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]  # a killed run may leave an incomplete line
        try:
            header, *lines = [json.loads(line) for line in whole.splitlines()]
        except (ValueError, RecursionError):
            raise SweepError(
                f"{str(self.path)!r} is no unfinished run; delete it, or choose another file"
            ) from None
        require_same(self.header, header, self.path)
        for number, line in enumerate(lines, start=2):
            index, values = self._row(line, number)
            self.rows[index] = values
        if len(whole) < len(text):
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))

    def _row(self, line: Any, number: int) -> tuple[int | str, list[Any]]:
        """Return a line's index and values. Raises SweepError unless it is as it was written."""
        record = line if isinstance(line, dict) else {}
        index, values = record.get("index"), record.get("values")
        known = isinstance(index, (int, str)) and not isinstance(index, bool)
        new = known and index in self.indexes and index not in self.rows
        if new and index is not None and isinstance(values, list):
            row_of = values if self.width is None else self._numbers(values)
            if row_of is not None and line == row(index, row_of):
                return index, row_of
        what = "values" if self.width is None else f"{self.width} numbers"
        raise SweepError(
            f"line {number} of {str(self.path)!r} is no row of this run: expected a new "
            f"index, {what} and their checksum; delete the line, or the file"
        )

    def _numbers(self, values: list[Any]) -> list[float] | None:
        """Return the values as floats, or None unless they are `width` numbers."""
        numbers = all(type(value) in (int, float) and value == value for value in values)
        return [float(value) for value in values] if numbers and len(values) == self.width else None

    def write(self, rows: dict[Any, list[Any]]) -> None:
        """Append finished rows to the file, and return when they are on the disk."""
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
        """Delete the file, after its rows have been written to the result."""
        self.path.unlink(missing_ok=True)


def row(index: Any, values: list[Any]) -> dict[str, Any]:
    """Return the record of a row, with a checksum by which a changed line is noticed."""
    text = json.dumps([index, values])
    check = hashlib.sha256(text.encode()).hexdigest()[:8]
    return {"index": index, "values": values, "check": check}


def _lines(records: Iterable[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def require_same(expected: dict[str, Any], header: Any, path: Path) -> None:
    """Raise SweepError if a file's header is of another run; the message says what differs."""
    if not isinstance(header, dict):
        raise SweepError(f"{str(path)!r} is no file of a run; delete it, or choose another file")
    for key in expected:
        if header.get(key) != expected[key]:
            raise SweepError(
                f"{str(path)!r} is of another run: its {key} is {_short(header.get(key))}, here "
                f"it is {_short(expected[key])}; choose another file, or delete this one"
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."
