"""`slashpatch generate` and `slashpatch watch`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import EditError
from .options import (
    DeviceOption,
    Dtype,
    DtypeOption,
    EditOption,
    JsonOption,
    KappaOption,
    ModelOption,
    OffsetsOption,
    SeedOption,
    TokensOption,
    load_bridge,
)
from .output import new_console, print_json


def generate(
    prompt: Annotated[str, typer.Argument(help="Text that the model continues.")],
    edit: EditOption = None,
    model: ModelOption = None,
    max_new_tokens: TokensOption = 40,
    sample: Annotated[
        bool,
        typer.Option("--sample", help="Sample by --seed instead of taking the likeliest token."),
    ] = False,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Continue a prompt with and without edits, and mark the words that differ."""
    from ..data.progress import busy
    from ..edits import parse_edit
    from ..patching.patch import patch
    from ..scanning.generation import continuation

    if not edit:
        raise EditError("give at least one --edit, such as --edit 'KnockOut(L16H0, 1)'")
    edits = [parse_edit(typed) for typed in edit]
    bridge = load_bridge(model, device, dtype)
    with busy("generating with the edits"), patch(bridge, *edits):
        edited = continuation(bridge, prompt, max_new_tokens, sample, seed)
    with busy("generating without"):
        plain = continuation(bridge, prompt, max_new_tokens, sample, seed)
    if as_json:
        record = {"prompt": prompt, "edits": [str(applied) for applied in edits]}
        print_json({**record, "plain": plain, "edited": edited})
        return
    from ..reporting.words import marked_pair

    top, bottom = marked_pair(plain, edited, new_console().is_terminal)
    console = new_console()
    plain_text: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
    console.print("clean", style="bold", **plain_text)
    console.print(top, **plain_text)
    console.print()
    console.print(" then ".join(map(str, edits)), style="bold", **plain_text)
    console.print(bottom, **plain_text)


def watch(
    prompt: Annotated[str, typer.Argument(help="Text that the model continues.")],
    edit: EditOption = None,
    model: ModelOption = None,
    max_new_tokens: TokensOption = 40,
    offsets: OffsetsOption = "1-15",
    kappa: KappaOption = 0.1,
    top: Annotated[int, typer.Option(min=1, help="Number of heads to show at a time.")] = 8,
    as_json: JsonOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Show while the model writes which heads are slash heads, their offsets and what they read.

    Each head has two scores: the newest token's, and the mean over all tokens so far. Δ=0 (a head
    that attends to its own token) is left out unless --offsets has it.
    """
    from ..edits import parse_edit
    from ..maths.offsets import as_offsets
    from ..scanning.generation import watched
    from ..scanning.result import require_kappa

    require_kappa(kappa)
    wanted = as_offsets(offsets)
    edits = [parse_edit(typed) for typed in edit or ()]
    bridge = load_bridge(model, device, dtype)
    steps = watched(bridge, prompt, edits, wanted, kappa, max_new_tokens, top)
    if as_json:
        print_json(
            {"prompt": prompt, "edits": [str(applied) for applied in edits], "steps": list(steps)}
        )
        return
    from ..reporting.live import show_live

    show_live(prompt, steps, new_console())
