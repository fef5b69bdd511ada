"""The folder of a run on text: whose it is, who trains in it, and its last checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ...data.files import require_writable, write_json
from ...errors import OutputError, TheoryError
from .run import SETTINGS, TextRun
from .settings import TextSettings


def require_folder(root: Path, settings: TextSettings, resume: bool) -> None:
    """Raise TheoryError for a folder with anything but this run; begin a new one in it."""
    if root.exists() and not root.is_dir():
        raise OutputError(f"{str(root)!r} is a file; expected the name of a folder")
    named = root / SETTINGS
    if not named.exists():
        if root.exists() and any(root.iterdir()):
            raise TheoryError(f"{str(root)!r} holds something else already; choose a new folder")
        _make(root)
        write_json(named, settings.to_dict())
        return
    saved = TextRun.settings_of(root)
    for name, value in settings.to_dict().items():
        if saved.to_dict()[name] != value:
            raise TheoryError(
                f"{str(root)!r} holds a run whose {name} is {saved.to_dict()[name]!r}, here it is "
                f"{value!r}; choose another folder"
            )
    if not resume:
        raise TheoryError(
            f"{str(root)!r} holds this run already; continue or load it with resume (--resume), or "
            "choose another folder"
        )


def _make(folder: Path) -> None:
    """Make a folder that files can be written to. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {str(folder)!r}: {error}") from None
    require_writable(folder / SETTINGS)


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Raise TheoryError if another process is in this block for the same folder.

    The system frees the lock of a process that is killed. Windows has no such locks.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    opened = os.open(root, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TheoryError(
                    f"another process is training in {str(root)!r}; wait until it ends, or choose "
                    "another folder"
                ) from None
        yield
    finally:
        os.close(opened)


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint that was written whole, and delete those that were not.

    The Trainer writes `trainer_state.json` last.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    for path in found:
        try:
            step = json.loads((path / "trainer_state.json").read_text())["global_step"]
        except (OSError, ValueError, KeyError):
            step = None
        if step == int(path.name.split("-")[1]):
            return str(path)
        shutil.rmtree(path)
    return None
