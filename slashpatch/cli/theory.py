"""`slashpatch theory`: train, phase, and text in a file of its own."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.files import require_output
from ..errors import TheoryError
from .options import JsonOption, KappaOption, PlotOption, SeedOption
from .output import FIGURE_SUFFIXES, new_console, print_json, print_written
from .text import text

theory = typer.Typer(
    help="Train models from scratch: when do slash heads emerge?",
    no_args_is_help=True,
)
theory.command()(text)


class Task(str, Enum):
    """Tasks that the model is trained on."""

    copying = "copying"
    regression = "regression"


class Optimizer(str, Enum):
    """Optimizers."""

    gd = "gd"
    adam = "adam"


ConeOption = Annotated[float, typer.Option(help="Strength of the embeddings' common direction.")]
FrequenciesOption = Annotated[
    str, typer.Option(help="all, high, medium, low, or θ's such as 1,0.5,0.1.")
]
TaskOption = Annotated[Task, typer.Option(help="Task that the model is trained on.")]
OffsetOption = Annotated[
    int, typer.Option(min=1, help="Offset Δ of the token that the task asks for.")
]
OptimizerOption = Annotated[Optimizer, typer.Option(help="Plain gradient descent, or Adam.")]
RateOption = Annotated[
    float | None,
    typer.Option("--learning-rate", help="Learning rate. Default: depends on task and optimizer."),
]
LengthOption = Annotated[int, typer.Option(min=4, help="Tokens of a sequence.")]
StepsOption = Annotated[int, typer.Option(min=0, help="Number of training steps.")]
SeedsOption = Annotated[int, typer.Option(min=1, help="Number of seeds, counted up from --seed.")]


@theory.command()
def train(
    cone: ConeOption = 1.0,
    frequencies: FrequenciesOption = "all",
    task: TaskOption = Task.copying,
    offset: OffsetOption = 1,
    optimizer: OptimizerOption = Optimizer.gd,
    learning_rate: RateOption = None,
    steps: StepsOption = 500,
    length: LengthOption = 64,
    seeds: SeedsOption = 3,
    kappa: KappaOption = 0.3,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Save the history as .parquet, .csv or .json."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Save the weights as .safetensors; with --seeds 1."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from --checkpoint, bit for bit.")
    ] = False,
    plot: PlotOption = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
) -> None:
    """Train, and show when the slash emerges in layer 1 and when layer 2 uses it."""
    from ..data.files import TABLE_SUFFIXES, write_table
    from ..theory import Settings
    from ..theory import train as run

    require_output(out, TABLE_SUFFIXES)
    require_output(plot, FIGURE_SUFFIXES)
    require_output(checkpoint, (".safetensors",))
    if checkpoint is not None and seeds != 1:
        raise TheoryError("a checkpoint holds one run; give --seeds 1")
    settings = [
        Settings(
            task=task.value,
            offset=offset,
            cone=cone,
            frequencies=as_frequencies(frequencies),
            length=length,
            optimizer=optimizer.value,
            learning_rate=learning_rate,
            steps=steps,
            seed=number,
        )
        for number in range(seed, seed + seeds)
    ]
    runs = [run(setting, checkpoint=checkpoint, resume=resume) for setting in settings]
    import pandas as pd

    frame = pd.concat([done.history.assign(seed=done.settings.seed) for done in runs])
    if out is not None:
        write_table(frame, out)
    if plot is not None:
        from ..reporting.figures import save_figure
        from ..reporting.theory import training_figure

        save_figure(training_figure(runs, kappa), plot)
    if as_json:
        print_json(
            {
                "settings": settings[0].to_dict(),
                "runs": [
                    {
                        "seed": done.settings.seed,
                        "time_to_slash": done.time_to(kappa),
                        "time_to_matching": done.time_to(kappa, "matching"),
                        "out_of_distribution": done.out_of_distribution(),
                        "history": done.rows,
                    }
                    for done in runs
                ],
                "kappa": kappa,
            }
        )
        return
    from ..reporting.theory import training_report

    console = new_console()
    console.print(training_report(runs, kappa), highlight=False)
    print_written(console, out, plot, checkpoint)


@theory.command()
def phase(
    rows: Annotated[str, typer.Option(help="A setting and its values.")] = "cone=0,0.25,0.5,1,2",
    columns: Annotated[
        str, typer.Option(help="Another setting and its values.")
    ] = "frequencies=high,medium,low,all",
    task: TaskOption = Task.copying,
    optimizer: OptimizerOption = Optimizer.gd,
    steps: StepsOption = 500,
    seeds: SeedsOption = 3,
    kappa: KappaOption = 0.3,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save as .parquet, .csv or .json.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the unfinished diagram in the file of --out.")
    ] = False,
    plot: PlotOption = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
) -> None:
    """Train over two settings, with several seeds: where slash heads emerge, and how soon."""
    from ..data.files import TABLE_SUFFIXES
    from ..theory import Settings, phase_diagram

    require_output(out, TABLE_SUFFIXES)
    require_output(plot, FIGURE_SUFFIXES)
    if resume and out is None:
        raise TheoryError("--resume goes with --out: the file of the diagram to continue")
    settings = Settings(task=task.value, optimizer=optimizer.value, steps=steps)
    frame = phase_diagram(
        settings,
        rows=_knob(rows),
        columns=_knob(columns),
        seeds=range(seed, seed + seeds),
        kappa=kappa,
        path=out,
        resume=resume,
    )
    if plot is not None:
        from ..reporting.figures import save_figure
        from ..reporting.theory import phase_figure

        save_figure(phase_figure(frame, kappa), plot)
    if as_json:
        print_json({"kappa": kappa, "runs": frame.to_dict(orient="records")})
        return
    from ..reporting.theory import phase_report

    console = new_console()
    console.print(phase_report(frame, kappa), highlight=False)
    print_written(console, out, plot)


def as_frequencies(text: str) -> str | tuple[float, ...]:
    """Return the name of a band, or frequencies θ."""
    parts = [part.strip() for part in text.split(",")]
    try:
        return tuple(float(part) for part in parts if part)
    except ValueError:
        return text


def _knob(text: str) -> tuple[str, list[Any]]:
    """Return the name and the values in `name=value,value,...`; numbers where they can be read."""
    name, equals, values = text.partition("=")
    if not equals or not values.strip():
        raise TheoryError(f"expected a knob and its values, such as cone=0,1,2; got {text!r}")
    return name.strip(), [_value(part.strip()) for part in values.split(",")]


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
