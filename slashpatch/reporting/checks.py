"""The table and the figure that show the result of `check`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..checking.result import CONTRACTS, Report
from .charts.palette import CATEGORIES
from .charts.training_rows import check_rows
from .style import new_figure, shortened, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLES = {"pass": "green", "refused": "yellow", "fail": "bold red"}
#: Colour and hatching of each outcome in the figure.
_BARS = {
    "pass": (CATEGORIES[0], ""),
    "fail": (CATEGORIES[1], "xx"),
    "refused": (CATEGORIES[2], "//"),
}


def check_lines(report: Report) -> list[tuple[str, str, str, str]]:
    """Return contract, outcome, edits and detail of the checks.

    Edits that passed share a line, and so do those that failed or were refused for the same reason.
    """
    lines = []
    for contract in CONTRACTS:
        rows = [check for check in report.checks if check.contract == contract]
        for status in _STYLES:
            checks = [check for check in rows if check.status == status]
            for why in dict.fromkeys(check.detail if status != "pass" else "" for check in checks):
                same = [check for check in checks if status == "pass" or check.detail == why]
                of = ", ".join(check.subject for check in same if check.subject)
                lines.append((contract, status, of, same[0].detail if len(same) == 1 else why))
    return lines


def counts_of(report: Report) -> str:
    """Return how many checks had each outcome."""
    counts = {status: sum(check.status == status for check in report.checks) for status in _STYLES}
    return ", ".join(f"{n} {status}" for status, n in counts.items() if n) or "no checks"


def check_table(report: Report) -> Group:
    """Return a table of all contracts and their outcomes, a row for each of `check_lines`."""
    table = Table(show_lines=False)
    table.add_column("contract", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("of", overflow="fold")
    table.add_column("", overflow="fold")
    for contract, status, of, detail in check_lines(report):
        table.add_row(contract, Text(status, style=_STYLES[status]), of, detail)
    return Group(Text(f"{report.provenance['model']}: {counts_of(report)}", style="bold"), table)


@styled
def check_figure(report: Report) -> Figure:
    """Draw how many checks of each contract passed, failed or were refused."""
    rows = check_rows(report)
    contracts = list(dict.fromkeys(rows["contract"]))
    figure = new_figure(7.5, 1.2 + 0.3 * len(contracts))
    axis = figure.subplots()
    lefts = dict.fromkeys(contracts, 0)
    for status, (color, hatch) in _BARS.items():
        mine = rows[rows["status"] == status]
        if mine.empty:
            continue
        at = [contracts.index(contract) for contract in mine["contract"]]
        starts = [lefts[contract] for contract in mine["contract"]]
        axis.barh(at, mine["n"], 0.7, starts, color=color, hatch=hatch, label=status)
        for contract, n in zip(mine["contract"], mine["n"], strict=True):
            lefts[contract] += n
    for place, contract in enumerate(contracts):
        mine = rows[rows["contract"] == contract]
        text = ", ".join(
            f"{n} {status}" for status, n in zip(mine["status"], mine["n"], strict=True)
        )
        axis.text(lefts[contract], place, f" {text}", va="center", fontsize=8)
    axis.set_yticks(range(len(contracts)), contracts)
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.set_xlabel("number of checks")
    axis.set_title(shortened(f"{report.provenance['model']}: {counts_of(report)}", 80))
    axis.legend(loc="lower right")
    return figure
