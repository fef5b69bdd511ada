"""Options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def _workers(text: str | None) -> str | None:
    """Return the text, which was checked. Raises WorkerError or ExtraError."""
    if text is not None:  # otherwise without importing torch
        from ..bridge.workers.options import as_workers

        as_workers(text)
    return text


class Device(str, Enum):
    """Devices that a model can run on, and placements of models larger than one device."""

    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"
    auto = "auto"
    disk = "disk"


class Dtype(str, Enum):
    """Dtypes of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class Engine(str, Enum):
    """Attention engines."""

    auto = "auto"
    fused = "fused"
    bridge = "bridge"


EngineOption = Annotated[
    Engine,
    typer.Option(
        help="Flash attention (fused), TransformerLens' own (bridge), or fused where exact."
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="Transformers directory, .gguf file or hub id. Default: SmolLM2-135M-Instruct.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of all random draws.")]
DeviceOption = Annotated[
    Device | None,
    typer.Option(
        help="Where the model runs. Default: CUDA, then MPS, then CPU. For larger models: auto "
        "(all GPUs, or CPU and then disk), or disk (each weight is read when it is needed)."
    ),
]
DtypeOption = Annotated[Dtype, typer.Option(help="Precision of the weights.")]
KappaOption = Annotated[float, typer.Option(help="Lowest score of a slash head.")]
OffsetsOption = Annotated[str, typer.Option(help="Offsets Δ, such as 0-15 or 1,2,8.")]
EditOption = Annotated[
    list[str] | None,
    typer.Option(
        "--edit",
        "-e",
        metavar="EDIT",
        help="An edit, such as 'KnockOut(L16H0, 1)'; may be repeated.",
    ),
]
TokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Number of tokens to generate.")
]
TextOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Text file to take prompts from, instead of the built-in text."
    ),
]
RandomOption = Annotated[
    bool, typer.Option("--random-tokens", help="Use random tokens as prompts.")
]
WorkersOption = Annotated[
    str | None,
    typer.Option(
        "--workers",
        callback=_workers,
        metavar="N",
        help="Number of worker processes (by Ray), of one thread each; 8x4 is 8 of 4 threads each. "
        "Default: none, all in this process.",
    ),
]
PlotOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Save a figure as .png, .svg or .pdf.")
]


def load_bridge(model: str | None, device: Device | None, dtype: Dtype) -> TransformerBridge:
    """Return the model that the options name, as a bridge."""
    from ..bridge.loading import load

    if device in (Device.auto, Device.disk):
        return load(model, dtype=dtype.value, device_map=device.value)
    return load(model, device.value if device else None, dtype.value)


def require_readable(heads: str) -> None:
    """Raise HeadError for a misspelt head, before the model is loaded."""
    from ..data.heads import heads as as_heads

    as_heads(heads, n_heads=1)  # which heads a whole layer has is known after that
