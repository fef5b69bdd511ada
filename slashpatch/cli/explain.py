"""`slashpatch explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.files import require_output
from ..errors import EditError
from .length import announce_long_run, tokens_per_prompt
from .options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    KappaOption,
    ModelOption,
    SeedOption,
    TextOption,
    load_bridge,
    require_readable,
)
from .output import new_console, print_json, print_written

#: Two scans, one of them with moments, the axis, one pass for queries and keys, one clean pass, and
#: 22 passes under edits, which run one layer only where there is one head.
_PASSES, _PASSES_OF_ONE = 28, 7


def explain(
    head: Annotated[
        str | None, typer.Argument(metavar="HEAD", help="A head, such as L16H0; not with --all.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Print a table of all heads that reach kappa.")
    ] = False,
    model: ModelOption = None,
    text: TextOption = None,
    offset: Annotated[
        int | None,
        typer.Option(
            min=0, help="Offset Δ. Default: where the head scores highest, on half of the prompts."
        ),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Number of prompts.")] = 8,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per prompt. Default: 256, or the model's context."),
    ] = None,
    kappa: KappaOption = 0.1,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Save one head as .json; --all as .parquet, .csv or .json."
        ),
    ] = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Explain why a head is a slash head: rank, RoPE frequencies, and its score without them."""
    from ..data.files import TABLE_SUFFIXES, write_table
    from ..explaining.explain import explain as explain_one
    from ..explaining.explain import explain_all
    from ..scanning.result import require_kappa

    require_kappa(kappa)
    if every == (head is not None):
        raise EditError("give one head, such as L16H0, or --all")
    if every and offset is not None:
        raise EditError("--offset goes with one head; --all takes each head's best")
    if head is not None:
        require_readable(head)
    if out is not None:
        require_output(out, TABLE_SUFFIXES if every else (".json",))
    bridge = load_bridge(model, device, dtype)
    n_tokens = tokens_per_prompt(bridge, max_tokens, 256)
    announce_long_run(bridge, prompts, n_tokens, _PASSES if every else _PASSES_OF_ONE)
    common: dict[str, Any] = {
        "n_prompts": prompts,
        "max_tokens": n_tokens,
        "kappa": kappa,
        "seed": seed,
    }
    console = new_console()
    if head is not None:
        explanation = explain_one(bridge, head, text, offset=offset, **common)
        if out is not None:
            explanation.save(out)
        if as_json:
            print_json(explanation.to_dict())
        else:
            from ..reporting.explanation import explanation_report

            console.print(explanation_report(explanation), highlight=False)
            print_written(console, out)
        return
    frame = explain_all(bridge, None, text, **common)
    if out is not None:
        write_table(frame, out)
    if as_json:
        print_json({"heads": frame.to_dict(orient="records")})
        return
    from ..reporting.explanation import explanations_table

    console.print(explanations_table(frame))
    print_written(console, out)
