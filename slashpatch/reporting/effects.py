"""Tables of measured effects for the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import pandas as pd

    from ..effects.result import Result

#: The columns that are shown for each kind of result.
_COLUMNS = {
    "measure": (
        "edit",
        "metric",
        "of",
        "against",
        "baseline",
        "edited",
        "effect",
        "q",
        "p_rank",
        "as_large",
    ),
    "flow": ("edit", "offset", "flow", "effect", "q"),
    "copying": ("edit", "lag", "top1", "loss", "effect", "q"),
    "paths": ("reader", "input", "baseline", "edited", "effect", "q"),
    "pairs": ("patched", "direction", "baseline", "edited", "normalized", "q"),
    "direct": ("edit", "part", "of", "baseline", "edited", "effect", "q", "repaired"),
    "persistence": ("name", "offset", "natural", "random", "difference", "q"),
    "sweep": ("name", "offset", "baseline", "edited", "effect", "q"),
    "screen": ("name", "offset", "estimate", "effect", "q", "why"),
    "dose": ("metric", "against", "dose", "baseline", "edited", "effect", "q", "p_rank"),
    "circuit": ("what", "member", "value", "share", "p", "q", "p_rank"),
}
#: Titles of columns that differ from their names, and the columns that hold texts.
TITLES = {
    "offset": "Δ",
    "p_rank": "p rank",
    "as_large": "draws as large",
    "name": "head",
    "of": "",
}
TEXTS = (
    *("edit", "metric", "of", "against", "name", "reader", "input", "why"),
    *("patched", "part", "direction", "what", "member"),
)
#: Largest number of heads in the table of matching heads.
_HEADS = 6
#: Columns that are shown with an interval, and the columns of its ends.
_INTERVALS = {
    "effect": ("low", "high"),
    "share": ("low", "high"),
    "flow": ("flow_low", "flow_high"),
    "top1": ("top1_low", "top1_high"),
    "loss": ("loss_low", "loss_high"),
    "normalized": ("normalized_low", "normalized_high"),
    "repaired": ("repaired_low", "repaired_high"),
    "natural": ("natural_low", "natural_high"),
    "random": ("random_low", "random_high"),
    "difference": ("low", "high"),
}
_UNITS = {
    "measure": "effect: edited minus baseline, paired by prompt",
    "flow": "KL divergence in nats that replacing the token Δ before causes",
    "copying": "top1: share of tokens; loss in nats; effect: on the loss",
    "paths": "effect of the edit through one input of one later head",
    "pairs": "logit difference with patched activations; normalized: 1 is the other run",
    "direct": "effect through the residual stream alone, and in all; repair: total − direct",
    "persistence": "slash scores on natural text and random tokens; difference: random − natural",
    "sweep": "effect of the edit at one head at a time",
    "screen": "effect of the edit at one head at a time, estimated at all and run at some",
    "dose": "effect at each dose of {}",
    "circuit": "{}, as a share of what ablating all heads changes",
}


def effects_report(result: Result, top: int = 40) -> Group:
    """Return the main table with at most `top` rows, the table of heads, and remarks."""
    frame = result.frame
    title, line = headings(result)
    parts: list[Any] = [Text(title, style="bold"), Text(line, style="dim"), _table(result, top)]
    if len(frame) > top:
        parts.append(Text(f"{len(frame) - top} more rows: --out or --json has them", style="dim"))
    if len(result.tables.get("heads", ())):
        parts += [Text(), Text("heads that match earlier tokens, and at which lag", style="bold")]
        parts.append(_heads(result.tables["heads"]))
        n = result.tables["heads"]["head"].nunique()
        if n > _HEADS:
            parts.append(Text(f"{n - _HEADS} more heads: --out or --json has them", style="dim"))
    if result.remarks:
        parts += [Text(), *(Text(remark) for remark in result.remarks)]
    return Group(*parts)


def headings(result: Result) -> tuple[str, str]:
    """Return what is measured, and on how many prompts, as two lines."""
    origin = result.provenance
    measured = "; ".join(map(str, origin.get("measured", ()))) or "the edit"
    over = "over prompts"
    if origin.get("controls"):
        over += ", and draws against a control"
    rows = "the rows top and flagged" if result.kind == "screen" else "all rows"
    return (
        f"{origin['model']}: {_UNITS[result.kind].replace('{}', measured)}",
        f"{origin['prompts']['n']} prompts ({origin['prompts']['source']}); "
        f"{origin['confidence']:.0%} intervals {over}; q: p of other prompts, adjusted for {rows}"
        + ("; p_rank: other draws" if origin.get("controls") else ""),
    )


def effect_cells(result: Result, top: int) -> tuple[list[str], list[list[str]]]:
    """Return the columns that are shown for a result's kind, and the cells of its first rows.

    An edit is named in the first of its rows only.
    """
    frame = result.frame.head(top)
    shown = [name for name in _COLUMNS[result.kind] if name in frame]
    if "of" in shown and not result.frame["of"].any():
        shown.remove("of")
    rows, previous = [], None
    for row in frame.to_dict(orient="records"):
        cells = [_cell(name, row) for name in shown]
        if "edit" in shown and row["edit"] == previous:
            cells[shown.index("edit")] = ""
        previous = row.get("edit")
        rows.append(cells)
    return shown, rows


def _table(result: Result, top: int) -> Table:
    shown, rows = effect_cells(result, top)
    table = Table()
    for name in shown:
        table.add_column(
            TITLES.get(name, name),
            justify="left" if name in TEXTS else "right",
            overflow="fold",
            no_wrap=name not in ("edit", "against", "patched"),
        )
    for cells in rows:
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _heads(frame: pd.DataFrame) -> Table:
    """Return the table of heads that attend to where earlier tokens match, and at which lag."""
    table = Table("edit", "head", "matches lag", "score", "at lag 1")
    shown = list(dict.fromkeys(frame["head"]))[:_HEADS]
    for row in frame[frame["head"].isin(shown)].to_dict(orient="records"):
        lag = row["matches_lag"]
        table.add_row(
            Text(str(row["edit"])),
            row["head"],
            "–" if lag is None or lag != lag else str(lag),
            _with_interval(row["score"], row["low"], row["high"]),
            f"{row['at_lag_1']:.3f}",
        )
    return table


def _cell(name: str, row: dict[Any, Any]) -> str:
    value = row[name]
    if name in _INTERVALS:
        low, high = (row[end] for end in _INTERVALS[name])
        return _with_interval(value, low, high, sign=name in ("effect", "difference"))
    if name in ("q", "p", "p_rank") and not _missing(value):
        return f"{value:.3f}" if value >= 0.001 else "<0.001"
    if name == "as_large" and not _missing(value):
        return f"{value:.0%}"
    return _number(value)


def _with_interval(value: float, low: float, high: float, sign: bool = False) -> str:
    if _missing(value):
        return "–"
    text = _number(value, sign)
    return text if _missing(low) else f"{text} [{_number(low, sign)}, {_number(high, sign)}]"


def _number(value: Any, sign: bool = False) -> str:
    if not isinstance(value, float):
        return "–" if value is None else str(value)
    if _missing(value):
        return "–"
    plus = "+" if sign else ""
    return f"{value:{plus}.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:{plus}.0e}"


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
