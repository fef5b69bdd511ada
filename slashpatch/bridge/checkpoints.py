"""Checkpoints of one training run: folders that the Trainer wrote, and revisions on a model hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.progress import busy
from ..errors import ModelError
from .converted import _quiet_transformers
from .loading import _HUB_ID, load
from .wrapping import one_error, pick_device, pick_dtype

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_FOLDER = re.compile(r"checkpoint-(\d+)")
_REVISION_STEP = re.compile(r"step[-_]?(\d+)")
#: What is fetched of a revision: weights without pickle files, configuration and tokenizer.
_FETCHED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model"]


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, not yet loaded.

    Attributes:
        name: What it is called in tables; within one run of `emergence`, no two are called alike.
        step: The training step, if its name or its trainer_state.json says it.
        folder: Its Transformers directory; None for a revision on a model hub.
        revision: Hub id and revision; None for a folder.
    """

    name: str
    step: int | None
    folder: Path | None = None
    revision: tuple[str, str] | None = None

    @property
    def run(self) -> str:
        """What its training run is called: the hub id, or the name of the run's folder."""
        if self.revision is not None:
            return self.revision[0]
        folder = Path() if self.folder is None else self.folder.resolve()
        return folder.parent.name if _FOLDER.fullmatch(folder.name) else folder.name

    def state(self) -> str:
        """Return a digest of its files' names, sizes and times, by which changes are noticed."""
        if self.folder is None:
            return ""
        sha = hashlib.sha256()
        for path in sorted(self.folder.iterdir()):
            if path.suffix in (".safetensors", ".json", ".bin"):
                found = path.stat()
                sha.update(f"{path.name} {found.st_size} {found.st_mtime_ns}\n".encode())
        return sha.hexdigest()[:16]

    def loss(self) -> float | None:
        """Return the training loss that the Trainer logged last at this checkpoint, if any."""
        record = _trainer_state(self.folder)
        losses = [row["loss"] for row in record.get("log_history", []) if "loss" in row]
        return float(losses[-1]) if losses else None

    def load(self, device: Any = None, dtype: Any = None, tokenizer: Any = None) -> Any:
        """Return it as a TransformerBridge. Raises ModelError."""
        folder = self.folder
        if self.revision is not None:
            folder = _fetched(*self.revision)
        assert folder is not None
        if tokenizer is not None or any(folder.glob("tokenizer*")):
            return load(folder, device, dtype, tokenizer=tokenizer)
        return _without_tokenizer(folder, device, dtype)


def checkpoints(source: str | os.PathLike[str]) -> list[Checkpoint]:
    """Return the checkpoints that a text names.

    A Transformers directory is one; a directory that the Trainer wrote to is all its folders
    `checkpoint-N`, by step; `id@revision` is a revision of a model on the hub, whose step is the
    number in a name like `step1000`. Raises ModelError for anything else.
    """
    text = os.fspath(source)
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):
        below = [
            (int(match[1]), folder)
            for folder in path.iterdir()
            if (match := _FOLDER.fullmatch(folder.name)) and (folder / "config.json").is_file()
        ]
        if below:
            return [
                Checkpoint(str(Path(text) / folder.name), step, folder)
                for step, folder in sorted(below)
            ]
        if (path / "config.json").is_file():
            return [Checkpoint(text, _step(path), path)]
        raise ModelError(
            f"{text!r} has neither a config.json nor folders checkpoint-N with one; expected a "
            "Transformers directory, or a folder that the Trainer wrote checkpoints to"
        )
    name, at, revision = text.partition("@")
    if at and revision and _HUB_ID.fullmatch(name):
        match = _REVISION_STEP.search(revision)
        return [Checkpoint(text, int(match[1]) if match else None, None, (name, revision))]
    raise ModelError(
        f"no checkpoint {text!r}; expected a Transformers directory, a folder that the Trainer "
        "wrote checkpoint-N folders to, or a revision on the hub such as "
        "EleutherAI/pythia-160m@step1000"
    )


def _step(folder: Path) -> int | None:
    match = _FOLDER.fullmatch(folder.resolve().name) or _REVISION_STEP.fullmatch(
        folder.resolve().name
    )
    if match:
        return int(match[1])
    step = _trainer_state(folder).get("global_step")
    return step if type(step) is int else None


def _trainer_state(folder: Path | None) -> dict[str, Any]:
    """Return the record that the Trainer writes beside a checkpoint; empty if there is none."""
    if folder is None:
        return {}
    try:
        record = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _fetched(name: str, revision: str) -> Path:
    """Return the folder of a hub revision, fetched into the hub's own cache."""
    with busy(f"fetching {name}@{revision}"), one_error(f"cannot fetch {name}@{revision}"):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision, allow_patterns=_FETCHED))


def _without_tokenizer(folder: Path, device: Any, dtype: Any) -> TransformerBridge:
    """Return a bridge of a folder without a tokenizer, as the Trainer writes when it has none."""
    with _quiet_transformers(), one_error(f"cannot load {str(folder)!r}"):
        from transformers import AutoModelForCausalLM

        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=pick_dtype(dtype),
            attn_implementation="eager",
            output_loading_info=True,
        )
        if missing := sorted(info["missing_keys"]):
            raise ModelError(
                f"the weights lack {missing[0]} (and {len(missing) - 1} more) of the "
                f"{type(model).__name__} that config.json describes"
            )
        return load(model.to(pick_device(device)))
