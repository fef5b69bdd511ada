"""`slashpatch persistence`."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from .effects import HeadsOption, OutOption, PromptsOption, RowsOption, require_outputs, show
from .length import announce_long_run, tokens_per_prompt
from .options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    Engine,
    EngineOption,
    JsonOption,
    KappaOption,
    ModelOption,
    OffsetsOption,
    PlotOption,
    SeedOption,
    TextOption,
    WorkersOption,
    load_bridge,
    require_readable,
)


class Against(str, Enum):
    """What natural prompts are compared with."""

    random = "random"
    shuffled = "shuffled"


def persistence(
    model: ModelOption = None,
    heads: HeadsOption = None,
    offsets: OffsetsOption = "0-15",
    kappa: KappaOption = 0.1,
    kappa_random: Annotated[
        float | None,
        typer.Option(help="Lowest score of a slash head on random tokens. Default: --kappa."),
    ] = None,
    against: Annotated[
        Against,
        typer.Option(help="Random tokens of the vocabulary, or each prompt's own, shuffled."),
    ] = Against.random,
    text: TextOption = None,
    prompts: PromptsOption = 16,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per prompt. Default: 512, or the model's context."),
    ] = None,
    top: RowsOption = 20,
    out: OutOption = None,
    plot: PlotOption = None,
    as_json: JsonOption = False,
    engine: EngineOption = Engine.auto,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    workers: WorkersOption = None,
) -> None:
    """Compare slash scores on natural text with those on random tokens, head by head."""
    from ..effects.persistence import persistence as run
    from ..maths.offsets import as_offsets
    from ..scanning.result import require_kappa

    wanted = as_offsets(offsets)
    require_kappa(kappa)
    if kappa_random is not None:
        require_kappa(kappa_random)
    if heads is not None:
        require_readable(heads)
    require_outputs(out, plot, text, False)
    bridge = load_bridge(model, device, dtype)
    n_tokens = tokens_per_prompt(bridge, max_tokens, 512)
    announce_long_run(bridge, prompts, n_tokens, 2, workers)
    result = run(
        bridge,
        heads,
        text,
        kappa=kappa,
        kappa_random=kappa_random,
        offsets=wanted,
        against=against.value,
        n_prompts=prompts,
        max_tokens=n_tokens,
        engine=engine.value,
        seed=seed,
        workers=workers,
    )
    show(result, out, plot, as_json, top)
