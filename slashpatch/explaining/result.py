"""The explanation of one head, and the rule of its verdict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..data import display
from ..heads import Head
from ..maths.spectrum import margin
from ..scanning.moments import Cosine, Profile

#: The thresholds of `RULE`; all *ours*: least correlation of the predicted with the measured
#: profile, and least shares of the score that stay at rank one and that go with some band.
PREDICTION_FITS = 0.9
STAYS = 0.5
GOES = 0.5

#: The rule of the verdict, in words.

RULE = (
    "RoPE-made slash: the score is at least κ; with Q and K at rank one at least half of it stays; "
    "the profile predicted from mean q and k correlates above 0.9 with the measured one and peaks "
    "within one token of the offset; and dropping some band takes more than half of the score. "
    "Content-made: the score is at least κ, and with Q and K at rank one less than half of it "
    "stays. Neither: anything else."
)


@dataclass(frozen=True, eq=False)
class Explanation:
    """Why one head is a slash head at one offset. `str` gives the report.

    Attributes:
        head: The head.
        offset: The offset Δ of its slash.
        natural: Slash score on the prompts; `random` on random tokens.
        rank: (value, share of all heads with a smaller value) of r1, R95 and cones of Q and K.
        dropped: Slash score with each band dropped, by band; `frozen` with each band not rotated.
        rank_one: Slash score with "q", "k" or both ("qk") projected to rank one, onto each prompt's
            leading direction.
        profile: Mean logit by offset, measured and predicted; None without RoPE.
        pairs: (pair, wavelength in tokens, its term of the predicted logit at the offset minus the
            term's mean over offsets), largest first: the frequencies that make the peak.
        concentration: |E x_l| / E|x_l| of q and k, mean over the pairs of each band.
        verdict: "RoPE-made slash", "content-made" or "neither", by `RULE`.
        kappa: Least slash score of a slash head.
        provenance: Model, prompts, seed, versions.
        cosines: Each rotary pair's cosine in the predicted profile, in the model's order; none
            without RoPE.
    """

    head: Head
    offset: int
    natural: float
    random: float
    rank: dict[str, tuple[float, float]]
    dropped: dict[str, float]
    frozen: dict[str, float]
    rank_one: dict[str, float]
    profile: Profile | None
    pairs: list[tuple[int, float, float]]
    concentration: dict[str, tuple[float, float]]
    verdict: str
    kappa: float
    provenance: dict[str, Any]
    cosines: list[Cosine] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the explanation as plain JSON values."""
        profile = self.profile
        return {
            "head": str(self.head),
            "offset": self.offset,
            "score": {"natural": self.natural, "random": self.random},
            "rank": {
                name: {"value": value, "share_of_heads_below": below}
                for name, (value, below) in self.rank.items()
            },
            "score_with_band_dropped": self.dropped,
            "score_with_band_frozen": self.frozen,
            "score_at_rank_one": self.rank_one,
            "profile": None
            if profile is None
            else {
                "measured": profile.measured.tolist(),
                "predicted": profile.predicted.tolist(),
                "correlation": profile.correlation,
                "measured_peak": profile.measured_peak,
                "predicted_peak": profile.predicted_peak,
                "margin": self.margin,
            },
            "pairs": [
                {"pair": pair, "wavelength": wavelength, "logit": logit}
                for pair, wavelength, logit in self.pairs
            ],
            "cosines": [cosine._asdict() for cosine in self.cosines],
            "concentration": {
                band: {"q": q, "k": k} for band, (q, k) in self.concentration.items()
            },
            "verdict": self.verdict,
            "rule": RULE,
            "kappa": self.kappa,
            "provenance": self.provenance,
        }

    def to_row(self) -> dict[str, Any]:
        """Return one flat row, for a table of many heads."""
        row: dict[str, Any] = {
            "name": str(self.head),
            "layer": self.head.layer,
            "head": self.head.head,
            "offset": self.offset,
            "score": self.natural,
            "random_tokens": self.random,
        }
        row |= {name: value for name, (value, _) in self.rank.items()}
        row |= {f"drop_{band}": score for band, score in self.dropped.items()}
        row |= {f"freeze_{band}": score for band, score in self.frozen.items()}
        row |= {f"rank_one_{of}": score for of, score in self.rank_one.items()}
        row["correlation"] = float("nan") if self.profile is None else self.profile.correlation
        row["predicted_peak"] = None if self.profile is None else self.profile.predicted_peak
        row["margin"] = self.margin
        row["verdict"] = self.verdict
        return row

    @property
    def margin(self) -> float | None:
        """Predicted logit at the offset minus the largest at any other; None without a profile.

        The frequency condition: if all tokens had the mean query and key, the head would attend
        most to the offset only if this is positive (`slashpatch.maths.spectrum.margin`).
        """
        if self.profile is None:
            return None
        # The profile lacks an offset whose logits an edit has removed.
        at = (self.profile.offsets == self.offset).nonzero()
        return margin(self.profile.predicted, int(at[0])) if len(at) else None

    def plot(self, backend: str = "matplotlib") -> Any:
        """Return scores, profile and cosines, as a matplotlib figure or ("altair") a chart.

        Raises PlotError for another backend, ExtraError if Altair is not installed.
        """
        return display.plot(self, backend)

    def _repr_html_(self) -> str:
        return display.html(self)

    def __str__(self) -> str:
        return display.text(self)


def verdict(
    score: float,
    offset: int,
    at_rank_one: float,
    dropped: dict[str, float],
    profile: Profile | None,
    kappa: float,
) -> str:
    """Return the verdict by `RULE`, from the head's scores and profile."""
    if not score >= kappa:
        return "neither"
    if at_rank_one < STAYS * score:
        return "content-made"
    predicted = (
        profile is not None
        and profile.correlation > PREDICTION_FITS
        and abs(profile.predicted_peak - offset) <= 1
    )
    needs_a_band = bool(dropped) and min(dropped.values()) < GOES * score
    return "RoPE-made slash" if predicted and needs_a_band else "neither"
