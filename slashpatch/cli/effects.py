"""`slashpatch measure`, `flow`, `copying` and `sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..data.files import require_output
from ..errors import EditError
from .length import announce_long_run, sweep_passes, tokens_per_prompt
from .options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    EditOption,
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
from .output import FIGURE_SUFFIXES, new_console, print_json, print_written

if TYPE_CHECKING:
    from ..effects.result import Result

TogetherOption = Annotated[
    bool, typer.Option("--together", help="Apply all edits at once, instead of each by itself.")
]
PromptsOption = Annotated[
    int, typer.Option(min=1, help="Number of prompts; intervals are over prompts.")
]
OutOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Save the result as .parquet or .json, with provenance."),
]
RowsOption = Annotated[int, typer.Option("--top", min=1, help="Rows of the table to print.")]
EditOfHeads = Annotated[
    str,
    typer.Option(
        "--edit", "-e", metavar="EDIT", help="Edit with {head}, and {offset} with --offsets."
    ),
]
HeadsOption = Annotated[
    str | None,
    typer.Option(
        metavar="HEADS", help="Heads to try, such as 'L16H0, L11H0-3' or L1. Default: all."
    ),
]
OffsetsOption = Annotated[
    str | None,
    typer.Option(metavar="OFFSETS", help="Offsets Δ to try for each head, such as 0-3."),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue the unfinished run in the file of --out.")
]


def measure(
    model: ModelOption = None,
    edit: EditOption = None,
    together: TogetherOption = False,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METRIC",
            help="loss, kl, top1, loss-by-position, copying, copying-top1, prefix-matching or "
            "slash; may be repeated. Default: loss, kl and top1.",
        ),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:N]",
            help="random-heads, matched-heads, other-offsets or random-pairs, and how many draws "
            "(default: 19, or as many as there are); may be repeated.",
        ),
    ] = None,
    text: TextOption = None,
    random_tokens: RandomOption = False,
    prompts: PromptsOption = 16,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per prompt. Default: 128, or the model's context."),
    ] = None,
    top: RowsOption = 40,
    out: OutOption = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    workers: WorkersOption = None,
) -> None:
    """Measure the effects of edits, with intervals, tests and controls."""
    from ..effects.controls.by_name import as_control
    from ..effects.measure import measure as run
    from ..effects.metrics.by_name import as_metric

    conditions = edits_of(edit, together)
    metrics = metric or ["loss", "kl", "top1"]
    for name in metrics:
        as_metric(name)
    controls = [as_control(spec) for spec in control or ()]
    require_outputs(out, None, text, random_tokens)
    bridge = load_bridge(model, device, dtype)
    n_tokens = tokens_per_prompt(bridge, max_tokens, 128)
    draws = sum(drawn.most for drawn in controls)
    announce_long_run(bridge, prompts, n_tokens, 1 + len(conditions) * (1 + draws), workers)
    result = run(
        bridge,
        conditions,
        metrics,
        text,
        controls,
        random_tokens=random_tokens,
        n_prompts=prompts,
        max_tokens=n_tokens,
        seed=seed,
        workers=workers,
    )
    show(result, out, None, as_json, top)


def flow(
    model: ModelOption = None,
    edit: EditOption = None,
    together: TogetherOption = False,
    offsets: Annotated[str, typer.Option(help="Offsets Δ, such as 1-16 or 1,2,8.")] = "1-16",
    text: TextOption = None,
    random_tokens: RandomOption = False,
    prompts: PromptsOption = 16,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per prompt. Default: 64, or the model's context."),
    ] = None,
    replaced: Annotated[
        int, typer.Option(min=1, help="Number of tokens to replace in each prompt, one at a time.")
    ] = 16,
    top: RowsOption = 80,
    out: OutOption = None,
    plot: PlotOption = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    workers: WorkersOption = None,
) -> None:
    """Measure how much the token Δ back changes a prediction, by offset, clean and under edits."""
    from ..effects.flow import flow as run
    from ..maths.offsets import as_offsets

    conditions = edits_of(edit, together, needed=False)
    wanted = as_offsets(offsets)
    require_outputs(out, plot, text, random_tokens)
    bridge = load_bridge(model, device, dtype)
    n_tokens = tokens_per_prompt(bridge, max_tokens, 64)
    replacements = min(replaced, n_tokens)
    announce_long_run(
        bridge, prompts, n_tokens, (1 + len(conditions)) * (1 + replacements), workers
    )
    result = run(
        bridge,
        text,
        conditions,
        wanted,
        random_tokens=random_tokens,
        n_replaced=replaced,
        n_prompts=prompts,
        max_tokens=n_tokens,
        seed=seed,
        workers=workers,
    )
    show(result, out, plot, as_json, top)


def copying(
    model: ModelOption = None,
    edit: EditOption = None,
    together: TogetherOption = False,
    lags: Annotated[int, typer.Option(min=1, help="Measure lags 1 to this one.")] = 4,
    prompts: PromptsOption = 16,
    tokens: Annotated[
        int, typer.Option(min=2, help="Tokens of one copy; the prompt holds two.")
    ] = 50,
    top: RowsOption = 40,
    out: OutOption = None,
    plot: PlotOption = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Measure which token the model copies on repeated random tokens: the next, or a later one."""
    from ..effects.copying import copying as run

    conditions = edits_of(edit, together, needed=False)
    require_outputs(out, plot, None, False)
    bridge = load_bridge(model, device, dtype)
    n_tokens = min(2 * tokens, bridge.cfg.n_ctx)
    announce_long_run(bridge, prompts, n_tokens, 1 + len(conditions))
    result = run(
        bridge, conditions, range(1, lags + 1), n_prompts=prompts, n_tokens=tokens, seed=seed
    )
    show(result, out, plot, as_json, top)


