"""Files are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import OutputError

if TYPE_CHECKING:
    import pandas as pd

TABLE_SUFFIXES = (".csv", ".json", ".parquet")


def require_writable(path: str | os.PathLike[str]) -> Path:
    """The path, if a file can be put there. Raises OutputError; call it before long work."""
    target = Path(path)
    folder = target.parent
    if len(target.name.encode()) > 200:
        raise OutputError(f"cannot write a file name of {len(target.name.encode())} bytes")
    if os.path.isdir(target):
        raise OutputError(f"cannot write {str(target)!r}: it is a directory; name a file")
    if not os.path.isdir(folder):
        raise OutputError(
            f"cannot write {str(target)!r}: there is no directory {str(folder)!r}; make it first"
        )
    if not os.access(folder, os.W_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise OutputError(f"cannot write {str(target)!r}: permission denied")
    return target


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error."""
    target = require_writable(path)
    try:
        descriptor, name = tempfile.mkstemp(
            dir=target.parent, prefix=".slashpatch-", suffix=target.suffix
        )
    except OSError as error:
        raise OutputError(f"cannot write {str(target)!r}: {error}") from None
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes private files
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(f"cannot write {str(target)!r}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_table(frame: pd.DataFrame, path: str | os.PathLike[str]) -> None:
    """Write a DataFrame as .csv, .json (records) or .parquet. Raises OutputError."""
    suffix = Path(path).suffix
    writers: dict[str, Any] = {
        ".csv": lambda file: frame.to_csv(file, index=False),
        ".json": lambda file: frame.to_json(file, orient="records", indent=1),
        ".parquet": lambda file: frame.to_parquet(file, index=False),
    }
    if suffix not in writers:
        raise OutputError(
            f"cannot write {str(path)!r}: expected one of {', '.join(TABLE_SUFFIXES)}, "
            f"got {suffix or 'no suffix'}"
        )
    with written_whole(path) as file:
        writers[suffix](file)
