"""Registers how each class of result looks; see `slashpatch.data.display`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..data.display import Look, register
from .checks import check_table
from .emergence import LiveHeads, emergence_table
from .evidence_page import evidence_text
from .explanation import explanation_report
from .notebook.emergence import emergence_html
from .notebook.evidence import evidence_html
from .notebook.results import (
    explanation_html,
    report_html,
    result_html,
    run_html,
    text_run_html,
)
from .notebook.scans import edit_html, monitor_html, scan_html
from .plots import (
    plot_emergence,
    plot_evidence,
    plot_explanation,
    plot_monitor,
    plot_report,
    plot_result,
    plot_run,
    plot_scan,
    plot_text_run,
)
from .tables import plain, scan_table
from .text_run_figure import text_run_table


def _plain(look: Callable[..., Any]) -> Callable[..., str]:
    return lambda result, **options: plain(look(result, **options))


register("scanning.result.Scan", Look(_plain(scan_table), scan_html, plot_scan))
register(
    "scanning.emergence_result.Emergence",
    Look(_plain(emergence_table), emergence_html, plot_emergence, LiveHeads),
)
register("scanning.monitor.SlashMonitor", Look(None, monitor_html, plot_monitor))
register(
    "explaining.result.Explanation",
    Look(_plain(explanation_report), explanation_html, plot_explanation),
)
register("checking.result.Report", Look(_plain(check_table), report_html, plot_report))
register("effects.result.Result", Look(None, result_html, plot_result))
register("theory.run.Run", Look(None, run_html, plot_run))
register("theory.text.run.TextRun", Look(_plain(text_run_table), text_run_html, plot_text_run))
register("edits.base.Edit", Look(None, edit_html, None))
register("claims.result.Evidence", Look(evidence_text, evidence_html, plot_evidence))
