"""The report of `explain`: scores, condition 1, condition 2, and the rule of the verdict."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..explaining.result import RULE

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from ..explaining.result import Explanation

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float | int]) -> str:
    """Return values as a line of bars from the lowest to the highest value."""
    low, high = min(values), max(values)
    if high <= low:
        return _BARS[0] * len(values)
    return "".join(
        _BARS[round((value - low) / (high - low) * (len(_BARS) - 1))] for value in values
    )


def explanation_report(result: Explanation) -> Group:
    """Return an explanation as a rich renderable."""
    parts: list[Text | Table] = [
        Text(f"{result.head} at Δ={result.offset}: {result.verdict}", style="bold"),
        Text(
            f"slash score {result.natural:.3f} on the prompts, {result.random:.3f} on random "
            f"tokens (κ = {result.kappa:g})"
        ),
        Text(),
        Text("Condition 1: queries and keys close to rank one", style="bold"),
        _rank_table(result),
        Text(
            f"score with Q at rank one {result.rank_one['q']:.3f}, K {result.rank_one['k']:.3f}, "
            f"both {result.rank_one['qk']:.3f}"
        ),
        *_variation(result),
        Text(),
        *_origin(result),
        Text("Condition 2: rotary frequencies that add up at the offset", style="bold"),
    ]
    if result.profile is None:
        parts.append(Text("the layer has no RoPE"))
    else:
        profile = result.profile
        shown = profile.offsets.tolist()
        pairs = ", ".join(
            f"{pair} (λ {wave:.3g}): {logit:+.2f}" for pair, wave, logit in result.pairs
        )
        parts += [
            _band_table(result),
            Text(
                f"mean logit by offset, Δ {shown[0]} to {shown[-1]}; predicted from mean q and k: "
                f"correlation {profile.correlation:.3f}"
            ),
            Text(
                "predicted logit of the offset over all others: "
                + ("not in the profile" if result.margin is None else f"{result.margin:+.2f}")
                + " (with all tokens alike, a slash head needs a positive one)"
            ),
            _spark("measured ", profile.measured, profile.measured_peak),
            _spark("predicted", profile.predicted, profile.predicted_peak),
            Text(
                f"pairs that carry the predicted peak at Δ={result.offset} (λ: wavelength in "
                f"tokens; logit beyond the pair's mean over offsets): {pairs}"
            ),
        ]
    parts += _shares(result)
    parts += [Text(), Text(textwrap.fill(f"Rule (ours): {RULE}", 98), style="dim")]
    return Group(*parts)


def _variation(result: Explanation) -> list[Text]:
    """Return how queries and keys vary in norm and in sign."""
    one = result.variation
    if one is None:
        return []
    return [
        Text(
            f"norms vary by {one.norm_q:.0%} of their mean for Q, {one.norm_k:.0%} for K; along "
            f"the leading direction {one.sign_q:.1%} of Q and {one.sign_k:.1%} of K have the rarer "
            "sign"
        )
    ]


def _origin(result: Explanation) -> list[Text | Table]:
    """Return what comes from the axis of the attention inputs, and the score without it."""
    one = result.origin
    if one is None:
        return []
    table = Table("mean", "of the axis", "of the bias", "rest", "cosine to the axis'", "leading")
    for label, part in (("Q", one.q), ("K", one.k)):
        cells = (f"{share:.0%}" for share in (part.axis, part.bias, part.rest))
        table.add_row(label, *cells, f"{part.cosine:.3f}", f"{part.leading:.3f}")
    controls = "; ".join(
        f"{name.replace('_', ' ')} {sum(draws) / len(draws):.3f} ({min(draws):.3f} to "
        f"{max(draws):.3f}, {len(draws)} draws)"
        for name, draws in one.controls.items()
    )
    return [
        Text("Origin of condition 1: the axis of the cone of attention inputs", style="bold"),
        Text(
            f"along the axis, fitted on other text: {one.share:.0%} of the inputs' second moment, "
            f"mean cosine {one.cosine:.3f}"
        ),
        table,
        Text(
            f"score with the axis dropped from the input of Q {one.dropped['q']:.3f}, K "
            f"{one.dropped['k']:.3f}, both {one.dropped['qk']:.3f}"
        ),
        Text(f"controls, mean and range: {controls}"),
        Text(),
    ]


def _shares(result: Explanation) -> list[Text]:
    """Return what the logits depend on."""
    one = result.shares
    if one is None:
        return []
    curve = "" if math.isnan(one.curve) else f" (the predicted curve alone {one.curve:.0%})"
    return [
        Text(
            f"variance of the logits over the last {one.n_offsets} offsets, rows less their mean: "
            f"position {one.position:.0%}{curve}, the key token beyond it "
            f"{one.both - one.position:.0%}, query and key together {1 - one.both:.0%}; standard "
            f"deviation {one.sd:.2f}"
        )
    ]


def _spark(label: str, values: Tensor, peak: int) -> Text:
    return Text(f"  {label} {sparkline(values.tolist())}  peak {peak}")


def _rank_table(result: Explanation) -> Table:
    table = Table("", "r1", "R95", "mean cosine to the mean")
    for part, label in (("q", "Q"), ("k", "K")):
        cells = []
        for name, form in ((f"r1_{part}", ".3f"), (f"r95_{part}", ".0f"), (f"cone_{part}", ".3f")):
            value, below = result.rank[name]
            cells.append(f"{value:{form}} (> {below:.0%} of heads)")
        table.add_row(label, *cells)
    table.add_row("attention input", "", "", f"{result.rank['cone_x'][0]:.3f}")
    return table


def _band_table(result: Explanation) -> Table:
    table = Table("band", "score if dropped", "score if not rotated", "concentration q", "k")
    for band, score in result.dropped.items():
        q, k = result.concentration[band]
        table.add_row(band, f"{score:.3f}", f"{result.frozen[band]:.3f}", f"{q:.2f}", f"{k:.2f}")
    return table


def explanations_table(frame: pd.DataFrame) -> Table:
    """Return the table of `explain --all`: one row per head."""
    columns = {
        "name": "head",
        "offset": "Δ",
        "score": "score",
        "random_tokens": "random",
        "r1_q": "r1 Q",
        "r1_k": "r1 K",
        "drop_high": "-high",
        "drop_medium": "-medium",
        "drop_low": "-low",
        "rank_one_qk": "rank one",
        "correlation": "corr.",
        "margin": "margin",
        "logit_position": "position",
        "drop_axis": "-axis",
        "drop_axis_lowest_control": "control",
        "predicted_peak": "pred. Δ",
        "verdict": "verdict",
    }
    shown = {name: label for name, label in columns.items() if name in frame.columns}
    table = Table(*shown.values())
    for row in frame.to_dict(orient="records"):
        table.add_row(*(_cell(row[name]) for name in shown))
    return table


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.2f}"
    return "–" if value is None else str(value)
