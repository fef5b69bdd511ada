"""`slashpatch pairs` and `direct`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import EditError
from .effects import (
    OutOption,
    PromptsOption,
    RowsOption,
    TogetherOption,
    edits_of,
    require_outputs,
    show,
)
from .length import announce_long_run, tokens_per_prompt
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
    load_bridge,
)


class Direction(str, Enum):
    """Into which run activations are patched."""

    both = "both"
    denoising = "denoising"
    noising = "noising"


def pairs(
    model: ModelOption = None,
    heads: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HEADS",
            help="Heads, such as 'L16H0, L11H0-3'; L16H0.k is a head's keys, L16H0@1 its diagonal "
            "of offset 1; may be repeated.",
        ),
    ] = None,
    together: Annotated[
        bool, typer.Option("--together", help="Patch all of them at once, instead of each alone.")
    ] = False,
    parts: Annotated[
        str | None,
        typer.Option(
            metavar="PARTS",
            help="What to patch of heads that name no part: some of z, q, k, v, diagonal. "
            "Default: z, or the diagonals of --offsets.",
        ),
    ] = None,
    offsets: Annotated[
        str | None,
        typer.Option(metavar="OFFSETS", help="Offsets Δ of the diagonals of heads, such as 0-3."),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A .jsonl or .csv file of clean, corrupt, right and wrong, instead of copying "
            "pairs.",
        ),
    ] = None,
    direction: Annotated[
        Direction,
        typer.Option(
            help="denoising: clean activations into the corrupt run; noising: corrupt ones into "
            "the clean run."
        ),
    ] = Direction.both,
    prompts: Annotated[int, typer.Option(min=2, help="Number of copying pairs.")] = 16,
    tokens: Annotated[
        int, typer.Option(min=5, help="Tokens of the first copy in copying pairs.")
    ] = 25,
    top: RowsOption = 40,
    out: OutOption = None,
    plot: PlotOption = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Patch activations between clean and corrupt prompts; read the logit difference."""
    from .. import bridge as bridges
    from ..effects.activation_patching import DIRECTIONS, activation_patching
    from ..effects.between_runs.pairs import as_pairs
    from ..effects.between_runs.targets import targets

    if not heads:
        raise EditError("give at least one --heads, such as --heads L16H0 or --heads L16H0@1")
    require_outputs(out, plot, None, False)
    bridge = load_bridge(model, device, dtype)
    wanted = [list(heads)] if together else list(heads)
    directions = tuple(DIRECTIONS) if direction is Direction.both else (direction.value,)
    groups = targets(bridges.read(bridge), wanted, parts, offsets)
    chosen = as_pairs(bridge, pairs, n_prompts=prompts, n_tokens=tokens, seed=seed)
    passes = 4 + len(groups) * len(directions)
    announce_long_run(bridge, len(chosen), max(map(len, chosen.clean)), passes)
    result = activation_patching(
        bridge, wanted, chosen, parts=parts, offsets=offsets, directions=directions, seed=seed
    )
    show(result, out, plot, as_json, top)


def direct(
    model: ModelOption = None,
    edit: EditOption = None,
    together: TogetherOption = False,
    metric: Annotated[
        str, typer.Option(metavar="METRIC", help="One metric of logits, as for measure.")
    ] = "copying",
    text: TextOption = None,
    random_tokens: RandomOption = False,
    prompts: PromptsOption = 16,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per prompt. Default: 65, or the model's context."),
    ] = None,
    top: RowsOption = 40,
    out: OutOption = None,
    plot: PlotOption = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Measure direct and total effects of edits, and what later layers repair."""
    from ..effects.direct import direct_effect
    from ..effects.metrics.by_name import as_metric

    conditions = edits_of(edit, together)
    as_metric(metric)
    require_outputs(out, plot, text, random_tokens)
    bridge = load_bridge(model, device, dtype)
    n_tokens = tokens_per_prompt(bridge, max_tokens, 65)
    announce_long_run(bridge, prompts, n_tokens, 1 + 2 * len(conditions))
    result = direct_effect(
        bridge,
        conditions,
        metric,
        text,
        random_tokens=random_tokens,
        n_prompts=prompts,
        max_tokens=n_tokens,
        seed=seed,
    )
    show(result, out, plot, as_json, top)
