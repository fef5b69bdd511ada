"""`slashpatch evidence`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import EditError
from .effects import ResumeOption
from .options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelOption,
    PlotOption,
    SeedOption,
    TextOption,
    WorkersOption,
    load_bridge,
)
from .output import FIGURE_SUFFIXES, new_console, print_json, print_written


def evidence(
    model: ModelOption = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Fewer and shorter prompts: a sixth of the time."),
    ] = False,
    text: TextOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File to write: a page (.html, .md), or .json, which --resume loads. Finished "
            "steps are kept next to it while it runs.",
        ),
    ] = None,
    resume: ResumeOption = False,
    plot: PlotOption = None,
    as_json: JsonOption = False,
    workers: WorkersOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Test every claim of the paper on a model: supported, contradicted or cannot tell."""
    from ..claims.evidence import evidence as run
    from ..claims.result import SUFFIXES
    from ..data.files import require_output

    if resume and out is None:
        raise EditError("--resume goes with --out: the file of the run to continue")
    require_output(out, SUFFIXES)
    require_output(plot, FIGURE_SUFFIXES)
    bridge = load_bridge(model, device, dtype)
    found = run(bridge, text, quick, path=out, resume=resume, seed=seed, workers=workers)
    if plot is not None:
        from ..reporting.figures import save_figure

        save_figure(found.plot(), plot)
    if as_json:
        print_json(found.to_dict())
        return
    from ..reporting.evidence import evidence_table

    console = new_console()
    console.print(evidence_table(found))
    print_written(console, out, plot)
