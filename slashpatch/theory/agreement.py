"""How well predicted steps and offsets agree with measured ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import TheoryError
from .data import seeded

if TYPE_CHECKING:
    import pandas as pd


def agreement(
    frame: pd.DataFrame, by: str = "predicted", n_resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Return how well predictions agree with measurements, in the table that `compare` returns.

    Args:
        frame: The table.
        by: "predicted" or "closed_form": whose steps and offsets.
        n_resamples: Resamples of the settings, each with all its seeds, for 95 % percentile
            intervals.
        seed: Seed of the resampling.

    Returns:
        Columns `measure`, `value`, `low`, `high`, and `n`, the number of runs that it is over.
        `r2`: 1 − SS_res/SS_tot of log(step), the prediction taken as it is, over runs in which both
        have a step. `median_error`: of |predicted − measured| / measured, over the same runs.
        `slash_right`: share of runs in which both or neither have a step. `offset_right`: share of
        right offsets, over runs with a slash at some offset in either. `task_offset`: the same
        share for the guess that the slash stands at the task's offset. Then numbers of runs: `both`
        have a step, only the prediction (`predicted_only`), only training (`measured_only`),
        `neither`. *Ours*.

    Raises:
        TheoryError: An unknown `by`.
    """
    import pandas as pd

    if by not in ("predicted", "closed_form"):
        raise TheoryError(f"by is 'predicted' or 'closed_form'; got {by!r}")
    columns = [f"{by}_step", "measured_step", f"{by}_offset", "measured_offset", "offset"]
    runs = torch.tensor(frame[columns].fillna(-1).to_numpy(float))
    settings = torch.tensor(frame["setting"].to_numpy())
    groups = [(settings == one).nonzero()[:, 0] for one in settings.unique()]
    found, n = _agreement(runs)
    shape = (n_resamples, len(groups))
    picked = torch.randint(len(groups), shape, generator=seeded(seed, "agreement"))
    resampled = [_agreement(runs[torch.cat([groups[i] for i in row])])[0] for row in picked]
    records = []
    for measure, value in found.items():
        values = torch.tensor([one[measure] for one in resampled], dtype=torch.float64)
        low, high = values.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        records.append((measure, value, low, high, n[measure]))
    both, said, seen = _steps(runs)
    counts = {
        "both": both,
        "predicted_only": said & ~seen,
        "measured_only": seen & ~said,
        "neither": ~said & ~seen,
    }
    nan = float("nan")
    records += [(name, int(one.sum()), nan, nan, len(runs)) for name, one in counts.items()]
    return pd.DataFrame(records, columns=["measure", "value", "low", "high", "n"])


def _steps(runs: Float[Tensor, "run column"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return which runs have a step in both, in the prediction, and in training."""
    said, seen = runs[:, 0].isfinite(), runs[:, 1].isfinite()
    return said & seen, said, seen


def _agreement(runs: Float[Tensor, "run column"]) -> tuple[dict[str, float], dict[str, int]]:
    """Return the measures, NaN where there is no run, and the number of runs of each."""
    both, said, seen = _steps(runs)
    predicted, measured = runs[both, 0].clamp(min=1), runs[both, 1].clamp(min=1)
    residual = (predicted.log() - measured.log()).square().sum()
    total = (measured.log() - measured.log().mean()).square().sum()
    slash = (runs[:, 2] >= 0) | (runs[:, 3] >= 0)
    at = runs[slash]
    values = {
        "r2": 1 - residual / total,
        "median_error": ((predicted - measured).abs() / measured).quantile(0.5)
        if both.any()
        else torch.tensor(torch.nan),
        "slash_right": (said == seen).double().mean(),
        "offset_right": (at[:, 2] == at[:, 3]).double().mean(),
        "task_offset": (at[:, 4] == at[:, 3]).double().mean(),
    }
    n_both, n_slash = int(both.sum()), int(slash.sum())
    n = {"r2": n_both, "median_error": n_both, "slash_right": len(runs)}
    n |= {"offset_right": n_slash, "task_offset": n_slash}
    return {name: float(value) for name, value in values.items()}, n
