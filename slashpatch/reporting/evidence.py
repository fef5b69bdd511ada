"""The claims about a model with their verdicts, as a table in the terminal and as Markdown."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..claims.rules import CLAIMS, LEVEL, RULES
from ..claims.verdicts import (
    CANNOT_TELL,
    CONTRADICTED,
    NO_SLASH_HEADS,
    REPORTED,
    SUPPORTED,
    outcome,
)
from .style import printable

if TYPE_CHECKING:
    from ..claims.measured import Measured
    from ..claims.result import Evidence

STYLES = {SUPPORTED: "green", CONTRADICTED: "bold red", CANNOT_TELL: "yellow", REPORTED: "dim"}
#: What stands for an outcome where there is little room; not by colour alone.
MARKS = {SUPPORTED: "✓", CONTRADICTED: "✗", CANNOT_TELL: "?", REPORTED: "·"}

#: What a reader must know of the tests.
NOTE = (
    "Intervals are 95 % intervals of the mean over prompts, and over the draws of a control where "
    "there is one. Heads, offsets and directions were picked on other prompts. Rules and "
    "thresholds are ours, and the verdict is of this model on these prompts."
)


def number(value: float) -> str:
    """Return a number with three digits, or a dash."""
    return "–" if math.isnan(value) else f"{value:.3g}"


def interval_text(test: Measured) -> str:
    """Return an estimate with its interval and unit."""
    if math.isnan(test.estimate):
        return "–"
    text = number(test.estimate)
    if not math.isnan(test.low):
        text += f" [{number(test.low)}, {number(test.high)}]"
    unit = RULES[test.test].unit
    return f"{text} {unit}" if unit else text


def control_text(test: Measured) -> str:
    """Return what a test is compared with: the control, its draws and the rank p-value."""
    rule = RULES[test.test]
    if not rule.control or not test.draws:
        return rule.control
    draws = "1 draw" if test.draws == 1 else f"{test.draws} draws"
    p = "" if math.isnan(test.p_rank) else f", rank p {number(test.p_rank)}"
    return f"{rule.control} ({draws}{p})"


def _short_rule(test: Measured) -> str:
    """Return a test's rule in few characters; its name tells the control."""
    rule = RULES[test.test]
    if not rule.needed:
        return ""
    text = f"{'>' if rule.above else '<'} {rule.threshold:g}"
    text += f" {rule.unit}" if rule.unit else ""
    return f"{text}, rank p ≤ {LEVEL:g}" if rule.ranked else text


def title_of(found: Evidence) -> str:
    """Return a title: the model, and how many claims have each verdict."""
    counts: dict[str, int] = {}
    for claim in CLAIMS:
        came, _ = found.verdict(claim.number)
        counts[came] = counts.get(came, 0) + 1
    told = ", ".join(f"{counts[came]} {came}" for came in STYLES if came in counts)
    return printable(f"{found.provenance.get('model', 'a model')}: {told}")


def prompts_line(found: Evidence) -> str:
    """Return on which prompts the claims were tested, and on which slashes."""
    prompts = found.provenance.get("prompts") or []
    texts = [f"{one['n']} × {one['source']}" for one in prompts if isinstance(one, dict)]
    slashes = found.provenance.get("slashes") or ["none"]
    names = ("picked on", "tested on", "and")
    told = ", ".join(f"{name} {text}" for name, text in zip(names, texts, strict=False))
    return printable(f"Prompts: {told}. Slashes with Δ ≥ 1 that are edited: {', '.join(slashes)}.")


def evidence_table(found: Evidence) -> Group:
    """Return the claims with their verdicts, and below each its tests."""
    table = Table(show_lines=False)
    table.add_column("", no_wrap=True)
    for name, ratio in (("claim and tests", 4), ("estimate", 3), ("rule", 3), ("", 4)):
        table.add_column(name, ratio=ratio, overflow="fold")
    for claim in CLAIMS:
        came, why = found.verdict(claim.number)
        verdict = Text(f"{MARKS[came]} {came}", style=STYLES[came])
        table.add_row(f"{claim.number}", Text(claim.name, style="bold"), "", "", verdict)
        for test in found.of_claim(claim.number):
            result, reason = outcome(test)
            told = Text(MARKS[result], style=STYLES[result])
            told.append("" if test.why_not else f" {printable(reason)}", style="dim")
            about = test.test if RULES[test.test].needed else f"{test.test} (reported)"
            table.add_row("", f"  {about}", interval_text(test), _short_rule(test), told)
        missing = [test.why_not for test in found.of_claim(claim.number) if test.why_not]
        for reason in [why] if why == NO_SLASH_HEADS else dict.fromkeys(missing):
            table.add_row("", "", "", "", Text(printable(reason), style="dim"))
        table.add_section()
    return Group(
        Text(title_of(found), style="bold"),
        table,
        Text(prompts_line(found)),
        Text(NOTE, style="dim"),
    )


def markdown(found: Evidence) -> str:
    """Return the claims, their tests, rules and where they come from, as Markdown."""
    lines = [f"# {_cell(title_of(found))}", "", _cell(prompts_line(found)), "", NOTE, ""]
    lines += ["| # | claim | verdict | why |", "|--:|---|---|---|"]
    for claim in CLAIMS:
        came, why = found.verdict(claim.number)
        lines.append(f"| {claim.number} | {claim.says} | **{came}** | {_cell(why)} |")
    for claim in CLAIMS:
        came, _ = found.verdict(claim.number)
        lines += ["", f"## {claim.number}. {claim.name}: {came}", "", claim.says, ""]
        tests = found.of_claim(claim.number)
        if not tests:
            continue
        lines += [
            "| test | estimate | rule | against | outcome | detail |",
            "|---|--:|---|---|---|---|",
        ]
        for test in tests:
            result, why = outcome(test)
            rule = RULES[test.test]
            needed = "" if rule.needed else " (reported only)"
            cells = (
                f"{rule.question}{needed}",
                interval_text(test),
                str(rule),
                control_text(test),
                f"{result}: {why}" if why else result,
                test.detail,
            )
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    lines += ["", "## Where this comes from", "", *_sources(found)]
    return "\n".join(lines) + "\n"


def sources_of(found: Evidence) -> list[tuple[str, str]]:
    """Return name and value of what is needed to repeat the run."""
    rows = []
    for key, value in found.provenance.items():
        if isinstance(value, dict):
            value = ", ".join(f"{name} {of}" for name, of in value.items())
        elif isinstance(value, list):
            value = ", ".join(
                ", ".join(f"{a} {b}" for a, b in of.items()) if isinstance(of, dict) else str(of)
                for of in value
            )
        rows.append((key.replace("_", " "), printable(value) or "none"))
    return rows


def _sources(found: Evidence) -> list[str]:
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in sources_of(found)]
    return ["| | |", "|---|---|", *rows]


def _cell(text: Any) -> str:
    """Return a text for a cell of a Markdown table: one line, its marks taken literally."""
    shown = printable(text)
    for character in "\\`*_<>|[]":
        shown = shown.replace(character, f"\\{character}")
    return shown
