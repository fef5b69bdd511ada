"""The `slashpatch` command. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .commands.check import check
from .commands.effects import copying, flow, measure, sweep
from .commands.scan import scan
from .commands.theory import theory
from .errors import EditError, OutputError, SlashpatchError
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
    TextOption,
    TokensOption,
    load_bridge,
)
from .output import new_console, print_json, print_written, require_output

if TYPE_CHECKING:
    pass

app = typer.Typer(
    name="slashpatch",
    help="See, edit and measure slash-dominant attention heads: token i reads token i-Δ.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_INTERRUPTED = 130


def _version(asked: bool | None) -> None:
    if asked:
        print(f"slashpatch {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool | None,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = None,
) -> None:
    pass


app.command()(scan)


@app.command()
def explain(
    head: Annotated[
        str | None, typer.Argument(metavar="[HEAD]", help="Such as L16H0; not with --all.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="A table over all heads that reach kappa.")
    ] = False,
    model: ModelOption = None,
    text: TextOption = None,
    offset: Annotated[
        int | None, typer.Option(min=0, help="Default: where the head scores highest.")
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens per prompt.")] = 256,
    kappa: KappaOption = 0.1,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --all: .parquet, .csv or .json.")
    ] = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Say why a head is a slash head: rank, frequencies, and what happens without them."""
    from .explain import explain as explain_one
    from .explain import explain_all
    from .files import TABLE_SUFFIXES, write_table
    from .heads import heads
    from .scans import require_kappa

    require_kappa(kappa)
    if every == (head is not None):
        raise EditError("give one head, such as L16H0, or --all")
    if every and offset is not None:
        raise EditError("--offset goes with one head; --all takes each head's best")
    chosen = None if head is None else heads(head)
    if out is not None:
        if not every:
            raise OutputError("--out goes with --all")
        require_output(out, TABLE_SUFFIXES)
    bridge = load_bridge(model, device, dtype)
    common: dict[str, Any] = {
        "n_prompts": prompts,
        "max_tokens": min(max_tokens, bridge.cfg.n_ctx),
        "kappa": kappa,
        "seed": seed,
    }
    console = new_console()
    if chosen is not None:
        one = explain_one(bridge, chosen, text, offset=offset, **common)
        if as_json:
            print_json(one.to_dict())
        else:
            from .report.explanation import explanation_report

            console.print(explanation_report(one), highlight=False)
        return
    frame = explain_all(bridge, None, text, **common)
    if out is not None:
        write_table(frame, out)
    if as_json:
        print_json({"heads": frame.to_dict(orient="records")})
        return
    from .report.explanation import explanations_table

    console.print(explanations_table(frame))
    print_written(console, out)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What the model continues.")],
    edit: EditOption = None,
    model: ModelOption = None,
    max_new_tokens: TokensOption = 40,
    sample: Annotated[
        bool, typer.Option("--sample", help="Sample by --seed instead of taking the likeliest.")
    ] = False,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Continue a prompt with and without edits, differing words marked."""
    from .edits import parse_edit
    from .generation import continuation
    from .patching import patch
    from .report.progress import busy

    if not edit:
        raise EditError("give at least one --edit, such as --edit 'KnockOut(L16H0, 1)'")
    edits = [parse_edit(typed) for typed in edit]
    bridge = load_bridge(model, device, dtype)
    with busy("generating with the edits"), patch(bridge, *edits):
        edited = continuation(bridge, prompt, max_new_tokens, sample, seed)
    with busy("generating without"):
        plain = continuation(bridge, prompt, max_new_tokens, sample, seed)
    if as_json:
        record = {"prompt": prompt, "edits": [str(one) for one in edits]}
        print_json({**record, "plain": plain, "edited": edited})
        return
    from .report.words import marked_pair

    top, bottom = marked_pair(plain, edited, new_console().is_terminal)
    console = new_console()
    plain_text: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
    console.print("intact", style="bold", **plain_text)
    console.print(top, **plain_text)
    console.print()
    console.print(" then ".join(map(str, edits)), style="bold", **plain_text)
    console.print(bottom, **plain_text)


@app.command()
def watch(
    prompt: Annotated[str, typer.Argument(help="What the model continues.")],
    edit: EditOption = None,
    model: ModelOption = None,
    max_new_tokens: TokensOption = 40,
    offsets: OffsetsOption = "1-15",
    kappa: KappaOption = 0.1,
    top: Annotated[int, typer.Option(min=1, help="Heads to show at a time.")] = 8,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Watch heads light up while the model writes: which head, which offset, which token it reads.

    Scores are of the newest token alone, and the mean over all tokens so far. Δ=0 (a head that
    attends to its own token) is left out unless --offsets asks for it.
    """
    from .edits import parse_edit
    from .generation import watched
    from .scans import require_kappa
    from .slash import as_offsets

    require_kappa(kappa)
    wanted = as_offsets(offsets)
    edits = [parse_edit(typed) for typed in edit or ()]
    bridge = load_bridge(model, device, dtype)
    steps = watched(bridge, prompt, edits, wanted, kappa, max_new_tokens, top)
    if as_json:
        print_json({"prompt": prompt, "edits": [str(one) for one in edits], "steps": list(steps)})
        return
    from .report.live import show_live

    show_live(prompt, steps, new_console())


@app.command()
def demo(
    model: ModelOption = None,
    as_json: JsonOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """The story in about a minute: find a slash head, remove its diagonal, see what it carried."""
    from .demo import tell

    console = None if as_json else new_console()
    record = tell(load_bridge(model, device, dtype), console, seed)
    if as_json:
        print_json(record)


for _command in (measure, flow, copying, sweep, check):
    app.command()(_command)
app.add_typer(theory, name="theory")


def main() -> None:
    """Entry point: one line and exit code 2 for bad input, one line for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Unicode still gets text
    try:
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:  # newer typers turn Ctrl-C into an exit code of their own
            raise KeyboardInterrupt
    except SlashpatchError as error:
        code = _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        code = _fail("interrupted", _INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        code = 141
    except OSError as error:
        code = _fail(str(error), 1)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()  # empty where the help was printed instead
        code = _fail(f"{message} (see slashpatch --help)", 2) if message else 2
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> int:
    print(f"slashpatch: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
