"""Write and read files. Each is written to a temporary name and moved, so none is incomplete."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OutputError, SlashpatchError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

#: What reading a damaged or foreign file may raise.
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError)
TABLE_SUFFIXES = (".csv", ".json", ".parquet")


def cache_dir() -> Path:
    """Return the directory for converted models and locks.

    It is $SLASHPATCH_CACHE, or slashpatch's folder in the user's cache directory.
    """
    import platformdirs

    chosen = os.environ.get("SLASHPATCH_CACHE")
    return (
        Path(os.path.expanduser(chosen)) if chosen else platformdirs.user_cache_path("slashpatch")
    )


def require_writable(path: str | os.PathLike[str]) -> Path:
    """Return the path if a file can be written there, else raise OutputError.

    Call it before long work, so that no result is lost.
    """
    target = Path(path)
    folder = target.parent
    n_bytes = len(os.fsencode(target.name))
    if n_bytes > 200:
        raise OutputError(f"cannot write a file name of {n_bytes} bytes; expected at most 200")
    if os.path.isdir(target):
        raise OutputError(f"cannot write {str(target)!r}: it is a directory; expected a file name")
    if not os.path.isdir(folder):
        raise OutputError(
            f"cannot write {str(target)!r}: there is no directory {str(folder)!r}; create it first"
        )
    if not os.access(folder, os.W_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise OutputError(f"cannot write {str(target)!r}: permission denied")
    return target


def require_output(path: Path | None, suffixes: tuple[str, ...]) -> None:
    """Raise OutputError for a path that cannot be written or ends in another suffix; not for None.

    Call it before long work, so that no result is lost.
    """
    if path is None:
        return
    if path.suffix not in suffixes:
        raise OutputError(
            f"cannot write {str(path)!r}: expected a name that ends in {', '.join(suffixes)}"
        )
    require_writable(path)


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path that is moved to `path` if the block ends without an error."""
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
        temporary.chmod(0o666 & ~umask)  # mkstemp creates files that only their owner can read
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


def write_json(path: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Write a .json file; NaN and infinities, which JSON lacks, become null. Raises OutputError."""
    with written_whole(path) as file:
        text = json.dumps(without_nan(record), ensure_ascii=False, indent=1, allow_nan=False)
        file.write_text(text, encoding="utf-8")


def load_json(
    path: str | os.PathLike[str], build: Callable[[dict[str, Any]], Any], what: str
) -> Any:
    """Return `build(record)` for the JSON object in a file.

    Raises OutputError, which says that the file is not `what`, for other files and those for whose
    record `build` raises.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise TypeError(f"expected a JSON object, got {type(record).__name__}")
        return build(record)
    except FileNotFoundError:
        raise OutputError(f"no file {str(path)!r}; expected {what}") from None
    except OutputError:
        raise
    except DAMAGED as why:
        raise OutputError(f"{str(path)!r} is not {what}: {said(why)}") from None


def said(why: BaseException) -> str:
    """Return an error's type and message on one line, cut where it is long."""
    message = " ".join(str(why).split())
    return f"{type(why).__name__}: {message if len(message) <= 200 else message[:200] + '…'}"


def save_tensors(
    path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Write tensors and a header of JSON values as a .safetensors file. Raises OutputError."""
    from safetensors.torch import save_file

    with written_whole(path) as file:
        save_file(tensors, file, metadata={"slashpatch": json.dumps(header)})


def save_frame(path: str | os.PathLike[str], header: dict[str, Any], frame: pd.DataFrame) -> None:
    """Write a DataFrame and a header of JSON values as a .parquet file. Raises OutputError."""
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pandas(frame, preserve_index=False)
    metadata = {**(table.schema.metadata or {}), b"slashpatch": json.dumps(header).encode()}
    with written_whole(path) as file:
        parquet.write_table(table.replace_schema_metadata(metadata), file)


def load_frame(
    path: str | os.PathLike[str],
    format: str,
    build: Callable[[dict[str, Any], pd.DataFrame], Any],
    error: type[SlashpatchError],
) -> Any:
    """Return `build(header, frame)` for a file that `save_frame` wrote.

    Raises `error` for other files: those whose header has another `format`, and those for whose
    parts `build` raises.
    """
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.ParquetFile(Path(path)).read()
        header = json.loads((table.schema.metadata or {}).get(b"slashpatch", b"{}"))
        if header.get("format") != format:
            raise error(f"{str(path)!r} holds nothing of the format {format}; choose another file")
        return build(header, table.to_pandas())
    except FileNotFoundError:
        raise error(f"no file {str(path)!r}; expected a file of the format {format}") from None
    except error:
        raise
    except (ArrowException, *DAMAGED) as why:
        raise error(f"{str(path)!r} is no file of the format {format}: {said(why)}") from None


def load_tensors(
    path: str | os.PathLike[str],
    format: str | tuple[str, ...],
    build: Callable[[dict[str, Any], dict[str, Tensor]], Any],
    error: type[SlashpatchError],
) -> Any:
    """Return `build(header, tensors)` for a file that `save_tensors` wrote.

    `format` may be several, the newest first. Raises `error` for other files: those whose header
    has another format, and those for whose parts `build` raises.
    """
    from safetensors import SafetensorError, safe_open

    formats = (format,) if isinstance(format, str) else format
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("slashpatch", "{}"))
            if header.get("format") not in formats:
                raise error(
                    f"{str(path)!r} holds nothing of the format {formats[0]}; choose another file"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return build(header, tensors)
    except FileNotFoundError:
        raise error(f"no file {str(path)!r}; expected a file of the format {formats[0]}") from None
    except error:
        raise
    except (SafetensorError, *DAMAGED) as why:
        raise error(f"{str(path)!r} is no file of the format {formats[0]}: {said(why)}") from None


def without_nan(value: Any) -> Any:
    """Return a copy in which NaN and infinities are None, because JSON has no such numbers."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return value
