"""Which heads of a screen are run exactly, and what the audit says of those that are not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ...errors import MetricError

if TYPE_CHECKING:
    import pandas as pd

#: Rows of a screen that are run exactly, by why.
TOP, FLAGGED, AUDIT = "top", "flagged", "audit"
#: The audit asks for heads whose effect is at least that of the verified head of this rank. *Ours*.
_RANK = 10


@dataclass(frozen=True)
class Estimates:
    """Estimated effects of each variant.

    Attributes:
        clean: The estimate from the gradient at the clean run, mean over prompts.
        size: Root mean square over prompts and over gradients, the clean one and those at randomly
            moved heads.
    """

    clean: Float[Tensor, "variant"]
    size: Float[Tensor, "variant"]


def estimates(contributions: Float[Tensor, "run prompt variant"]) -> Estimates:
    """Return the estimates from each gradient's contributions; run 0 is the clean one."""
    return Estimates(contributions[0].mean(0), contributions.square().mean((0, 1)).sqrt())


def choose(
    found: Estimates, layers: Int[Tensor, "variant"], verify: int, audit: int, seed: int
) -> dict[int, str]:
    """Return why each variant that is run exactly is run, by its index.

    The `verify` variants of largest |estimate| are "top". Those that are among as many of largest
    size, but not "top", are "flagged": a gradient elsewhere, or single prompts, disagree with the
    estimate. `audit` others are drawn at random, layer by layer.
    """
    by_estimate = found.clean.abs().argsort(descending=True, stable=True).tolist()
    by_size = found.size.argsort(descending=True, stable=True).tolist()
    why = dict.fromkeys(by_estimate[:verify], TOP)
    why |= {index: FLAGGED for index in by_size[:verify] if index not in why}
    rest = [index for index in range(len(layers)) if index not in why]
    return why | dict.fromkeys(draw(rest, layers[rest].tolist(), audit, seed), AUDIT)


def draw(items: Sequence[int], strata: Sequence[int], n: int, seed: int) -> list[int]:
    """Return n of the items, drawn at random and spread over the strata in proportion.

    Every item has the same chance: the strata and the items within each are shuffled, and then
    every (len(items) / n)-th is taken from a random start (systematic sampling). Strata in their
    own order would do harm where every second layer is alike: a step of two layers hits all or none
    of these.
    """
    from transformer_lens.utilities.statistics import derive_generator

    if n == 0 or n >= len(items):
        return list(items) if n else []
    generator = derive_generator(seed, "screen audit")
    shuffled = torch.randperm(len(items), generator=generator).tolist()
    of_strata = sorted(set(strata))
    places = torch.randperm(len(of_strata), generator=generator).tolist()
    turn = dict(zip(of_strata, places, strict=True))
    ordered = sorted(shuffled, key=lambda place: turn[strata[place]])
    start = float(torch.rand((), generator=generator, dtype=torch.float64))
    step = len(items) / n
    return [items[ordered[min(int((start + k) * step), len(items) - 1)]] for k in range(n)]


def most_missed(n_rest: int, n_audited: int, n_found: int, confidence: float) -> int:
    """Return an upper bound on how many of the rows that were not run would have counted.

    Clopper and Pearson's bound for the share, from `n_found` among `n_audited` that were drawn from
    `n_rest`. It is exact for independent draws; for those of `draw`, which vary less, it is
    careful (simulated in the tests, with rows that count in one layer, in every second, or spread).
    """
    from scipy.stats import beta

    n_unknown = n_rest - n_audited
    if n_unknown == 0 or n_audited == 0 or n_found == n_audited:
        return n_unknown
    share = float(beta.ppf(confidence, n_found + 1, n_audited - n_found))
    return min(max(int(share * n_rest) - n_found, 0), n_unknown)


def audited(frame: pd.DataFrame, above: float | None, confidence: float) -> pd.DataFrame:
    """Return the audit's findings as a table of one row; `frame` is the screen's table.

    Columns: `above` (the effect asked about; None: that of the verified row of rank 10), `found`
    (rows with such an effect, other than zero, that were run), `by_audit` (of these, how many the
    audit alone found), `audited`, `unverified` (rows that were not run), `missed` and
    `missed_at_most` (how many of those have such an effect: estimate, and upper bound at
    `confidence`), `recall` and `recall_at_least`, `spearman` (of the sizes of estimate and effect,
    over the audited rows).
    """
    import pandas as pd
    from scipy.stats import spearmanr

    sizes = frame["effect"].abs()
    was_chosen, was_drawn = frame["why"].isin((TOP, FLAGGED)), frame["why"] == AUDIT
    if above is None:
        largest = sizes[was_chosen].sort_values(ascending=False)
        above = float(largest.iloc[min(_RANK, len(largest)) - 1])
    n_drawn, n_rest = int(was_drawn.sum()), int((~was_chosen).sum())
    counts = (sizes >= above) & (sizes > 0)
    by_audit, found = int(counts[was_drawn].sum()), int(counts.sum())
    unknown = n_rest - n_drawn
    missed = unknown * by_audit / n_drawn if n_drawn else 0.0 if unknown == 0 else math.nan
    at_most = most_missed(n_rest, n_drawn, by_audit, confidence)
    estimated, exact = frame["estimate"].abs()[was_drawn], sizes[was_drawn]
    varied = n_drawn > 2 and estimated.nunique() > 1 and exact.nunique() > 1
    return pd.DataFrame(
        [
            {
                "above": above,
                "found": found,
                "by_audit": by_audit,
                "audited": n_drawn,
                "unverified": unknown,
                "missed": missed,
                "missed_at_most": at_most,
                "recall": found / (found + missed) if found else math.nan,
                "recall_at_least": found / (found + at_most) if found else math.nan,
                "spearman": float(spearmanr(estimated, exact).statistic) if varied else math.nan,
                "confidence": confidence,
            }
        ]
    )


def require_counts(verify: object, audit: object, above: Any) -> None:
    """Raise MetricError unless verify and audit are integers from 1 and 0, above a size or None."""
    for name, count, least in (("verify", verify, 1), ("audit", audit, 0)):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise MetricError(f"{name} must be an integer of at least {least}; got {count!r}")
    if above is None:
        return
    number = isinstance(above, (int, float)) and not isinstance(above, bool)
    if not number or not 0 <= above < math.inf:
        raise MetricError(f"above must be an effect's size, a number from 0 on; got {above!r}")
