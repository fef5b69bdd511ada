"""`slashpatch screen`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import EditError
from .effects import (
    EditOfHeads,
    HeadsOption,
    OffsetsOption,
    OutOption,
    PromptsOption,
    ResumeOption,
    RowsOption,
    require_outputs,
    show,
)
from .length import tokens_per_prompt
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


def screen(
    model: ModelOption = None,
    edit: EditOfHeads = "KnockOut({head}, 1)",
    heads: HeadsOption = None,
    offsets: OffsetsOption = None,
    metric: Annotated[
        str, typer.Option(metavar="METRIC", help="One metric, as for measure.")
    ] = "copying",
    proxy: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC", help="Estimate by another metric, where --metric has no gradient."
        ),
    ] = None,
    verify: Annotated[
        int, typer.Option(min=1, help="Rows of largest estimate to run exactly.")
    ] = 32,
    audit: Annotated[
        int, typer.Option(min=0, help="Other rows to run exactly, drawn at random.")
    ] = 32,
    above: Annotated[
        float | None,
        typer.Option(
            min=0, help="Effect that the audit asks about. Default: the 10th largest that was run."
        ),
    ] = None,
    no_split: Annotated[
        bool,
        typer.Option("--no-split", help="Estimate and run on all prompts, instead of half each."),
    ] = False,
    text: TextOption = None,
    random_tokens: RandomOption = False,
    prompts: PromptsOption = 16,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per prompt. Default: 65, or the model's context."),
    ] = None,
    top: RowsOption = 20,
    out: OutOption = None,
    resume: ResumeOption = False,
    plot: PlotOption = None,
    as_json: JsonOption = False,
    workers: WorkersOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Estimate an edit's effect at every head by gradients, and run the largest ones exactly."""
    from ..effects.metrics.by_name import as_metric
    from ..effects.running.gradients import require_gradient
    from ..effects.screen import screen as run

    if resume and out is None:
        raise EditError("--resume goes with --out: the file of the screen to continue")
    if heads is not None:
        require_readable(heads)
    as_metric(metric)
    require_gradient(as_metric(proxy or metric))
    require_outputs(out, plot, text, random_tokens)
    bridge = load_bridge(model, device, dtype)
    result = run(
        bridge,
        edit,
        heads,
        metric,
        text,
        offsets=offsets,
        verify=verify,
        audit=audit,
        split=not no_split,
        proxy=proxy,
        above=above,
        path=out,
        resume=resume,
        random_tokens=random_tokens,
        n_prompts=prompts,
        max_tokens=tokens_per_prompt(bridge, max_tokens, 65),
        workers=workers,
        seed=seed,
    )
    show(result, out, plot, as_json, top, saved=True)
