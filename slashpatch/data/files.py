"""Files are written whole or not at all."""

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

TABLE_SUFFIXES = (".csv", ".json", ".parquet")


def cache_dir() -> Path:
    """Where converted models are kept: $SLASHPATCH_CACHE, or the user's cache directory."""
    import platformdirs

    chosen = os.environ.get("SLASHPATCH_CACHE")
    return (
        Path(os.path.expanduser(chosen)) if chosen else platformdirs.user_cache_path("slashpatch")
    )


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


def save_tensors(
    path: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Write a .safetensors file with a header of JSON values, whole or not at all."""
    from safetensors.torch import save_file

    with written_whole(path) as file:
        save_file(tensors, file, metadata={"slashpatch": json.dumps(header)})


def load_tensors(
    path: str | os.PathLike[str],
    format: str,
    build: Callable[[dict[str, Any], dict[str, Tensor]], Any],
    error: type[SlashpatchError],
) -> Any:
    """What `build` makes of a header and tensors that `save_tensors` wrote with this format.

    Raises `error` for any other file, and where `build` cannot make anything of the parts.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("slashpatch", "{}"))
            if header.get("format") != format:
                raise error(f"{str(path)!r} holds nothing of the format {format}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return build(header, tensors)
    except FileNotFoundError:
        raise error(f"no file {str(path)!r}; expected one of the format {format}") from None
    except error:
        raise
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as why:
        raise error(
            f"{str(path)!r} is no file of the format {format}: {type(why).__name__}: {why}"
        ) from None


def without_nan(value: Any) -> Any:
    """The same with None for NaN and infinities, which JSON lacks."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return value
