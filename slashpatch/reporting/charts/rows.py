"""Rows of the charts of heads, from scans, monitors and explanations; figures use them too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...data.heads import Head

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from ...explaining.result import Explanation
    from ...scanning.moments import Cosine, Profile
    from ...scanning.result import Scan


def tokens_of(scan: Scan) -> str:
    """Return what a scan's prompts are, in a word or two, such as "natural text"."""
    return str(scan.provenance["prompts"][0]["source"]).partition(",")[0]


def grid_rows(scores: Tensor, offsets: Sequence[int]) -> pd.DataFrame:
    """Return each head's highest score and its offset, from scores [layer, head, offset].

    Columns layer, head, name, score, offset; the rows of `head_grid`. A head without any score has
    NaN. Scans and monitors have such scores.
    """
    import pandas as pd

    best = scores.double().nan_to_num(-1).max(-1)
    unknown = scores.isnan().all(-1)
    rows: list[dict[str, Any]] = []
    for layer, of_layer in enumerate(best.values.masked_fill(unknown, float("nan")).tolist()):
        for head, score in enumerate(of_layer):
            offset = offsets[int(best.indices[layer, head])]
            name = str(Head(layer, head))
            rows.append(
                {"layer": layer, "head": head, "name": name, "score": score, "offset": offset}
            )
    return pd.DataFrame(rows)


def offset_rows(scan: Scan, head: Head, control: Scan | None = None) -> pd.DataFrame:
    """Return one head's scores with their intervals: columns tokens, offset, score, low, high.

    `tokens` tells the scan from its control, a scan of other tokens.
    """
    import pandas as pd

    names = [tokens_of(each) for each in (scan, control) if each is not None]
    if len(set(names)) < len(names):
        names[1] += " (control)"
    rows = []
    for name, each in zip(names, (scan, control), strict=False):
        assert each is not None
        low, high = each.intervals()
        parts = [values[head.layer, head.head].tolist() for values in (each.scores, low, high)]
        rows += [(name, *cells) for cells in zip(each.offsets, *parts, strict=True)]
    return pd.DataFrame(rows, columns=["tokens", "offset", "score", "low", "high"])


def profile_rows(profile: Profile) -> pd.DataFrame:
    """Return a head's mean logits by offset: columns offset, logit, which."""
    import pandas as pd

    offsets = profile.offsets.tolist()
    parts = {"measured": profile.measured.tolist(), "predicted": profile.predicted.tolist()}
    rows = [
        (offset, logit, which)
        for which, logits in parts.items()
        for offset, logit in zip(offsets, logits, strict=True)
    ]
    return pd.DataFrame(rows, columns=["offset", "logit", "which"])


def pair_rows(cosines: Sequence[Cosine]) -> pd.DataFrame:
    """Return rotary pairs as rows: columns pair, wavelength, band, amplitude, phase.

    `Moments.cosines` and `Explanation.cosines` have them.
    """
    import pandas as pd

    return pd.DataFrame(cosines, columns=["pair", "wavelength", "band", "amplitude", "phase"])


def edit_rows(explanation: Explanation) -> pd.DataFrame:
    """Return the score under each edit that `explain` tried: columns label, group, score, clean."""
    import pandas as pd

    names = {"q": "Q at rank one", "k": "K at rank one", "qk": "Q and K at rank one"}
    groups: tuple[tuple[str, dict[str, float]], ...] = (
        ("rank one", {names[of]: score for of, score in explanation.rank_one.items()}),
        ("band dropped", {f"drop {band}": score for band, score in explanation.dropped.items()}),
        (
            "band not rotated",
            {f"freeze {band}": score for band, score in explanation.frozen.items()},
        ),
    )
    origin = explanation.origin
    if origin is not None:
        groups += (
            (
                "axis dropped",
                {f"drop axis of {of.upper()}": origin.dropped[of] for of in ("q", "k", "qk")},
            ),
            (
                "its controls",
                {
                    f"{name.replace('_', ' ')} (mean of {len(draws)})": sum(draws) / len(draws)
                    for name, draws in origin.controls.items()
                },
            ),
        )
    rows = [
        (label, group, score, explanation.natural)
        for group, scores in groups
        for label, score in scores.items()
    ]
    return pd.DataFrame(rows, columns=["label", "group", "score", "clean"])