def sweep(
    model: ModelOption = None,
    edit: EditOfHeads = "KnockOut({head}, 1)",
    heads: HeadsOption = None,
    offsets: OffsetsOption = None,
    metric: Annotated[
        str, typer.Option(metavar="METRIC", help="One metric, as for measure.")
    ] = "copying",
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
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    workers: WorkersOption = None,
) -> None:
    """Apply one edit at every head in turn; --resume continues a run that was stopped."""
    from ..effects.metrics.by_name import as_metric
    from ..effects.sweep import sweep as run

    if resume and out is None:
        raise EditError("--resume goes with --out: the file of the sweep to continue")
    if heads is not None:
        require_readable(heads)
    as_metric(metric)
    require_outputs(out, plot, text, random_tokens)
    bridge = load_bridge(model, device, dtype)
    n_tokens = tokens_per_prompt(bridge, max_tokens, 65)
    if not resume:  # how much is left is not known here
        announce_long_run(bridge, prompts, n_tokens, sweep_passes(bridge, heads, offsets), workers)
    result = run(
        bridge,
        edit,
        heads,
        metric,
        text,
        offsets=offsets,
        path=out,
        resume=resume,
        random_tokens=random_tokens,
        n_prompts=prompts,
        max_tokens=n_tokens,
        seed=seed,
        workers=workers,
    )
    show(result, out, plot, as_json, top, saved=True)


def edits_of(typed: list[str] | None, together: bool, needed: bool = True) -> list[Any]:
    """Return the edits that were typed; as one inner list where they act together."""
    from ..edits import parse_edit

    edits = [parse_edit(text) for text in typed or ()]
    if needed and not edits:
        raise EditError("give at least one --edit, such as --edit 'KnockOut(L16H0, 1)'")
    return [edits] if together and edits else edits


def require_outputs(
    out: Path | None, plot: Path | None, text: Path | None, random_tokens: bool
) -> None:
    """Check options against one another and output paths, before the model is loaded."""
    from ..effects.result import SUFFIXES

    if text is not None and random_tokens:
        raise EditError("give --text or --random-tokens, not both")
    require_output(out, SUFFIXES)
    require_output(plot, FIGURE_SUFFIXES)


def show(
    result: Result,
    out: Path | None,
    plot: Path | None,
    as_json: bool,
    top: int,
    saved: bool = False,
) -> None:
    """Save a result unless it is saved already, draw it, and print it as a table or as JSON."""
    if out is not None and not saved:
        result.save(out)
    if plot is not None:
        from ..reporting.figures import effects_figure, save_figure

        save_figure(effects_figure(result), plot)
    if as_json:
        print_json(result.to_dict())
        return
    from ..reporting.effects import effects_report

    console = new_console()
    console.print(effects_report(result, top), highlight=False)
    print_written(console, out, plot)
