"""Doses and circuits as JSON values for the page: charts with their rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...effects.result import Result
from ..charts import effect_rows
from .scan_data import records


def dose_charts(result: Result) -> Iterator[dict[str, Any]]:
    """Yield a curve of the effect by dose for each metric."""
    for metric in effect_rows.metrics_of(result):
        rows = effect_rows.dose_rows(result, metric)
        edit = rows[rows["series"] == "edit"]
        top = max(edit.to_dict(orient="records"), key=lambda row: abs(row["effect"]))
        yield {
            "title": f"Effect on {metric} by dose",
            "spec": "dose",
            "sets": {"rows": records(rows)},
            "caption": f"Largest at dose {top['dose']:g}: {top['effect']:+.3g}. The band is the "
            "interval of each dose over prompts.",
        }


def circuit_chart(result: Result) -> dict[str, Any]:
    """Return the chart of a circuit's shares."""
    rows, draws = effect_rows.circuit_rows(result), effect_rows.circuit_draws(result)
    return {
        "title": "Shares of what all heads do",
        "spec": "circuit",
        "sets": {"rows": records(rows), "draws": records(draws)},
        "caption": f"Dashed: no head; dotted: the whole model. Ticks are {len(draws)} random sets "
        "of as many heads in each layer.",
    }
