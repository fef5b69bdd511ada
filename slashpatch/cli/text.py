"""`slashpatch theory text`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.files import require_output
from .options import EditOption, JsonOption, PlotOption, SeedOption
from .output import FIGURE_SUFFIXES, new_console, print_json, print_written


class Frequencies(str, Enum):
    """Which RoPE frequencies the model has."""

    all = "all"
    high = "high"
    low = "low"


class Positions(str, Enum):
    """How the model knows positions."""

    rope = "rope"
    learned = "learned"


def text(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the run.")],
    steps: Annotated[int, typer.Option(min=1, help="Number of training steps.")] = 1500,
    layers: Annotated[int, typer.Option(min=1, help="Number of layers.")] = 3,
    heads: Annotated[int, typer.Option(min=1, help="Heads of a layer.")] = 4,
    d_model: Annotated[int, typer.Option(min=8, help="Width of the residual stream.")] = 160,
    d_mlp: Annotated[int, typer.Option(min=8, help="Width of the MLPs.")] = 384,
    vocabulary: Annotated[int, typer.Option(min=300, help="Tokens of the tokenizer.")] = 1024,
    length: Annotated[int, typer.Option(min=32, help="Tokens of a sequence.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 16,
    frequencies: Annotated[
        Frequencies, typer.Option(help="RoPE frequencies: all, or a third.")
    ] = Frequencies.all,
    positions: Annotated[
        Positions, typer.Option(help="RoPE, or no RoPE and learned positions (GPT-2).")
    ] = Positions.rope,
    centred: Annotated[
        bool, typer.Option("--centred", help="Centre the embeddings at every step.")
    ] = False,
    qk_norm: Annotated[
        bool, typer.Option("--qk-norm", help="Normalise queries and keys (Qwen 3).")
    ] = False,
    repeats: Annotated[
        float, typer.Option(min=0, max=1, help="Share of sequences in which a passage repeats.")
    ] = 0.25,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate of AdamW.")] = 3e-3,
    edit: EditOption = None,
    every: Annotated[int, typer.Option(min=1, help="Steps between measurements.")] = 25,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of torch. Default: as many as cores.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Draw the heads on the terminal as they change.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in FOLDER, bit for bit.")
    ] = False,
    animation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Save an animation as .gif or .mp4.")
    ] = None,
    plot: PlotOption = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
) -> None:
    """Train a small Llama on Python's own text: when do slashes, induction and copying appear?"""
    require_output(plot, FIGURE_SUFFIXES)
    if animation is not None:
        from ..reporting.animation import require_animation

        require_animation(animation)
    from ..theory import TextSettings, train_text

    settings = TextSettings(
        steps=steps,
        layers=layers,
        heads=heads,
        d_model=d_model,
        d_mlp=d_mlp,
        vocabulary=vocabulary,
        length=length,
        batch_size=batch_size,
        frequencies=frequencies.value,
        positions=positions.value,
        centred=centred,
        qk_norm=qk_norm,
        repeats=repeats,
        learning_rate=learning_rate,
        edits=edit or (),
        every=every,
        seed=seed,
    )
    run = train_text(folder, settings, resume=resume, watch=watch, threads=threads)
    if plot is not None:
        from ..reporting.figures import save_figure

        save_figure(run.plot(), plot)
    if animation is not None:
        from ..reporting.animation import save_animation

        save_animation(run, animation)
    if as_json:
        print_json(_record(run))
        return
    console = new_console()
    console.print(run.table(), highlight=False, markup=False)
    print_written(console, folder, plot, animation)


def _record(run: Any) -> dict[str, Any]:
    steps = run.text.summary(0.3)
    return {
        "settings": run.settings.to_dict(),
        "changes": run.changes().to_dict(orient="records"),
        "steps": steps.to_dict(orient="records"),
        "provenance": run.text.provenance,
    }
