"""The explanation of one head, and the rule of its verdict."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..data import display
from ..data.files import load_json, write_json
from ..data.heads import Head
from ..errors import OutputError
from ..maths.bands import NAMED_BANDS
from ..maths.logit_shares import LogitShares
from ..maths.offsets import as_offsets
from ..maths.spectrum import margin
from ..scanning.moments import Cosine, Profile
from .parts import (
    Origin,
    Variation,
    index,
    number,
    origin_from,
    shares_from,
    to_record,
    variation_from,
)

#: The thresholds of `RULE`; all *ours*: least correlation of the predicted with the measured
#: profile, and least shares of the score that stay at rank one and that go with some band.
PREDICTION_FITS = 0.9
STAYS = 0.5
GOES = 0.5

VERDICTS = ("RoPE-made slash", "content-made", "neither")
#: Names in `Explanation.rank`: columns of `Scan.rank_one`.
RANK_MEASURES = ("r1_q", "r95_q", "cone_q", "r1_k", "r95_k", "cone_k", "cone_x")

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
        shares: What the logits depend on: shares of their variance. None for prompts that are too
            short, and in files of earlier versions.
        variation: How much queries and keys vary in norm and sign; None as before.
        origin: How much of them comes from the axis of the attention inputs, and the slash score
            without it. None where the model's queries and keys cannot be computed from another
            input, and in files of earlier versions.
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
    shares: LogitShares | None = None
    variation: Variation | None = None
    origin: Origin | None = None

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
                "offsets": profile.offsets.tolist(),
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
            "logit_shares": to_record(self.shares),
            "variation": to_record(self.variation),
            "origin": to_record(self.origin),
            "verdict": self.verdict,
            "rule": RULE,
            "kappa": self.kappa,
            "provenance": self.provenance,
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as a .json file, as `slashpatch explain HEAD --json` prints it.

        Raises OutputError for another suffix, or if the file cannot be written.
        """
        if Path(path).suffix != ".json":
            raise OutputError(f"an explanation is saved as a .json file; got {str(path)!r}")
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Explanation:
        """Load what `save` or `slashpatch explain HEAD --json` wrote. Raises OutputError."""
        what = "an explanation of one head, from Explanation.save or `slashpatch explain --json`"
        explanation: Explanation = load_json(path, _from_record, what)
        return explanation

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
        for prefix, part, names in (
            ("logit_", self.shares, ("position", "token", "both", "curve")),
            ("", self.variation, Variation._fields),
        ):
            row |= {f"{prefix}{name}": getattr(part, name, math.nan) for name in names}
        origin = self.origin
        row["axis_x"] = math.nan if origin is None else origin.share
        row["axis_q"] = math.nan if origin is None else origin.q.axis
        row["axis_k"] = math.nan if origin is None else origin.k.axis
        row["drop_axis"] = math.nan if origin is None else origin.dropped["qk"]
        row["drop_axis_lowest_control"] = math.nan if origin is None else origin.lowest_control
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


def _from_record(record: dict[str, Any]) -> Explanation:
    """Return the explanation whose `to_dict` a file holds. Raises as bad JSON values do."""
    if record["rule"] != RULE:
        raise ValueError("its verdict follows another rule than this version's; explain it again")
    dropped, frozen, rank_one = (
        {name: number(value) for name, value in record[key].items()}
        for key in ("score_with_band_dropped", "score_with_band_frozen", "score_at_rank_one")
    )
    score = record["score"]
    explanation = Explanation(
        head=Head.parse(record["head"]),
        offset=index(record["offset"]),
        natural=number(score["natural"]),
        random=number(score["random"]),
        rank={
            name: (number(entry["value"]), number(entry["share_of_heads_below"]))
            for name, entry in record["rank"].items()
        },
        dropped=dropped,
        frozen=frozen,
        rank_one=rank_one,
        profile=None if record["profile"] is None else _profile(record["profile"]),
        pairs=[
            (index(term["pair"]), _wavelength(term), number(term["logit"]))
            for term in record["pairs"]
        ],
        concentration={
            band: (number(entry["q"]), number(entry["k"]))
            for band, entry in record["concentration"].items()
        },
        verdict=record["verdict"],
        kappa=number(record["kappa"]),
        provenance=dict(record["provenance"]),
        cosines=[_cosine(term) for term in record["cosines"]],
        shares=shares_from(record.get("logit_shares")),
        variation=variation_from(record.get("variation")),
        origin=origin_from(record.get("origin")),
    )
    bands: tuple[set[str], ...] = (set(), set(NAMED_BANDS))
    if not (
        set(explanation.rank) == set(RANK_MEASURES)
        and set(rank_one) == {"q", "k", "qk"}
        and all(set(part) in bands for part in (dropped, frozen, explanation.concentration))
        and explanation.verdict in VERDICTS
        and {"model", "fingerprint", "dtype", "edits", "prompts"} <= set(explanation.provenance)
    ):
        raise ValueError(
            "its measures, bands, verdict or provenance are not those of an explanation"
        )
    return explanation


def _profile(record: dict[str, Any]) -> Profile:
    offsets = as_offsets(record["offsets"])
    measured, predicted = (
        torch.tensor([number(value) for value in record[name]], dtype=torch.float64)
        for name in ("measured", "predicted")
    )
    if list(offsets) != record["offsets"] or not len(offsets) == len(measured) == len(predicted):
        raise ValueError("its profile's offsets and logits do not agree")
    return Profile(torch.tensor(offsets), measured, predicted, number(record["correlation"]))


def _cosine(record: dict[str, Any]) -> Cosine:
    if record["band"] not in NAMED_BANDS:
        raise ValueError(f"expected one of {', '.join(NAMED_BANDS)}, got {record['band']!r}")
    amplitude, phase = number(record["amplitude"]), number(record["phase"])
    return Cosine(index(record["pair"]), _wavelength(record), record["band"], amplitude, phase)


def _wavelength(record: dict[str, Any]) -> float:
    """Return a pair's wavelength, which is infinite (null) if the pair does not rotate."""
    return number(record["wavelength"], math.inf)
