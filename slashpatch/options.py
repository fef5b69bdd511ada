"""Options that several commands share."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class Device(str, Enum):
    """Where the model runs."""

    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Dtype(str, Enum):
    """Precision of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class Engine(str, Enum):
    """Which attention runs."""

    auto = "auto"
    fused = "fused"
    bridge = "bridge"


EngineOption = Annotated[
    Engine, typer.Option(help="Flash attention, TransformerLens' own, or the first if exact.")
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
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="Transformers directory, .gguf file or hub id. Default: SmolLM2-135M-Instruct.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
SeedOption = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="Of everything drawn at random.")
]
DeviceOption = Annotated[Device | None, typer.Option(help="Default: CUDA, then MPS, then CPU.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Precision of the weights.")]
KappaOption = Annotated[float, typer.Option(help="Score from which a head is a slash head.")]
OffsetsOption = Annotated[str, typer.Option(help="Offsets Δ, such as 0-15 or 1,2,8.")]
EditOption = Annotated[
    list[str] | None,
    typer.Option(
        "--edit", "-e", metavar="EDIT", help="Such as 'KnockOut(L16H0, 1)'; may be repeated."
    ),
]
TokensOption = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate.")]
