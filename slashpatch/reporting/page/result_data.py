"""Measured effects as JSON values for the page: charts with their rows, tables, remarks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pandas.api.types as pd_types

from ...data.heads import Head
from ...effects.result import Result
from ...errors import ReportError
from ..charts import effect_rows
from ..charts.persistence import persistence_rows
from .dose_data import circuit_chart, dose_charts
from .result_words import ABOUT, ENDS, LABELS, NEEDED, TEXT, TITLES
from .scan_data import number, records

if TYPE_CHECKING:
    import pandas as pd

#: The largest number of rows of a table on the page, the largest effects first.
MOST_ROWS = 500
#: Kinds that have a row for each head.
_BY_HEAD = ("sweep", "screen")
_HEAD = re.compile(r"L\d+H\d+")
#: Columns of a forest plot's table.
_FOREST = ("row", "effect", "low", "high", "what", "q", "as_large")
#: Number of paths in their chart, beside the total.
_PATHS = 12


def require_readable(result: Result, shape: tuple[int, int], name: str) -> None:
    """Raise ReportError unless a result has the rows and columns that its kind has."""
    frame, prompts = result.frame, result.provenance.get("prompts")
    if result.kind not in NEEDED:
        raise ReportError(f"{name} is of an unknown kind; expected one of {', '.join(NEEDED)}")
    text, numbers = NEEDED[result.kind]
    wrong = [column for column in (*text, *numbers) if column not in frame]
    wrong += [c for c in numbers if c in frame and not pd_types.is_numeric_dtype(frame[c])]
    if wrong or not len(frame) or not isinstance(prompts, dict):
        what = f"its columns {', '.join(wrong)}" if wrong else "its rows, or what its prompts were"
        raise ReportError(f"{name} is no result of {result.kind}: {what} are missing or damaged")
    draws = result.tables.get("draws")
    if draws is not None and not {"edit", "control", "metric", "of", "effect"} <= set(draws):
        raise ReportError(f"{name} is no result of {result.kind}: its table of draws is damaged")
    sets = result.tables.get("random_sets")
    if sets is not None and not ("share" in sets and pd_types.is_numeric_dtype(sets["share"])):
        raise ReportError(f"{name} is no result of {result.kind}: its random sets are damaged")
    if result.kind in (*_BY_HEAD, "persistence"):
        inside = frame["layer"].between(0, shape[0] - 1) & frame["head"].between(0, shape[1] - 1)
        if not inside.all():
            raise ReportError(f"{name} has heads that the scan's model has not")


def result_data(result: Result) -> dict[str, Any]:
    """Return what the page shows of one result."""
    origin = result.provenance
    prompts = origin.get("prompts", {})
    about = (
        f"{ABOUT[result.kind]} {prompts.get('n', '?')} prompts ({prompts.get('source', '?')}), "
        f"{origin.get('confidence', 0.95):.0%} intervals over prompts."
    )
    return {
        "kind": result.kind,
        "title": f"{TITLES[result.kind]}: {_subject(result)}",
        "about": about,
        "charts": list(_charts(result)),
        "tables": [table_data(result.frame, "All rows")],
        "remarks": list(result.remarks),
    }


def _subject(result: Result) -> str:
    origin = result.provenance
    of = origin.get("measured") or []
    if result.kind in _BY_HEAD:  # the edit at one head stands for all
        of = [_HEAD.sub("{head}", edit) for edit in result.frame["edit"].head(1).astype(str)]
        if "offset" in result.frame and result.frame["offset"].nunique() > 1:
            of = [re.sub(r"\b(offsets?)=\d+", r"\1={offset}", edit) for edit in of]
    metric = origin.get("metric") or ", ".join(origin.get("metrics", ()))
    return "; ".join(str(one) for one in of if one) + (f" ({metric})" if metric else "")


def _charts(result: Result) -> Iterator[dict[str, Any]]:
    """Yield the charts of a result: which specification, its rows, a title and a caption."""
    if result.kind == "measure":
        yield from _forests(result)
        return
    if result.kind == "dose":
        yield from dose_charts(result)
        return
    if result.kind == "circuit":
        yield circuit_chart(result)
        return
    rows, spec, title = {
        "flow": (effect_rows.flow_rows, "flow", "Flow by offset"),
        "copying": (effect_rows.lag_rows, "lags", "How often each lag is copied"),
        "paths": (lambda result: effect_rows.path_rows(result, _PATHS), "paths", "Strongest paths"),
        "pairs": (effect_rows.part_rows, "patched", "What the patched activations carry"),
        "direct": (effect_rows.part_rows, "direct", "Direct effect, total effect and repair"),
        "persistence": (persistence_rows, "persistence", "Natural against random"),
        "sweep": (effect_rows.sweep_rows, "sweep", "Effect of the edit at each head"),
        "screen": (effect_rows.sweep_rows, "sweep", "Effect at each head that was run"),
    }[result.kind]
    frame = rows(result)
    if result.kind == "flow" and not (frame[["flow", "low"]].fillna(1) > 0).all(axis=None):
        spec = "flow_linear"  # a logarithmic axis has no place for 0
    yield {
        "title": title,
        "spec": spec,
        "sets": {"rows": records(frame)},
        "caption": _caption(result, frame),
    }
    if result.kind == "screen":
        run = effect_rows.screen_rows(result)
        yield {
            "title": "Estimates against exact effects",
            "spec": "screen",
            "sets": {"rows": records(run)},
            "caption": f"{len(run)} of {len(result.frame)} rows were run. The line is where "
            "estimate and effect agree; rows of the audit were drawn at random.",
        }


def _forests(result: Result, head: str | None = None) -> Iterator[dict[str, Any]]:
    """Yield a forest plot for each metric; with `head`, of the edits that name it."""
    for metric in effect_rows.metrics_of(result):
        rows, draws = effect_rows.forest_rows(result, metric), effect_rows.draw_rows(result, metric)
        if head is not None:
            rows = rows[[head in _HEAD.findall(str(edit)) for edit in rows["edit"]]]
            draws = draws[draws["row"].isin(rows["row"])]
        if len(rows):
            yield {
                "title": f"Effects on {metric}",
                "spec": "forest",
                "sets": {"rows": records(rows[list(_FOREST)]), "draws": records(draws)},
                "caption": _forest_caption(rows, len(draws)),
            }


def _forest_caption(rows: pd.DataFrame, n_draws: int) -> str:
    edits = rows[rows["what"] == "edit"]
    clear = int(((edits["low"] > 0) | (edits["high"] < 0)).sum())
    controls = (
        f" A control is the mean of its draws, and ticks are the {n_draws} single draws."
        if n_draws
        else ""
    )
    return (
        f"Edited minus clean; the interval over prompts excludes zero for {clear} of {len(edits)}."
        f"{controls}"
    )


def _caption(result: Result, frame: pd.DataFrame) -> str:
    """Return what a chart shows, with its largest number."""
    measured = {"flow": "flow", "copying": "top1", "persistence": "natural"}.get(
        result.kind, "effect"
    )
    frame = frame[frame[measured].notna()].sort_values(measured, key=abs, ascending=False)
    rows = frame.to_dict(orient="records")
    if not rows:
        return "Nothing was measured."
    single = [row for row in rows if row.get("row") != "all paths"]
    top = single[0] if single else rows[0]
    if result.kind == "flow":
        return (
            f"Largest at Δ={top['offset']} ({top['flow']:.3g} nats, {top['edit']}). Bands are "
            "intervals over prompts."
        )
    if result.kind == "copying":
        best = {row["edit"]: row for row in reversed(rows)}
        each = [f"{edit}: lag {row['lag']} ({row['top1']:.2f})" for edit, row in best.items()]
        return f"The lag that is copied most often, by edit: {'; '.join(reversed(each))}."
    if result.kind == "persistence":
        return (
            f"Highest on natural text: {top['name']} at Δ={top['offset']}, {top['natural']:.3f}, "
            f"and {top['random']:.3f} on random tokens. Dashed lines are the thresholds."
        )
    name = top["name"] if result.kind in _BY_HEAD else top["row"]
    what = "Largest single path" if result.kind == "paths" else "Largest"
    return (
        f"{what}: {name}, {top['effect']:+.3g}. Chosen for being the largest, it looks larger than "
        "it is; where there are prompts enough, a remark has one chosen on other prompts."
    )


def sweep_values(
    result: Result, shape: tuple[int, int]
) -> Iterator[tuple[str, list[dict[str, Any] | None]]]:
    """Yield a sweep's label and, for each head of the model, its largest effect and the offset.

    Heads that were not run have none.
    """
    frame = result.frame.sort_values("effect", key=abs, ascending=False)
    values: list[dict[str, Any] | None] = [None] * (shape[0] * shape[1])
    for row in frame.drop_duplicates("name").to_dict(orient="records"):
        if row["effect"] != row["effect"]:
            continue
        at = row["layer"] * shape[1] + row["head"]
        values[at] = {"effect": number(row["effect"]), "offset": row.get("offset")}
    yield _subject(result), values


def effects_by_head(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Return, for each head that an edit acts on, its forest plots and its rows of each result."""
    named: dict[str, dict[str, Any]] = {}
    for result in results:
        for name, rows in _rows_by_head(result).items():
            entry = named.setdefault(name, {"charts": [], "tables": []})
            entry["tables"].append(table_data(rows, f"{TITLES[result.kind]}: rows of {name}"))
            if result.kind == "measure":
                entry["charts"] += _forests(result, name)
    return named


