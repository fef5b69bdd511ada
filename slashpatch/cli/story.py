"""The story that `slashpatch demo` tells: a slash head, and the effect of removing its diagonal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..bridge.provenance import provenance
from ..data.heads import Head
from ..data.progress import busy, progress_over
from ..data.prompts import prompt_set
from ..edits import AblateHeads, DropBand, Edit, KnockOut, ShiftSlash
from ..effects.copying import copied_lags, copying_losses
from ..maths.bands import NAMED_BANDS
from ..patching.patch import patch
from ..scanning.generation import continuation
from ..scanning.scan import scan

if TYPE_CHECKING:
    from rich.console import Console
    from transformer_lens.model_bridge import TransformerBridge

PROMPT = "The secret code is blue-tiger-seven. I repeat, the secret code is"
_CONTROLS = 8


def random_heads(model: TransformerBridge, exclude: Head, n_draws: int, seed: int) -> list[Head]:
    """Return heads drawn uniformly from all heads but `exclude`, without repeats."""
    from transformer_lens.utilities.statistics import derive_generator

    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    order = torch.randperm(n_layers * n_heads, generator=derive_generator(seed, "control heads"))
    drawn = (Head(*divmod(index, n_heads)) for index in order.tolist())
    return [head for head in drawn if head != exclude][:n_draws]


def tell(model: TransformerBridge, console: Console | None, seed: int = 0) -> dict[str, Any]:
    """Run the story and print each chapter to `console`, if any; return all its numbers."""
    from rich.text import Text

    from ..effects.statistics import interval
    from ..reporting.tables import scan_table, strongest
    from ..reporting.words import marked_pair

    def say(*parts: Any) -> None:
        if console is not None:
            console.print(*parts, highlight=False)

    length = min(256, model.cfg.n_ctx)
    say("[bold]1. Which heads attend along a diagonal?[/bold]")
    found = scan(model, n_prompts=8, max_tokens=length, seed=seed)
    control = scan(model, n_prompts=8, max_tokens=length, seed=seed, random_tokens=True)
    say(scan_table(found, top=8, control=control))

    head, offset, score = strongest(found, min_offset=1)
    say(
        f"\n[bold]2. The strongest that looks back: {head}, Δ={offset}[/bold]. Each token gives "
        f"{score:.0%} of this head's attention to the token {offset} before it."
    )
    say(
        "\n[bold]3. What is it for?[/bold] Random tokens, then the same again: only a model that "
        "copies can predict the second run. Loss there, in nats:"
    )
    controls = random_heads(model, head, _CONTROLS, seed)
    runs: list[tuple[str, Edit | None]] = [
        ("clean", None),
        (f"{head} ablated", AblateHeads(head)),
        (f"{head} without its Δ={offset} diagonal", KnockOut(head, offset)),
        *((f"{other} ablated", AblateHeads(other)) for other in controls),
    ]
    measure = _copying(model, seed)
    losses = {name: measure(edit) for name, edit in progress_over(runs, "measuring copying")}
    record = {}
    for name in list(losses)[:3]:
        low, high = interval(losses[name], seed)
        record[name] = {
            "loss": float(losses[name].mean()),
            "low": float(low),
            "high": float(high),
        }
    drawn = torch.stack([losses[f"{other} ablated"].mean() for other in controls])
    record["random heads ablated, one at a time"] = {
        "loss": float(drawn.mean()),
        "lowest": float(drawn.min()),
        "highest": float(drawn.max()),
    }
    for name, row in record.items():
        spread = (
            f"95 % {row['low']:.2f} to {row['high']:.2f} over prompts"
            if "low" in row
            else f"{row['lowest']:.2f} to {row['highest']:.2f} over {len(controls)} heads"
        )
        say(Text(f"   {name:38} {row['loss']:6.2f}   ({spread})"))

    say("\n[bold]4. In a sentence.[/bold]")
    knocked = KnockOut(head, offset)
    with busy("generating"):
        plain = continuation(model, PROMPT, max_new_tokens=16)
    with busy("generating"), patch(model, knocked):
        edited = continuation(model, PROMPT, max_new_tokens=16)
    top, bottom = marked_pair(plain, edited, console is not None and console.is_terminal)
    say(Text(f"   {PROMPT}", style="dim"))
    say(Text("   clean: "), top)
    say(Text(f"   {knocked}: "), bottom)
    say(
        "\n[bold]5. Which rotary frequencies carry it?[/bold] The score without each third of them:"
    )
    prompts = prompt_set(model, n_prompts=4, max_tokens=length, seed=seed).tokens
    bands = {}
    for band in progress_over(NAMED_BANDS, "dropping bands"):
        with patch(model, DropBand(head, band)):
            dropped = scan(model, list(prompts), [offset])
        bands[band] = float(dropped.scores[head.layer, head.head, 0])
    for band, left in bands.items():
        say(Text(f"   without {band:8} {left:6.3f}"))

    say("\n[bold]6. The model that copies the token after next.[/bold]")
    eight = [entry.head for entry in found.slash_heads() if entry.offset == offset][:8]
    shift = ShiftSlash(eight, by=1)
    say(Text(f"   {shift}"))
    with busy("shifting"):
        clean_lags = copied_lags(model, n_tokens=_copy_length(model), seed=seed).mean(0)
        with patch(model, shift):
            moved = scan(model, list(prompts), range(min(8, length)))
            shifted_lags = copied_lags(model, n_tokens=_copy_length(model), seed=seed).mean(0)
    peak = int(moved.scores[head.layer, head.head].argmax())
    say(
        Text(
            f"   {head} now peaks at Δ={peak}. How often the likeliest token is, in the first run,"
        )
    )
    say(Text("                  the next   the one after   the one after that"))
    for name, lags in (("clean", clean_lags), ("shifted", shifted_lags)):
        say(Text(f"   {name:12} {lags[0]:12.2f} {lags[1]:14.2f} {lags[2]:18.2f}"))
    return {
        "bands_dropped": bands,
        "shift": {
            "edit": str(shift),
            "peak": peak,
            "copied_lags": {"clean": clean_lags.tolist(), "shifted": shifted_lags.tolist()},
        },
        "slash_heads": [
            {"head": str(entry.head), "offset": entry.offset, "score": entry.score}
            for entry in found.slash_heads()[:8]
        ],
        "strongest": {"head": str(head), "offset": offset, "score": score},
        "copying": record,
        "control_heads": [str(other) for other in controls],
        "generation": {"prompt": PROMPT, "clean": plain, str(knocked): edited},
        "provenance": provenance(model, seed=seed),
    }


def _copy_length(model: TransformerBridge) -> int:
    """Return the tokens of one copy: 100, or half the context if that is less."""
    return min(100, (model.cfg.n_ctx - 1) // 2)


def _copying(model: TransformerBridge, seed: int) -> Callable[[Edit | None], Tensor]:
    """Return a function of an edit: the copying loss of each prompt, always on the same tokens."""

    def measure(edit: Edit | None) -> Tensor:
        with patch(model, *([] if edit is None else [edit])):
            return copying_losses(model, n_prompts=8, n_tokens=_copy_length(model), seed=seed)

    return measure
