"""Registers how each class of result is shown as plain text; see `slashpatch.data.display`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..checking.result import Report
from ..data.display import register
from ..explaining.result import Explanation
from ..scanning.result import Scan
from .checks import check_table
from .explanation import explanation_report
from .tables import plain, scan_table


def _plain(look: Callable[..., Any]) -> Callable[..., str]:
    return lambda result, **options: plain(look(result, **options))


register(Scan, _plain(scan_table))
register(Explanation, _plain(explanation_report))
register(Report, _plain(check_table))
