"""`slashpatch scan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.files import require_output
from ..errors import EditError, ScanError
from .length import announce_long_run, tokens_per_prompt
from .options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    EditOption,
    Engine,
    EngineOption,
    JsonOption,
    KappaOption,
    ModelOption,
    OffsetsOption,
    PlotOption,
    RandomOption,
    SeedOption,
    TextOption,
    WorkersOption,
    load_bridge,
)
from .output import FIGURE_SUFFIXES, new_console, print_json, print_written


def scan(
    model: ModelOption = None,
    text: TextOption = None,
    random_tokens: RandomOption = False,
    offsets: OffsetsOption = "0-15",
    kappa: KappaOption = 0.1,
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts.")] = 8,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per prompt. Default: 512, or the model's context."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Rows of the table to print.")] = 20,
    lines: Annotated[
        bool,
        typer.Option(
            "--lines",
            help="Find lines at all offsets, near and far, that stand out of those around them.",
        ),
    ] = False,
    edit: EditOption = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Save as .safetensors, .parquet, .csv or .json."),
    ] = None,
    plot: PlotOption = None,
    as_json: JsonOption = False,
    engine: EngineOption = Engine.auto,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    workers: WorkersOption = None,
) -> None:
    """Find the slash heads of a model, on natural text and on random tokens."""
    from ..data.files import TABLE_SUFFIXES, write_table
    from ..maths.offsets import as_offsets
    from ..patching.patch import patch
    from ..scanning.lines import LEAST_PROMPTS
    from ..scanning.result import require_kappa
    from ..scanning.scan import scan as run_scan

    wanted = as_offsets(offsets)
    require_kappa(kappa)
    if text is not None and random_tokens:
        raise EditError("give --text or --random-tokens, not both")
    require_output(out, (".safetensors", *TABLE_SUFFIXES))
    require_output(plot, FIGURE_SUFFIXES)
    bridge = load_bridge(model, device, dtype)
    n_tokens = tokens_per_prompt(bridge, max_tokens, 512)
    saved = out is not None and out.suffix == ".safetensors"
    # Moments take about as long as slash scores; natural text is followed by random tokens.
    announce_long_run(bridge, prompts, n_tokens, 1 + saved + (not random_tokens), workers)
    common: dict[str, Any] = {
        "offsets": wanted,
        "engine": engine.value,
        "n_prompts": prompts,
        "max_tokens": n_tokens,
        "seed": seed,
        "workers": workers,
        "lines": lines,
    }
    if lines and prompts < LEAST_PROMPTS and text is None:
        raise ScanError(f"--lines needs at least {LEAST_PROMPTS} prompts; got --prompts {prompts}")
    with patch(bridge, *(edit or ())):
        if random_tokens:
            found, control = run_scan(bridge, random_tokens=True, moments=saved, **common), None
        else:
            found = run_scan(bridge, text, moments=saved, **common)
            control = run_scan(bridge, random_tokens=True, moments=False, **common)
    if out is not None and saved:
        found.save(out)
    elif out is not None:
        frame = found.to_dataframe()
        if control is not None:
            frame["random_tokens"] = control.scores.flatten().numpy()
        write_table(frame, out)
    found_lines = found.lines() if lines else None
    if plot is not None:
        from ..reporting.figures import save_figure, scan_figure
        from ..reporting.lines import lines_figure

        shown = scan_figure(found, control, kappa)
        save_figure(shown if found_lines is None else lines_figure(found, found_lines), plot)
    if as_json:
        record = _scan_record(found, control, kappa)
        if lines:
            record["lines"] = found.lines_to_dataframe().to_dict(orient="records")
        print_json(record)
        return
    from ..reporting.tables import heatmap, scan_table, side_by_side

    console = new_console()
    left = heatmap(found.scores.nan_to_num(0).amax(-1), _title(found))
    if control is None:
        console.print(left)
    else:
        right = heatmap(control.scores.nan_to_num(0).amax(-1), _title(control))
        console.print(side_by_side(left, right, console.width))
    console.print()
    console.print(scan_table(found, kappa, top, control))
    if found_lines is not None:
        from ..reporting.lines import lines_table

        console.print()
        console.print(lines_table(found, found_lines, top, control))
    print_written(console, out, plot)


def _title(found: Any) -> str:
    """Return the title of a scan's heatmap."""
    first, last = found.offsets[0], found.offsets[-1]
    source = found.provenance["prompts"][0]["source"].partition(",")[0]
    return f"{source}: highest score over Δ {first} to {last}"


def _scan_record(found: Any, control: Any, kappa: float) -> dict[str, Any]:
    """Return what --json prints: the slash heads, with their scores on random tokens."""
    rows = []
    for entry in found.slash_heads(kappa):
        low, high = entry.interval
        row = {
            "head": str(entry.head),
            "offset": entry.offset,
            "score": entry.score,
            "low": low,
            "high": high,
        }
        if control is not None:
            at = (entry.head.layer, entry.head.head, control.offsets.index(entry.offset))
            row["random_tokens"] = float(control.scores[at])
        rows.append(row)
    return {
        "kappa": kappa,
        "offsets": list(found.offsets),
        "n_tokens": found.n_tokens,
        "slash_heads": rows,
        "provenance": found.provenance,
        "control": None if control is None else control.provenance,
    }
