"""`slashpatch emergence`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..data.files import require_output
from ..errors import EmergenceError
from .options import (
    Device,
    DeviceOption,
    Dtype,
    DtypeOption,
    Engine,
    EngineOption,
    JsonOption,
    KappaOption,
    OffsetsOption,
    PlotOption,
    RandomOption,
    SeedOption,
    TextOption,
)
from .output import FIGURE_SUFFIXES, new_console, print_json, print_written


def emergence(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT...",
            help="A Trainer's output folder, Transformers directories, or hub revisions such as "
            "EleutherAI/pythia-160m@step1000.",
        ),
    ],
    measures: Annotated[
        str | None,
        typer.Option(help="Measures besides slash scores: rank, cone, bands, prefix, copying."),
    ] = None,
    text: TextOption = None,
    random_tokens: RandomOption = False,
    offsets: OffsetsOption = "0-15",
    kappa: KappaOption = 0.1,
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts.")] = 8,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per prompt. Default: 512, or the model's context."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Save as .parquet, after each checkpoint."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Leave out the checkpoints that --out has already.")
    ] = False,
    plot: PlotOption = None,
    log_steps: Annotated[
        bool, typer.Option("--log-steps", help="Draw a logarithmic axis of steps.")
    ] = False,
    as_json: JsonOption = False,
    engine: EngineOption = Engine.auto,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Measure every head at each checkpoint of a training run: when do slash heads form?"""
    from ..scanning.emergence import emergence as run
    from ..scanning.result import require_kappa

    require_kappa(kappa)
    if text is not None and random_tokens:
        raise EmergenceError("give --text or --random-tokens, not both")
    if resume and out is None:
        raise EmergenceError("--resume goes with --out: the file of the run to continue")
    if device in (Device.auto, Device.disk):
        raise EmergenceError(
            f"--device {device.value} is not for checkpoints; each is loaded on one device: cpu, "
            "cuda or mps"
        )
    require_output(out, (".parquet",))
    require_output(plot, FIGURE_SUFFIXES)
    found = run(
        checkpoints,
        text,
        offsets,
        measures=[name.strip() for name in (measures or "").split(",") if name.strip()],
        engine=engine.value,
        random_tokens=random_tokens,
        n_prompts=prompts,
        max_tokens=max_tokens,
        seed=seed,
        device=device.value if device else None,
        dtype=dtype.value,
        path=out,
        resume=resume,
    )
    if plot is not None:
        from ..reporting.figures import save_figure

        save_figure(found.plot(kappa=kappa, log_steps=log_steps), plot)
    if as_json:
        print_json(
            {
                "kappa": kappa,
                "steps": found.summary(kappa).to_dict(orient="records"),
                "first_steps": found.first_steps(kappa).to_dict(orient="records"),
                "provenance": found.provenance,
            }
        )
        return
    from ..reporting.emergence import emergence_table

    console = new_console()
    console.print(emergence_table(found, kappa))
    print_written(console, out, plot)
