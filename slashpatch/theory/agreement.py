"""How well predicted steps and offsets agree with measured ones."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import TheoryError
from .data import seeded
from .run import Slash
from .settings import as_integer

if TYPE_CHECKING:
    import pandas as pd


def agreement(
    frame: pd.DataFrame, by: str = "predicted", n_resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Return how well predictions agree with measurements, in the table that `compare` returns.

    Args:
        frame: The table, or some of its rows.
        by: "predicted" or "closed_form": whose steps and offsets.
        n_resamples: Resamples of the settings, each with all its seeds, for 95 % percentile
            intervals.
        seed: Seed of the resampling.

    Returns:
        Columns `measure`, `value`, `low`, `high`, and `n`, the number of runs that it is over.
        `r2`: 1 − SS_res/SS_tot of log(step), the prediction taken as it is, over runs in which both
        have a step. `median_error`: of |predicted − measured| / measured, over the same runs.
        `r2_first`, `median_error_first`: the same for `first_step`. `slash_right`: share of runs in
        which both or neither have a step. `offset_right`, `final_offset_right`: share of runs with
        the right (final) offset, among those with a slash in either. `offset_right_where_measured`:
        the same among those with a measured slash. `task_offset`: share of these in which it forms
        at the task's offset. Then numbers of runs:
        `both` have a step, only the prediction (`predicted_only`), only training (`measured_only`),
        `neither`. NaN where there is no run; R² also if all measured steps are equal. A step that
        is missing, as infinite ones are in a .json file, counts as none. *Ours*.

    Raises:
        TheoryError: An unknown `by`, `n_resamples` below 1, an empty table, or one that lacks
            columns of `compare`.
    """
    import pandas as pd

    if by not in ("predicted", "closed_form"):
        raise TheoryError(f"by is 'predicted' or 'closed_form'; got {by!r}")
    if not len(frame):
        raise TheoryError("the table has no runs; expected at least one")
    n_resamples = as_integer("n_resamples", n_resamples, 1, 10**6)
    names = [f"{kind}_{name}" for name in Slash._fields for kind in (by, "measured")]
    lacking = sorted({*names, "offset", "setting"} - set(frame.columns))
    if lacking:
        raise TheoryError(f"expected a table that compare returns; it lacks {', '.join(lacking)}")
    absent = {name: math.inf if name.endswith("step") else -1 for name in names}
    table = frame[[*names, "offset"]].fillna(absent)
    runs = torch.tensor(table.to_numpy(float), dtype=torch.float64)
    settings = torch.tensor(frame["setting"].to_numpy(int))
    groups = [(settings == one).nonzero()[:, 0] for one in settings.unique()]
    shape = (n_resamples, len(groups))
    picked = torch.randint(len(groups), shape, generator=seeded(seed, "agreement"))
    resampled = [_measures(runs[torch.cat([groups[i] for i in row])]) for row in picked]
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    records = []
    for name, (value, n) in _measures(runs).items():
        values = torch.tensor([one[name][0] for one in resampled], dtype=torch.float64)
        low, high = values.nanquantile(ends).tolist()
        records.append((name, value, low, high, n))
    said, seen = _has_step(runs)
    counts = {
        "both": said & seen,
        "predicted_only": said & ~seen,
        "measured_only": seen & ~said,
        "neither": ~said & ~seen,
    }
    nan = float("nan")
    records += [(name, float(one.sum()), nan, nan, len(runs)) for name, one in counts.items()]
    return pd.DataFrame(records, columns=["measure", "value", "low", "high", "n"])


def _has_step(runs: Float[Tensor, "run column"]) -> tuple[Tensor, Tensor]:
    """Return in which runs the prediction has a step, and in which training has."""
    return runs[:, 0].isfinite(), runs[:, 1].isfinite()


def _measures(runs: Float[Tensor, "run column"]) -> dict[str, tuple[float, int]]:
    """Return each measure and the number of runs that it is over."""
    step, first, offset, final = (runs[:, at : at + 2].T for at in (0, 2, 4, 6))
    (r2, error, n), (r2_first, error_first, n_first) = _errors(*step), _errors(*first)
    said, seen = _has_step(runs)
    return {
        "r2": (r2, n),
        "median_error": (error, n),
        "r2_first": (r2_first, n_first),
        "median_error_first": (error_first, n_first),
        "slash_right": (float((said == seen).double().mean()), len(runs)),
        "offset_right": _share(offset[0], offset[1]),
        "offset_right_where_measured": _share(offset[0].where(offset[1] >= 0, -1.0), offset[1]),
        "final_offset_right": _share(final[0], final[1]),
        "task_offset": _share(runs[:, 8].where(offset[1] >= 0, -1.0), offset[1]),
    }


def _errors(
    predicted: Float[Tensor, "batch"], measured: Float[Tensor, "batch"]
) -> tuple[float, float, int]:
    """Return R² of log steps, the median relative error, and the number of runs with both."""
    both = predicted.isfinite() & measured.isfinite()
    said, seen = predicted[both].clamp(min=1), measured[both].clamp(min=1)
    if not len(seen):
        return math.nan, math.nan, 0
    total = (seen.log() - seen.log().mean()).square().sum()
    rest = (said.log() - seen.log()).square().sum()
    r2 = float(1 - rest / total) if total > 0 else math.nan
    return r2, float(((said - seen).abs() / seen).quantile(0.5)), len(seen)


def _share(said: Float[Tensor, "batch"], seen: Float[Tensor, "batch"]) -> tuple[float, int]:
    """Return the share of equal offsets among runs with a slash in either, and their number."""
    slash = (said >= 0) | (seen >= 0)
    return float((said == seen)[slash].double().mean()), int(slash.sum())
