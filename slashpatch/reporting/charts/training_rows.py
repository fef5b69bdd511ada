"""Rows of the charts of training, of phase diagrams and of a model's check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from ...checking.result import Report
    from ...scanning.emergence_result import Emergence
    from ...theory import Run


#: How many heads have a colour of their own.
_COLOURED = 7


def training_rows(runs: Sequence[Run]) -> pd.DataFrame:
    """Return slash score and layer 2's attention to the answer: columns step, value, what, seed."""
    import pandas as pd

    offset = runs[0].settings.offset
    columns = {
        f"score_{offset}": f"slash score at Δ={offset}",
        "matching": "attention of layer 2 to the answer",
    }
    rows = [
        (row["step"], row[column], what, run.settings.seed)
        for column, what in columns.items()
        for run in runs
        for row in run.rows
    ]
    return pd.DataFrame(rows, columns=["step", "value", "what", "seed"])


def emergence_rows(found: Emergence, kappa: float) -> pd.DataFrame:
    """Return each head's slash score at the offset of its highest one, by step.

    Columns step, score, name, and what: head and offset of the seven highest heads that reach κ,
    else "other heads".
    """
    import pandas as pd

    best = found.best()
    chosen = dict(coloured(best, kappa))
    peaks = best.loc[best.groupby("name", sort=False)["score"].idxmax()]
    parts = []
    for name, offset in zip(peaks["name"], peaks["offset"], strict=True):
        rows = found.frame.loc[found.frame["name"] == name, ["step", f"score_{offset}", "name"]]
        rows = rows.set_axis(["step", "score", "name"], axis=1)
        what = f"{name} Δ={offset}" if name in chosen else "other heads"
        parts.append(rows.assign(what=what))
    order = {name: place for place, name in enumerate(chosen)}
    parts.sort(key=lambda rows: order.get(rows["name"].iloc[0], len(order)))
    return pd.concat(parts, ignore_index=True)


def coloured(best: pd.DataFrame, kappa: float) -> list[tuple[str, int]]:
    """Return the heads to colour, with the offset of each one's highest score."""
    rows = best.loc[best.groupby("name", sort=False)["score"].idxmax()]
    rows = rows[rows["score"] >= kappa].sort_values("score", ascending=False).head(_COLOURED)
    return list(zip(rows["name"].tolist(), rows["offset"].tolist(), strict=True))


def phase_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each pair of settings of a phase diagram: row, column, steps, score.

    `steps` is the median over seeds, infinite where most seeds did not reach the slash; `score` the
    mean.
    """
    import pandas as pd

    rows, columns = frame.columns[:2]
    groups = frame.groupby([rows, columns], sort=False)
    table = groups.agg(steps=("time_to_slash", "median"), score=("final_score", "mean"))
    cells = [
        (str(row), str(column), steps, score)
        for (row, column), steps, score in table.itertuples(name=None)
    ]
    return pd.DataFrame(cells, columns=["row", "column", "steps", "score"])


def check_rows(report: Report) -> pd.DataFrame:
    """Return the number of checks by contract and outcome: columns contract, status, n."""
    import pandas as pd

    counts: dict[tuple[str, str], int] = {}
    for check in report.checks:
        key = (check.contract, check.status)
        counts[key] = counts.get(key, 0) + 1
    rows = [(*key, n) for key, n in counts.items()]
    return pd.DataFrame(rows, columns=["contract", "status", "n"])
