"""When a quantity changed during training: change points and their order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ...errors import TheoryError

if TYPE_CHECKING:
    import pandas as pd

    from ...scanning.emergence_result import Emergence

#: The least changes that count, in the units of each quantity. *Ours*. As the learning rate goes
#: down, the copying loss falls without any copying too: by up to 1.6 nats in docs/emergence.md.
LEAST = {"score": 0.2, "rank": 0.1, "cone": 0.1, "prefix": 0.2, "copying": 2.0}
#: Induction heads reach this prefix matching by the end, else there is none. *Ours*.
INDUCTION = 0.2
#: Quantities of one head, with the column of `Emergence.frame` and the kind of change.
_OF_ITS_QUERIES_AND_KEYS = (
    ("r1 of its queries", "r1_q", "rank"),
    ("r1 of its keys", "r1_k", "rank"),
    ("cone of its queries", "cone_q", "cone"),
    ("cone of its keys", "cone_k", "cone"),
    ("cone of its layer's input", "cone_x", "cone"),
)


@dataclass(frozen=True)
class Change:
    """A change of one quantity over training. See `change_point`.

    Attributes:
        step: Where it crosses half of its change; NaN if it changed too little.
        early: Where it crosses a quarter of its change.
        late: Where it crosses three quarters of its change.
        before: Its level before.
        after: Its level after.
    """

    step: float
    early: float
    late: float
    before: float
    after: float


def change_point(
    steps: Sequence[int], values: Sequence[float | int], least: float, falls: bool = False
) -> Change:
    """Return when a quantity rose (or fell) to its final level, for the last time. *Ours*.

    The level after is the mean of the last tenth of the measurements; the level before is the
    lowest (highest, if it falls) value measured earlier, which may lie after the first step. The
    change point is where the quantity last crosses the middle of the two, linearly between
    measurements. NaN values are left out, and so is a dip at the very end: what comes after the
    last value that has three quarters of the change.

    Raises TheoryError for fewer than two values that are finite, or other numbers of steps and
    values.
    """
    at, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    finite = np.isfinite(y)
    if len(at) != len(y) or finite.sum() < 2:
        raise TheoryError(
            f"a change point needs two or more measurements; got {len(at)} steps and {len(y)} "
            f"values, of which {int(finite.sum())} are finite"
        )
    at, y = at[finite], y[finite]
    sign = -1.0 if falls else 1.0
    y = sign * y
    n_last = max(1, len(y) // 10)
    after = float(y[-n_last:].mean())
    lowest = int(y[:-n_last].argmin())
    before = float(y[lowest])
    size = after - before
    if not 0 < size >= least:
        return Change(math.nan, math.nan, math.nan, sign * before, sign * after)
    end = int(np.flatnonzero(y >= before + 0.75 * size)[-1]) + 1
    crossings = [
        _last_crossing(at[lowest:end], y[lowest:end], before + share * size)
        for share in (0.25, 0.5, 0.75)
    ]
    return Change(crossings[1], crossings[0], crossings[2], sign * before, sign * after)


def _last_crossing(steps: np.ndarray, values: np.ndarray, level: float) -> float:
    """Return where values last rise above a level, which the last one is; linear in between."""
    last = int(np.flatnonzero(values < level)[-1])
    share = (level - values[last]) / (values[last + 1] - values[last])
    return float(steps[last] + share * (steps[last + 1] - steps[last]))


def changes(text: Emergence, random: Emergence) -> pd.DataFrame:
    """Return when slashes, rank one, the cone, induction and copying appeared in a run.

    Rows (definitions *ours*):

    - strongest slash: the head with the highest slash score in the end, at any offset from 1, on
      held-out text;
    - slash below induction: the head with the highest score at an offset from 1, in a layer below
      the induction head's (below the last layer if there is none); and the same head and offset on
      random tokens;
    - r1 and cone of that head's queries and keys, and the cone of its layer's input, where these
      were measured;
    - induction: the head with the highest prefix matching at the end;
    - copying: the loss on the second copy of random tokens, which falls.

    Args:
        text: Measurements on held-out text, with prefix matching and copying loss.
        random: Measurements on uniform random tokens.

    Returns:
        Columns: quantity, head, offset (−1 where it has none), before, after, early, step, late.
    """
    import pandas as pd

    last = text.best(1)[lambda rows: rows["step"] == rows["step"].max()].reset_index(drop=True)
    ends = text.frame[text.frame["step"] == text.steps[-1]].reset_index(drop=True)
    induction = ends.iloc[int(ends["prefix_matching"].fillna(-1).argmax())]
    found_one = float(induction["prefix_matching"]) >= INDUCTION
    n_layers = int(text.provenance["layers_heads_vocabulary"][0])
    top = int(induction["layer"]) if found_one else n_layers - 1
    first = last.iloc[int(last["score"].argmax())]
    rows = [_row("strongest slash", text, first["name"], f"score_{first['offset']}", "score")]
    below = last[last["layer"] < top]
    if len(below):
        feeding = below.iloc[int(below["score"].argmax())]
        name, column = str(feeding["name"]), f"score_{feeding['offset']}"
        rows.append(_row("slash below induction", text, name, column, "score"))
        rows.append(_row("the same on random tokens", random, name, column, "score"))
        rows += [
            _row(quantity, text, name, measured, kind)
            for quantity, measured, kind in _OF_ITS_QUERIES_AND_KEYS
            if measured in text.frame
        ]
    rows.append(_row("induction", text, induction["name"], "prefix_matching", "prefix"))
    rows.append(_row("copying loss", text, induction["name"], "copying_loss", "copying"))
    return pd.DataFrame(rows)


def _row(
    quantity: str, found: Emergence, name: object, column: str, kind: str
) -> dict[str, object]:
    values = found.frame[found.frame["name"] == name][column].tolist()
    change = change_point(found.steps, values, LEAST[kind], falls=kind == "copying")
    offset = int(column.removeprefix("score_")) if column.startswith("score_") else -1
    return {
        "quantity": quantity,
        "head": "" if kind == "copying" else str(name),
        "offset": offset,
        "before": change.before,
        "after": change.after,
        "early": change.early,
        "step": change.step,
        "late": change.late,
    }