def _rows_by_head(result: Result) -> dict[str, pd.DataFrame]:
    """Return the rows of a result for each head that their edits (or readers) name."""
    frame = result.frame
    columns = {"sweep": "name", "screen": "name", "persistence": "name"}
    columns |= {"paths": "reader", "pairs": "patched", "circuit": "member"}
    column = columns.get(result.kind, "edit")
    names = [set(_HEAD.findall(str(value))) for value in frame[column]]
    found = sorted(set().union(*names), key=Head.parse) if names else []
    return {name: frame[[name in row for row in names]] for name in found}


def table_data(frame: pd.DataFrame, title: str) -> dict[str, Any]:
    """Return a table for the page: columns, at most `MOST_ROWS` rows, and how many are left out."""
    ends = {end for pair in ENDS.values() for end in pair}
    columns = [
        {
            "key": name,
            "label": LABELS.get(name, name.replace("_", " ")),
            "number": name not in TEXT,
            "signed": name in ("effect", "difference"),
            "share": name == "as_large",
            "ends": list(ENDS[name]) if name in ENDS and ENDS[name][0] in frame else None,
        }
        for name in map(str, frame.columns)
        if name not in ends
        and not (name == "of" and not frame["of"].any())
        and not (name in ("layer", "head") and "name" in frame)
    ]
    left_out = len(frame) - MOST_ROWS
    return {
        "title": title,
        "columns": columns,
        "rows": records(frame.head(MOST_ROWS)),
        "note": f"{left_out} more rows are in the result's own file." if left_out > 0 else "",
    }
