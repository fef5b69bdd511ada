"""The result of a scan: sums that can be saved, loaded and added, and scores from them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..data import display
from ..data.heads import Head, HeadsLike, heads, require_heads
from ..errors import HeadError, ScanError
from .lines import LineSums, SlashLine, lines_frame
from .moments import Moments, Profile
from .scan_file import read_scan, write_scan

if TYPE_CHECKING:
    import pandas as pd


class SlashHead(NamedTuple):
    """A (κ, Δ)-slash-dominant head: its score at offset Δ, with an interval over prompts."""

    head: Head
    offset: int
    score: float
    interval: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Scan:
    """Slash scores of all heads. Scans of one model at the same offsets can be added, exactly.

    Attributes:
        offsets: Offsets Δ, ascending.
        sums: Sum over prompts of each prompt's score, float64.
        squares: Sum over prompts of the squared score, float64.
        counts: Number of prompts that are longer than each offset.
        n_tokens: Number of tokens of all prompts.
        provenance: Model, dtype, edits, prompts, versions.
        moments: Sums for rank, cones and mean logits; None if they were not gathered.
        line_sums: Sums behind `lines`; None if they were not gathered.
    """

    offsets: tuple[int, ...]
    sums: Float[Tensor, "layer head offset"]
    squares: Float[Tensor, "layer head offset"]
    counts: Int[Tensor, "offset"]
    n_tokens: int
    provenance: dict[str, Any]
    moments: Moments | None = None
    line_sums: LineSums | None = None

    def require_moments(self) -> Moments:
        """Return the sums behind `rank_one` and `profile`. Raises ScanError if there are none."""
        if self.moments is None:
            raise ScanError(
                "this scan did not gather queries and keys: "
                f"{self.provenance.get('moments', 'none were gathered')}"
            )
        return self.moments

    @property
    def rank_one(self) -> pd.DataFrame:
        """Rank measures r1, R95 and cone of pre-RoPE queries and keys, a row per query head.

        Of the uncentred tokens × d_head matrix with singular values σ: r1 = σ1²/Σσ², and R95 is the
        smallest number of σ² that sum to 95 % of Σσ². A cone is the mean cosine of the tokens
        to their mean vector, also given for the attention's input x. Query heads of one KV group
        have the same keys. *Ours*, by the usual conventions. Raises ScanError without `moments`.
        """
        return self.require_moments().rank_table()

    def profile(self, head: HeadsLike) -> Profile:
        """Return a head's mean logit by offset, measured and predicted from its mean q and k.

        Raises HeadError, ScanError without `moments`, or ModelError for a layer without RoPE.
        """
        chosen = heads(head)
        if len(chosen) != 1:
            raise HeadError(f"a profile is of one head, got {head!r}")
        require_heads(chosen, *self.sums.shape[:2])
        return self.require_moments().profile(chosen[0])

    @property
    def scores(self) -> Float[Tensor, "layer head offset"]:
        """Slash scores: mean attention i → i−Δ of each prompt, averaged over prompts; in [0, 1].

        The definition of arXiv 2601.08297. NaN at offsets that no prompt is long enough for.
        """
        return self.sums / self.counts

    def intervals(
        self, confidence: float = 0.95
    ) -> tuple[Float[Tensor, "layer head offset"], Float[Tensor, "layer head offset"]]:
        """Return Student's t interval over prompts for each score; NaN for a single prompt.

        The unit is the prompt, because the tokens of one prompt are not independent. Not cut to
        [0, 1]. *Ours*.
        """
        from scipy.stats import t

        n = self.counts.double()
        variance = (self.squares - self.sums**2 / n).clamp(min=0) / (n - 1)
        width = torch.as_tensor(t.ppf((1 + confidence) / 2, (n - 1).numpy()))
        half = torch.where(n > 1, width * (variance / n).sqrt(), torch.nan)
        return self.scores - half, self.scores + half

    def slash_heads(self, kappa: float = 0.1, min_offset: int = 0) -> list[SlashHead]:
        """Return the heads and offsets with a score of at least `kappa`, the highest first.

        A head that reaches κ at two offsets is listed twice. κ = 0.1 is *ours*. Raises ScanError
        for κ outside [0, 1].
        """
        require_kappa(kappa)
        scores = self.scores
        low, high = self.intervals()
        reached = [
            SlashHead(
                Head(layer, head),
                self.offsets[column],
                float(scores[layer, head, column]),
                (float(low[layer, head, column]), float(high[layer, head, column])),
            )
            for layer, head, column in (scores >= kappa).nonzero().tolist()
            if self.offsets[column] >= min_offset
        ]
        return sorted(reached, key=lambda entry: (-entry.score, entry.head, entry.offset))

    def require_lines(self) -> LineSums:
        """Return the sums behind `lines`. Raises ScanError if there are none."""
        if self.line_sums is None:
            raise ScanError(
                "this scan, or one that was added to it, did not gather lines; scan with lines=True"
            )
        return self.line_sums

    def lines(
        self,
        level: float = 0.05,
        *,
        least: float = 0.001,
        ratio: float = 1.5,
        min_offset: int = 1,
        confidence: float = 0.95,
    ) -> list[SlashLine]:
        """Return the heads and offsets that stand out of the offsets around them, best first.

        Needs `scan(..., lines=True)`, and finds lines at all offsets, near and far, that are too
        weak for κ. Attention to the first token is left out. A line's score ranks high, in prompt
        after prompt, among the 16 offsets before and the 16 after it, without the 2 nearest on each
        side; it exceeds the median of both sides, and is no smaller than these 2. Δ = 0 has none
        before it and is never a line. A line of few prompts cannot be told from chance; 8 are a
        good number. *Ours*.

        Args:
            level: Largest q: p of the ranks over prompts (Edgington's sum), adjusted over all
                heads and offsets (Benjamini-Hochberg).
            least: Smallest contrast, in attention; its interval must exclude 0 as well.
            ratio: Smallest score, relative to the median of the offsets before or after it.
            min_offset: Smallest offset.
            confidence: Level of the intervals, Student's t over prompts.

        Raises:
            ScanError: A scan without lines, of fewer than 4 prompts, or of short ones.
        """
        return self.require_lines().find(level, least, ratio, min_offset, confidence)

    def lines_to_dataframe(self, level: float = 0.05, **options: Any) -> pd.DataFrame:
        """Return a row per line, with score, contrast, interval and q; arguments as for `lines`."""
        return lines_frame(self.lines(level, **options))

    def to_dataframe(self) -> pd.DataFrame:
        """Return a row per head and offset, with score, interval and number of prompts."""
        import pandas as pd

        n_layers, n_heads, n_offsets = self.sums.shape
        layer, head, column = torch.meshgrid(
            *(torch.arange(n) for n in (n_layers, n_heads, n_offsets)), indexing="ij"
        )
        low, high = self.intervals()
        flat = {
            "layer": layer,
            "head": head,
            "offset": torch.tensor(self.offsets)[column],
            "score": self.scores,
            "low": low,
            "high": high,
            "n_prompts": self.counts.expand_as(self.sums),
        }
        frame = pd.DataFrame({name: values.flatten().numpy() for name, values in flat.items()})
        names = [f"L{row.layer}H{row.head}" for row in frame.itertuples()]
        frame.insert(2, "name", names)
        return frame

    def table(self, kappa: float = 0.1, top: int | None = 20) -> str:
        """Return the slash heads as plain text, the highest score first."""
        return display.text(self, kappa=kappa, top=top)

    def plot(
        self, backend: str = "matplotlib", *, control: Scan | None = None, kappa: float = 0.1
    ) -> Any:
        """Return the grid of heads, as a matplotlib figure or ("altair") a chart.

        `control`, such as a scan of random tokens, is drawn below. Cells of heads whose score
        reaches κ show the offset. Raises PlotError for another backend, ExtraError if Altair is not
        installed.
        """
        return display.plot(self, backend, control=control, kappa=kappa)

    def _repr_html_(self) -> str:
        return display.html(self)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        n_layers, n_heads, _ = self.sums.shape
        return (
            f"<Scan of {self.provenance['model']}: {n_layers} × {n_heads} heads, "
            f"{len(self.offsets)} offsets, {int(self.counts.max())} prompts>"
        )

    def __add__(self, other: Scan) -> Scan:
        """Return the scan over the prompts of both. Raises ScanError if anything else differs."""
        if not isinstance(other, Scan):
            return NotImplemented
        if self.offsets != other.offsets:
            raise ScanError(f"scans of different offsets: {self.offsets} and {other.offsets}")
        for key in ("fingerprint", "dtype", "edits", "other_hooks"):
            mine, theirs = self.provenance.get(key), other.provenance.get(key)
            if mine != theirs:
                raise ScanError(f"scans of different {key}: {mine!r} and {theirs!r}")
        return Scan(
            self.offsets,
            self.sums + other.sums,
            self.squares + other.squares,
            self.counts + other.counts,
            self.n_tokens + other.n_tokens,
            {
                **self.provenance,
                "prompts": self.provenance["prompts"] + other.provenance["prompts"],
            },
            self.moments + other.moments if self.moments and other.moments else None,
            self.line_sums + other.line_sums if self.line_sums and other.line_sums else None,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a .safetensors file, atomically: a failed write leaves no partial file.

        Raises ScanError for another suffix, OutputError if the file cannot be written.
        """
        write_scan(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scan:
        """Load a scan from a file that `save` wrote. Raises ScanError for any other file."""
        scan: Scan = read_scan(path, cls)
        return scan


def require_kappa(kappa: float) -> None:
    """Raise ScanError unless κ lies in [0, 1]."""
    if not isinstance(kappa, (int, float)) or not 0 <= kappa <= 1:
        raise ScanError(f"kappa must be a score from 0 to 1; got {kappa!r}")
