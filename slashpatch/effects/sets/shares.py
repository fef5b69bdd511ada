"""The tables of a circuit: what each run's values say of its members."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..ratios import ratio_of_means
from ..running.conditions import Condition
from ..statistics import adjusted, few_prompts, p_value
from .members import Member

if TYPE_CHECKING:
    import pandas as pd

#: Random sets that a rank p-value of 0.05 needs.
_RANKED = 19


def joined(members: Sequence[Member]) -> str:
    """Return the names of members as one text."""
    return ", ".join(map(str, members))


@dataclass(frozen=True)
class Plan:
    """What is run for a circuit.

    Attributes:
        members: Its members.
        subsets: Random subsets of them.
        draws: Random sets of as many in each layer.
        conditions: The runs by label.
    """

    members: tuple[Member, ...]
    subsets: list[tuple[Member, ...]]
    draws: list[tuple[Member, ...]]
    conditions: dict[str, Condition]


class Shares:
    """The tables of a circuit, from each run's values [prompt], as shares of what all heads do."""

    def __init__(
        self,
        plan: Plan,
        clean: Float[Tensor, "prompt"],
        values: dict[str, Float[Tensor, "prompt"]],
        metric: str,
        seed: int,
        confidence: float,
    ) -> None:
        self.plan, self.clean, self.values, self.metric = plan, clean, values, metric
        self.seed, self.confidence = seed, confidence
        self.none = values["all ablated"]
        self.rows: list[dict[str, Any]] = []

    def all(self) -> tuple[pd.DataFrame, dict[str, pd.DataFrame], tuple[str, ...]]:
        """Return the main table, the further ones, and what is to be said of them."""
        import pandas as pd

        alone, plan = self.values["members alone"], self.plan
        draws = [self.values[f"{joined(drawn)} alone"] for drawn in plan.draws]
        shares = [self._share(values - self.none)[0] for values in draws]
        mine = self._share(alone - self.none)[0]
        p_rank = float("nan")
        if draws and mine == mine:  # without a share, nothing is ranked
            p_rank = (1 + sum(share >= mine for share in shares)) / (1 + len(draws))
        self._add("faithfulness", "", alone, alone - self.none, p_rank)
        if draws:
            mean = torch.stack(draws).mean(0)
            self._add("random sets", "", mean, mean - self.none)
            self._add("beyond random sets", "", alone, alone - mean)
        left = self.values["without members"]
        self._add("left without", "", left, left - self.none)
        subsets = self._subsets()
        self.rows.append(
            {
                **self._row("incompleteness", "", float("nan")),
                "share": float(subsets["share"].abs().mean()),
            }
        )
        for one in plan.members:
            rest = self.values[f"members alone, without {one}"]
            self._add("minimality", str(one), rest, alone - rest)
        tables = {"subsets": subsets, "values": pd.DataFrame(self._values())}
        if draws:
            drawn = zip(map(joined, plan.draws), shares, strict=True)
            tables["random_sets"] = pd.DataFrame(drawn, columns=["drawn", "share"])
        return adjusted(self.rows), tables, self._remarks()

    def _share(self, difference: Float[Tensor, "prompt"]) -> tuple[float, float, float]:
        return ratio_of_means(difference, self.clean - self.none, self.seed, self.confidence)

    def _row(self, what: str, member: str, value: float) -> dict[str, Any]:
        nothing = dict.fromkeys(("share", "low", "high", "p", "p_rank"), float("nan"))
        n = len(self.clean)
        return {"what": what, "member": member, "metric": self.metric, "n": n, "value": value,
                **nothing}  # fmt: skip

    def _add(
        self,
        what: str,
        member: str,
        value: Float[Tensor, "prompt"],
        difference: Float[Tensor, "prompt"],
        p_rank: float = float("nan"),
    ) -> None:
        share, low, high = self._share(difference)
        p = float(p_value(difference, self.seed))
        row = self._row(what, member, float(value.mean()))
        self.rows.append(
            {**row, "share": share, "low": low, "high": high, "p": p, "p_rank": p_rank}
        )

    def _subsets(self) -> pd.DataFrame:
        """Return f(C − K) − f(M − K) for each subset K, with its interval."""
        import pandas as pd

        rows = []
        for subset in self.plan.subsets:
            inside = self.values[f"members alone, without {joined(subset)}"]
            whole = self.values[f"without {joined(subset)}"]
            share, low, high = self._share(inside - whole)
            rows.append({"subset": joined(subset), "share": share, "low": low, "high": high})
        return pd.DataFrame(rows)

    def _values(self) -> list[dict[str, Any]]:
        runs = {"clean": self.clean, **self.values}
        return [
            {"run": label, "prompt": prompt, "value": value}
            for label, values in runs.items()
            for prompt, value in enumerate(values.tolist())
        ]

    def _remarks(self) -> tuple[str, ...]:
        """Say what a share of 1 is, and where it is too small to divide by."""
        clean, none = float(self.clean.mean()), float(self.none.mean())
        whole = f"{self.metric} is {clean:.4g} clean and {none:.4g} with all heads ablated"
        remarks = [f"{whole}: a share of 1 is {clean - none:+.4g}"]
        remarks += few_prompts(len(self.clean))
        if math.isnan(self._share(self.clean - self.none)[0]):  # it is not told from 0
            remarks.append(
                "this difference is not clearly different from zero over the prompts, so the "
                "shares mean nothing; use another metric or more prompts"
            )
        n = len(self.plan.draws)
        if n < _RANKED:
            remarks.append(
                f"{n} random sets: the rank p-value is at least {1 / (1 + n):.2g}; 0.05 needs "
                f"{_RANKED}"
            )
        return tuple(remarks)
