"""Writes docs/reference/: tables of the public names and of the command's options.

`make reference` runs this, and a test compares the pages. On a forge they are tables; in the site
docs_build/hooks.py puts the docstring of each name below its page's table.
"""

from __future__ import annotations

import enum
import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import get_args, get_type_hints

import typer

from slashpatch import errors

FOLDER = Path(__file__).parents[1] / "docs" / "reference"

_ERRORS = [
    name
    for name, found in vars(errors).items()
    if isinstance(found, type) and name != "SlashpatchError"
]
#: By page: title, what the page is about, and its names.
PAGES = {
    "models": (
        "Models and heads",
        "How to: [load a model, name heads](../how-to/load.md), [run in many "
        "processes](../how-to/workers.md).",
        "load memory_needed MemoryNeeded Head heads Workers",
    ),
    "scanning": (
        "Scanning",
        "How to: [find slash heads](../how-to/find.md), "
        "[watch a training run](../how-to/training.md).",
        "scan Scan SlashHead SlashLine scanning.moments.Profile top_keys TopKeys SlashMonitor "
        "scanning.monitor.Detection emergence Emergence SlashCallback",
    ),
    "edits": (
        "Edits",
        "Each edit takes heads first. Pictures and formulas: [gallery](../gallery.md). How to: "
        "[edit heads](../how-to/edit.md), [write an edit of your own](../how-to/add-an-edit.md).",
        "KnockOut KeepOnly ScaleOffsets AblateHeads ShiftSlash DropBand FreezeBand ScaleBand "
        "SwapBands SetFrequencies RankOne DropDirection PlantSlash parse_edit Basis fit_rank_one "
        "Axis fit_axis Constants fit_ablation Edit edits.HookContext",
    ),
    "patching": (
        "Patching",
        "How to: [edit heads](../how-to/edit.md), [run long prompts](../how-to/long-prompts.md).",
        "patch hooks fused",
    ),
    "explaining": (
        "Explaining",
        "How to: [explain a head](../how-to/explain.md).",
        "explain explain_all Explanation",
    ),
    "effects": (
        "Effects",
        "How to: [measure effects](../how-to/measure.md), [sweep every head](../how-to/sweep.md), "
        "[screen every head](../how-to/screen.md), [patch pairs of prompts](../how-to/pairs.md), "
        "[doses, ablations and circuits](../how-to/dose-and-circuits.md).",
        "measure flow copying paths sweep screen persistence activation_patching copying_pairs "
        "Pairs direct_effect dose ablations circuit Result copying_losses copied_lags SlashScores "
        "PrefixMatching LogitDifference",
    ),
    "claims": (
        "Claims",
        "What it shows: [evidence](../evidence.md).",
        "evidence Evidence",
    ),
    "checking": (
        "Checking",
        "How to: [check your model](../how-to/check.md).",
        "check Report Check",
    ),
    "theory": (
        "Theory",
        "What it shows: [slash heads from scratch](../theory.md), "
        "What it shows: [slash heads from scratch](../theory.md), "
        "[predicting when](../theory-prediction.md), "
        "[ranges of frequencies](../theory-frequencies.md), "
        "[slashes while a model learns](../emergence.md).",
        "theory theory.train theory.phase_diagram theory.frequency_margins theory.Settings "
        "theory.Run theory.ShallowTransformer theory.predict theory.Prediction theory.Slash "
        "theory.draw_settings theory.compare theory.agreement theory.train_text "
        "theory.TextSettings theory.TextRun",
    ),
    "reporting": (
        "Reporting",
        "Scans, results, explanations, checks, training runs and monitors have a method `plot` and "
        "show themselves in notebooks. How to: [show results](../how-to/report.md).",
        "report reporting.figures.scan_figure reporting.figures.profile_figure "
        "reporting.figures.effects_figure reporting.figures.paths_figure "
        "reporting.figures.losses_figure reporting.margins_figure.margins_figure "
        "reporting.figures.save_figure",
    ),
    "errors": (
        "Errors",
        "Each message says what was expected, what came, and what to do. The command prints it as "
        "one line and exits with 2.",
        "SlashpatchError " + " ".join(f"errors.{name}" for name in _ERRORS),
    ),
}


def summary(name):
    """The first sentence of a name's docstring."""
    parts = name.split(".")
    if len(parts) == 1:
        found = getattr(import_module("slashpatch"), name)
    else:
        found = getattr(import_module(".".join(["slashpatch", *parts[:-1]])), parts[-1])
    text = " ".join(inspect.getdoc(found).split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", text)[0].replace("|", "\\|")


def reference_page(page):
    """The text of a page of Python names."""
    title, about, names = PAGES[page]
    rows = [f"| `{name}` | {summary(name)} |" for name in names.split()]
    head = ["| name in `slashpatch` | what it is |", "|---|---|"]
    return "\n".join([f"# {title}", "", about, "", *head, *rows, ""])


def commands_page():
    """The text of the page of the command line."""
    from slashpatch.cli.app import app

    lines = [
        "# The command line",
        "",
        "`slashpatch COMMAND --help` prints the same. Exit codes: 0, or 1 for a failed check or an "
        "error of the file system, 2 for bad input, 130 for Ctrl-C.",
        "",
    ]
    root = typer.main.get_command(app)
    for name, command in root.commands.items():
        lines += _command(f"slashpatch {name}", command)
    return "\n".join(lines)


def _command(name, command, level=2):
    """The lines of one command, and of the commands below it."""
    arguments = [_shown(p) for p in command.params if p.param_type_name == "argument"]
    inner = getattr(command, "commands", {})
    usage = [name, *arguments, "COMMAND" if inner else "[OPTIONS]"]
    lines = [f"{'#' * level} {name}", "", " ".join(command.help.split()), ""]
    lines += ["```text", " ".join(usage), "```", ""]
    types = get_type_hints(inspect.unwrap(command.callback)) if command.callback else {}
    rows = [_row(p, types[p.name]) for p in command.params if p.name in types]
    if rows:
        lines += ["| option | what it does | default |", "|---|---|---|", *rows, ""]
    for below, inner_command in inner.items():
        lines += _command(f"{name} {below}", inner_command, level + 1)
    return lines


def _shown(parameter):
    """An argument as it is typed."""
    shown = (parameter.metavar or parameter.name).upper()
    return shown if parameter.required else f"[{shown}]"


def _row(parameter, kind):
    """The line of an option or argument in its command's table."""
    about = parameter.help
    for choices in (kind, *get_args(kind)):
        if isinstance(choices, type) and issubclass(choices, enum.Enum):
            about += f" One of {', '.join(choice.value for choice in choices)}."
    if parameter.param_type_name == "argument":
        typed = _shown(parameter)
    else:
        flag = getattr(parameter, "is_flag", False)
        value = "" if flag else " " + (parameter.metavar or parameter.name.upper())
        typed = ", ".join(sorted(parameter.opts, key=len)) + value
    default = parameter.default
    default = default.value if isinstance(default, enum.Enum) else default
    told = default is None or default is False or callable(default)
    return f"| `{typed}` | {about} | {'' if told else f'`{default}`'} |"


def pages():
    """{file name: text} of all pages."""
    found = {f"{page}.md": reference_page(page) for page in PAGES}
    return {**found, "commands.md": commands_page()}


if __name__ == "__main__":
    for file, text in pages().items():
        (FOLDER / file).write_text(text, encoding="utf-8")
