"""A file that only grows: one line for each finished row, so that a killed run loses none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import SweepError
from ..files import require_writable, written_whole

_FORMAT = "slashpatch-sweep-1"


class Journal:
    """Finished rows of one run, by their index, and the header that says which run it is.

    `rows` are those found when it was opened, and those written since. Use it in a `with` block:
    no second process can write there meanwhile.
    """

    def __init__(self, path: Path, header: dict[str, Any], resume: bool) -> None:
        self.path = require_writable(path)
        self.header = {"format": _FORMAT, **header}
        self.resume = resume
        self.rows: dict[int, list[float]] = {}
        self._lock = FileLock(f"{path}.lock")

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
            else:
                with written_whole(self.path) as file:
                    file.write_text(json.dumps(self.header) + "\n", encoding="utf-8")
            self._file = open(self.path, "ab")
        except BaseException:
            self._release()
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
        lines = whole.splitlines()
        try:
            header, *rows = [json.loads(line) for line in lines]
            self.rows = {int(row["index"]): [float(v) for v in row["values"]] for row in rows}
        except (ValueError, KeyError, TypeError):
            raise SweepError(f"{str(self.path)!r} is no unfinished sweep; remove it") from None
        require_same(self.header, header, self.path)
        if len(whole) < len(text):
            with open(self.path, "r+b") as file:
                file.truncate(len(whole))

    def write(self, rows: dict[int, list[float]]) -> None:
        """Add finished rows; they are on the disk when this returns."""
        lines = [json.dumps({"index": index, "values": values}) for index, values in rows.items()]
        self._file.write("".join(line + "\n" for line in lines).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows.update(rows)

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        self._release()

    def _release(self) -> None:
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the file: its rows are elsewhere."""
        self.path.unlink(missing_ok=True)


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
