"""The table that shows the result of `check`."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..checking.result import CONTRACTS, Report

_STYLES = {"pass": "green", "refused": "yellow", "fail": "bold red"}


def check_table(report: Report) -> Group:
    """Return a table of all contracts and their outcomes.

    Edits that passed share a line, and so do those that failed or were refused for the same reason.
    """
    table = Table(show_lines=False)
    table.add_column("contract", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("of", overflow="fold")
    table.add_column("", overflow="fold")
    for contract in CONTRACTS:
        rows = [check for check in report.checks if check.contract == contract]
        for status in ("pass", "refused", "fail"):
            checks = [check for check in rows if check.status == status]
            for why in dict.fromkeys(check.detail if status != "pass" else "" for check in checks):
                same = [check for check in checks if status == "pass" or check.detail == why]
                of = ", ".join(check.subject for check in same if check.subject)
                detail = same[0].detail if len(same) == 1 else why
                table.add_row(contract, Text(status, style=_STYLES[status]), of, detail)
    counts = {status: sum(check.status == status for check in report.checks) for status in _STYLES}
    summary = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
    title = Text(f"{report.provenance['model']}: {summary}", style="bold")
    return Group(title, table)
