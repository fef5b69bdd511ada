"""The `slashpatch` command. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from .. import __version__
from ..errors import SlashpatchError
from .check import check
from .demo import demo
from .doses import ablations, circuit, dose
from .effects import copying, flow, measure, sweep
from .emergence import emergence
from .evidence import evidence
from .explain import explain
from .generate import generate, watch
from .pairs import direct, pairs
from .persistence import persistence
from .prediction import predict
from .report import report
from .scan import scan
from .screen import screen
from .theory import theory

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


for _command in (
    scan, explain, report, generate, watch, demo, measure, flow, copying, sweep, screen,
    dose, ablations, circuit, pairs, direct, persistence, emergence, evidence, check,
):  # fmt: skip
    app.command()(_command)
theory.command()(predict)
app.add_typer(theory, name="theory")


def main() -> None:
    """Run the command that was typed; bad input is one line on stderr and exit code 2.

    Exit codes: 1 for a failed check or an error of the file system, 2 for bad input, 130 for
    Ctrl-C, 141 for a closed pipe.
    """
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
        if "unexpected extra argument" in message:
            message += _where_it_belongs(error)
        code = _fail(f"{message} (see slashpatch --help)", 2) if message else 2
    sys.exit(code if isinstance(code, int) else 0)


def _where_it_belongs(error: Any) -> str:
    """Return what to do about an extra argument, which is mostly a model without -m."""
    names = {parameter.name for parameter in error.ctx.command.params} if error.ctx else set()
    if "prompt" in names:
        return "; quote a prompt of several words, and name the model with -m MODEL"
    return "; name the model with -m MODEL" if "model" in names else ""


def _fail(message: str, code: int) -> int:
    """Print a message as one line on stderr; return the exit code."""
    print(f"slashpatch: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
