"""`slashpatch dose`, `ablations` and `circuit`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import EditError
from .effects import OutOption, PromptsOption, ResumeOption, RowsOption, require_outputs, show
from .length import announce_long_run, tokens_per_prompt
from .options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelOption,
    PlotOption,
    RandomOption,
    SeedOption,
    TextOption,
    WorkersOption,
    load_bridge,
    require_readable,
)

#: Of a step of the fit, in forward passes: forward and backward, without the layers before.
_PASSES_OF_A_STEP = 2


class Mode(str, Enum):
    """How heads are ablated."""

    zero = "zero"
    mean = "mean"
    resample = "resample"
    optimal = "optimal"


MetricsOption = Annotated[
    list[str] | None,
    typer.Option(metavar="METRIC", help="As for measure; may be repeated. Default: loss."),
]
LengthOption = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens per prompt. Default: 65, or the model's context."),
]


def dose(
    edit: Annotated[
        str, typer.Argument(metavar="EDIT", help="An edit with {} in the place of the number.")
    ],
    values: Annotated[
        str, typer.Argument(metavar="VALUES", help="start:stop:step, both included, or 1,2,4.")
    ],
    model: ModelOption = None,
    metric: MetricsOption = None,
    control: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[:N]", help="As for measure; may be repeated."),
    ] = None,
    text: TextOption = None,
    random_tokens: RandomOption = False,
    prompts: PromptsOption = 16,
    max_tokens: LengthOption = None,
    top: RowsOption = 60,
    out: OutOption = None,
    resume: ResumeOption = False,
    plot: PlotOption = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    workers: WorkersOption = None,
) -> None:
    """Measure an edit over a range of the number in it: a curve with intervals, and its trend."""
    from ..effects.controls.by_name import as_control
    from ..effects.dose import dose as run
    from ..effects.doses.edits import as_doses, require_template
    from ..effects.metrics.by_name import as_metric

    _require_out(resume, out)
    require_template(edit)
    doses, metrics = as_doses(values), metric or ["loss"]
    for name in metrics:
        as_metric(name)
    controls = [as_control(spec) for spec in control or ()]
    require_outputs(out, plot, text, random_tokens)
    bridge = load_bridge(model, device, dtype)
    n_tokens = tokens_per_prompt(bridge, max_tokens, 65)
    if not resume:  # how much is left is not known here
        passes = 1 + len(doses) * (1 + sum(drawn.most for drawn in controls))
        announce_long_run(bridge, prompts, n_tokens, passes, workers)
    result = run(
        bridge,
        edit,
        doses,
        metrics,
        text,
        controls,
        path=out,
        resume=resume,
        random_tokens=random_tokens,
        n_prompts=prompts,
        max_tokens=n_tokens,
        seed=seed,
        workers=workers,
    )
    show(result, out, plot, as_json, top, saved=True)


def ablations(
    heads: Annotated[
        str, typer.Argument(metavar="HEADS", help="Heads to ablate together, such as L16H0.")
    ],
    model: ModelOption = None,
    metric: MetricsOption = None,
    fit_metric: Annotated[
        str | None,
        typer.Option(metavar="METRIC", help="What the fit minimises. Default: the first --metric."),
    ] = None,
    constants: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Save the fitted constants as .safetensors."),
    ] = None,
    text: TextOption = None,
    random_tokens: RandomOption = False,
    prompts: PromptsOption = 16,
    fit_prompts: Annotated[int, typer.Option(min=2, help="Number of prompts for the fit.")] = 8,
    steps: Annotated[int, typer.Option(min=0, help="Largest number of steps of the fit.")] = 60,
    max_tokens: LengthOption = None,
    top: RowsOption = 40,
    out: OutOption = None,
    plot: PlotOption = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    workers: WorkersOption = None,
) -> None:
    """Ablate heads by zero, mean, another token's output and a fitted constant, in one table."""
    from ..data.files import require_output
    from ..effects.ablations import ablations as run
    from ..effects.fit_ablation import lower_is_better
    from ..effects.metrics.by_name import as_metric

    require_readable(heads)
    metrics = metric or ["loss"]
    for name in metrics:
        as_metric(name)
    lower_is_better(fit_metric or metrics[0])
    require_output(constants, (".safetensors",))
    require_outputs(out, plot, text, random_tokens)
    bridge = load_bridge(model, device, dtype)
    n_tokens = tokens_per_prompt(bridge, max_tokens, 65)
    passes = 5 + _PASSES_OF_A_STEP * steps * fit_prompts // prompts
    announce_long_run(bridge, prompts, n_tokens, passes)
    result = run(
        bridge,
        heads,
        metrics,
        text,
        fit_metric=fit_metric,
        constants_path=constants,
        random_tokens=random_tokens,
        n_prompts=prompts,
        n_fit=fit_prompts,
        max_tokens=n_tokens,
        steps=steps,
        seed=seed,
        workers=workers,
    )
    show(result, out, plot, as_json, top)


def circuit(
    members: Annotated[
        str,
        typer.Argument(
            metavar="MEMBERS", help="Heads or diagonals, such as 'L16H0, L19H3' or 'L16H0@1'."
        ),
    ],
    model: ModelOption = None,
    metric: Annotated[
        str, typer.Option(metavar="METRIC", help="One metric, as for measure.")
    ] = "copying",
    mode: Annotated[Mode, typer.Option(help="How the other heads are ablated.")] = Mode.mean,
    constants: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --mode optimal: constants of all heads."),
    ] = None,
    subsets: Annotated[
        int, typer.Option(min=1, help="Random subsets of the members to leave out.")
    ] = 8,
    random_sets: Annotated[
        int, typer.Option(min=1, help="Random sets of as many heads in each layer.")
    ] = 19,
    text: TextOption = None,
    random_tokens: RandomOption = False,
    prompts: PromptsOption = 16,
    max_tokens: LengthOption = None,
    top: RowsOption = 40,
    out: OutOption = None,
    resume: ResumeOption = False,
    plot: PlotOption = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    workers: WorkersOption = None,
) -> None:
    """Measure how much a set of heads does alone, and what is left without it."""
    from ..edits import Constants
    from ..effects.circuit import circuit as run
    from ..effects.metrics.by_name import as_metric

    _require_out(resume, out)
    as_metric(metric)
    if (mode is Mode.optimal) != (constants is not None):
        raise EditError(
            "--mode optimal and --constants go together; fit the constants for all heads of the "
            "model, such as by: slashpatch ablations L0-31 --constants FILE"
        )
    fitted = None if constants is None else Constants.load(constants)
    require_outputs(out, plot, text, random_tokens)
    bridge = load_bridge(model, device, dtype)
    n_tokens = tokens_per_prompt(bridge, max_tokens, 65)
    if not resume:  # how much is left is not known here
        n_members = members.count(",") + 1
        passes = 4 + n_members + min(2 * subsets, 2 ** (n_members + 1)) + random_sets
        announce_long_run(bridge, prompts, n_tokens, passes, workers)
    result = run(
        bridge,
        members,
        metric,
        text,
        mode=mode.value,
        constants=fitted,
        n_subsets=subsets,
        n_random=random_sets,
        path=out,
        resume=resume,
        random_tokens=random_tokens,
        n_prompts=prompts,
        max_tokens=n_tokens,
        seed=seed,
        workers=workers,
    )
    show(result, out, plot, as_json, top, saved=True)


def _require_out(resume: bool, out: Path | None) -> None:
    """Raise EditError for --resume without --out."""
    if resume and out is None:
        raise EditError("--resume goes with --out: the file of the run to continue")
