"""Lines: heads and offsets, near or far, that stand out of the offsets around them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..data.heads import Head
from ..errors import ScanError
from ..maths.lines import (
    GAP,
    WINDOW,
    contrasts_and_ranks,
    is_peak,
    judged_offsets,
    line_scores,
    n_judged,
    sum_of_ranks_p,
)  # fmt: skip

if TYPE_CHECKING:
    import pandas as pd

#: Fewest prompts from which a line is claimed (*ours*): of fewer, no rank is rare enough.
LEAST_PROMPTS = 4
_SUMS = ("scores", "before", "before_squares", "after", "after_squares", "ranks")


class SlashLine(NamedTuple):
    """A line: an offset at which a head attends more than at the offsets around it.

    `score` is the mean attention i → i−Δ without attention to the first token; `contrast` is the
    score minus the median of the offsets before or after it, whichever is higher; `interval` is
    Student's t over prompts of the contrast; `q` is the adjusted p-value of its ranks among these.
    """

    head: Head
    offset: int
    score: float
    contrast: float
    interval: tuple[float, float]
    q: float


@dataclass(frozen=True, eq=False)
class LineSums:
    """Sums over prompts from which lines are found, for offsets 0, 1, …; they can be added.

    Attributes:
        counts: Number of prompts that are long enough to tell about each offset.
        scores: Sum over these prompts of each prompt's line score, float64.
        before: Sum of the score's contrast to the offsets before it.
        before_squares: Sum of its square.
        after: Sum of the contrast to the offsets after it.
        after_squares: Sum of its square.
        ranks: Sum of the score's rank among the offsets on both sides, in (0, 1].
        window: Number of offsets on each side that are compared with.
        gap: Number of nearest offsets on each side that are left out.
    """

    counts: Int[Tensor, "offset"]
    scores: Float[Tensor, "layer head offset"]
    before: Float[Tensor, "layer head offset"]
    before_squares: Float[Tensor, "layer head offset"]
    after: Float[Tensor, "layer head offset"]
    after_squares: Float[Tensor, "layer head offset"]
    ranks: Float[Tensor, "layer head offset"]
    window: int = WINDOW
    gap: int = GAP

    @classmethod
    def of_prompts(
        cls,
        sums: Float[Tensor, "prompt layer head key"],
        first: Float[Tensor, "prompt layer head key"],
        lengths: list[int],
    ) -> LineSums:
        """Return the sums over prompts of these lengths, from their `all_slash_sums`."""
        n = n_judged(max(lengths))
        total = torch.zeros(len(_SUMS), *sums.shape[1:-1], n, dtype=torch.float64)
        counts = torch.zeros(n, dtype=torch.int64)
        for of, part, length in zip(sums, first, lengths, strict=True):
            counts[: n_judged(length)] += 1
            for layer in range(len(of)):  # bounds the memory of windows
                scores = line_scores(of[layer], part[layer], length)
                before, after, ranks = contrasts_and_ranks(scores)
                at = ranks.shape[-1]
                terms = scores[..., :at], before, before.square(), after, after.square(), ranks
                total[:, layer, :, :at] += torch.stack(terms)
        return cls(counts, *total)

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums by name, as a file holds them."""
        return {name: getattr(self, name) for name in ("counts", *_SUMS)}

    def __add__(self, other: LineSums) -> LineSums:
        """Return the sums over the prompts of both. Raises ScanError for another window."""
        if (self.window, self.gap) != (other.window, other.gap):
            raise ScanError(
                f"lines of different windows: {self.window} without {self.gap}, and "
                f"{other.window} without {other.gap}"
            )
        mine, theirs = self.tensors(), other.tensors()
        n = max(len(self.counts), len(other.counts))
        added = {name: _to_length(mine[name], n) + _to_length(theirs[name], n) for name in mine}
        return LineSums(**added, window=self.window, gap=self.gap)

    def fits(self, n_layers: int, n_heads: int) -> bool:
        """Return whether shapes, dtypes and values agree with each other and with a model."""
        shape = (n_layers, n_heads, len(self.counts))
        parts = [getattr(self, name) for name in _SUMS]
        return (
            self.counts.dtype == torch.int64
            and self.counts.ndim == 1
            and bool((self.counts >= 1).all() & (self.counts.diff() <= 0).all())
            and all(part.shape == shape and part.dtype == torch.float64 for part in parts)
            and all(bool(part.isfinite().all()) for part in parts)
            and isinstance(self.window, int)
            and isinstance(self.gap, int)
            and self.window >= 1
            and self.gap >= 0
        )

    def statistics(self, confidence: float = 0.95) -> dict[str, Float[Tensor, "layer head offset"]]:
        """Return score, contrast, its interval and q of all heads and offsets.

        The contrast is to the side with the higher mean of medians. p is of the sum of ranks over
        prompts: how likely is it, if in each prompt the score is as likely as its neighbours to be
        the largest? q is p adjusted over all heads and offsets (Benjamini and Hochberg 1995).
        Offsets that fewer than four prompts tell about, and Δ = 0, have NaN. *Ours*.
        """
        from scipy.special import stdtrit
        from scipy.stats import false_discovery_control

        n = self.counts.double()
        sides = []
        for total, squares in (
            (self.before, self.before_squares),
            (self.after, self.after_squares),
        ):
            variance = (squares - total.square() / n).clamp(min=0) / (n - 1)
            sides.append((total / n, (variance / n).sqrt()))
        (before, error_before), (after, error_after) = sides
        lower = before <= after
        contrast = torch.where(lower, before, after)
        error = torch.where(lower, error_before, error_after)
        judged = judged_offsets(self.counts, LEAST_PROMPTS)
        q = torch.full_like(contrast, torch.nan)
        p = sum_of_ranks_p(self.ranks[..., judged], n[judged])
        if p.numel():
            q[..., judged] = torch.as_tensor(false_discovery_control(p.flatten())).view_as(p)
        half = torch.as_tensor(stdtrit((n - 1).numpy(), (1 + confidence) / 2)) * error
        unknown = ~judged
        return {
            "score": self.scores / n,
            "contrast": contrast,
            "low": (contrast - half).masked_fill(unknown, torch.nan),
            "high": (contrast + half).masked_fill(unknown, torch.nan),
            "q": q,
        }

    def find(
        self, level: float, least: float, ratio: float, min_offset: int, confidence: float
    ) -> list[SlashLine]:
        """Return the lines, as `Scan.lines` does. Raises ScanError for too few prompts."""
        for name, value in (("level", level), ("confidence", confidence), ("least", least)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ScanError(f"{name} must be a number from 0 to below 1; got {value!r}")
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not ratio >= 0:
            raise ScanError(f"ratio must be a number from 0; got {ratio!r}")
        if not len(self.counts):
            raise ScanError(
                f"the prompts are too short for lines: they need more than "
                f"{self.window + self.gap + 1} tokens"
            )
        most = int(self.counts.max())
        if most < LEAST_PROMPTS:
            raise ScanError(
                f"lines need at least {LEAST_PROMPTS} prompts, so that chance can be told from "
                f"what is in all of them; this scan has {most}. Scan more prompts, or add scans"
            )
        found = self.statistics(confidence)
        scores, contrasts = found["score"], found["contrast"]
        chosen = (
            (found["q"] <= level)
            & (found["low"] > 0)
            & (contrasts >= least)
            & (scores >= ratio * (scores - contrasts))
            & is_peak(scores, self.gap)
            & (torch.arange(scores.shape[-1]) >= min_offset)
        )
        lines = []
        for at in chosen.nonzero().tolist():
            numbers = {name: float(values[tuple(at)]) for name, values in found.items()}
            score, contrast, low, high, q = numbers.values()
            lines.append(SlashLine(Head(at[0], at[1]), at[2], score, contrast, (low, high), q))
        return sorted(lines, key=lambda line: (-line.contrast, line.head, line.offset))


def lines_frame(lines: list[SlashLine]) -> pd.DataFrame:
    """Return a row per line: name, layer, head, offset, score, contrast, low, high, q."""
    import pandas as pd

    columns = ["name", "layer", "head", "offset", "score", "contrast", "low", "high", "q"]
    rows = [
        (str(e.head), e.head.layer, e.head.head, e.offset, e.score, e.contrast, *e.interval, e.q)
        for e in lines
    ]
    return pd.DataFrame(rows, columns=columns)


def _to_length(sums: Tensor, n: int) -> Tensor:
    """Return sums with zeros for offsets that no prompt tells about."""
    return torch.nn.functional.pad(sums, (0, n - sums.shape[-1]))


def line_sums_from(header: dict[str, Any], tensors: dict[str, Tensor]) -> LineSums | None:
    """Return the sums that a file holds; None if it holds none."""
    names = [field.name for field in fields(LineSums) if field.name not in ("window", "gap")]
    found = {name: tensors[f"lines.{name}"] for name in names if f"lines.{name}" in tensors}
    if not found and "lines" not in header:
        return None
    return LineSums(**found, window=header["lines"]["window"], gap=header["lines"]["gap"])
