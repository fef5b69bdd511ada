"""Slash scores on natural text against those on random tokens: rows and chart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .parts import finished, kinds, of, require_altair, source, tooltip

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

    from ...effects.result import Result
    from .parts import Rows, Width

#: Where a head reaches the thresholds, in the order of the legend.
REACHED = ("both", "natural only", "random only", "neither")
#: Most points; those of the highest scores come first in a result.
_MOST = 400


def thresholds(result: Result) -> tuple[float, float]:
    """Return κ on natural text and on random tokens."""
    kappa = float(result.provenance.get("kappa", 0.1))
    return kappa, float(result.provenance.get("kappa_random", kappa))


def persistence_rows(result: Result) -> pd.DataFrame:
    """Return the highest rows: name, offset, natural, random, their intervals, and reached."""
    kappa, kappa_random = thresholds(result)
    names = ["name", "offset", "natural", "natural_low", "natural_high"]
    names += ["random", "random_low", "random_high", "difference", "q"]
    frame = result.frame[names].head(_MOST)
    places = {(True, True): 0, (True, False): 1, (False, True): 2, (False, False): 3}
    pairs = zip(frame["natural"] >= kappa, frame["random"] >= kappa_random, strict=True)
    return frame.assign(
        reached=[REACHED[places[bool(a), bool(b)]] for a, b in pairs],
        kappa=kappa,
        kappa_random=kappa_random,
    )


def persistence(
    data: Rows,
    *,
    width: Width = 420,
    height: int = 320,
    title: str | None = None,
    description: str = "Slash score of each head and offset on natural text and on random tokens.",
) -> alt.LayerChart:
    """Return natural against random scores; lines are the thresholds, and where both are equal.

    Args:
        data: Columns name, offset, natural, random, difference, q, reached, kappa, kappa_random.
        width: In pixels, or "container".
        height: In pixels.
        title: The title, if any.
        description: What is seen, for screen readers.
    """
    alt = require_altair()
    scale = alt.Scale(domain=[0, 1])
    x = alt.X("natural:Q", title="score on natural text", scale=scale)
    y_title = "score on random tokens"
    tips = tooltip(
        head="name:N",
        offset_Δ="offset:Q",
        natural="natural:Q:.3f",
        random="random:Q:.3f",
        difference="difference:Q:+.3f",
        q="q:Q:.3~g",
    )
    line = {"strokeDash": [4, 3], "opacity": 0.6}
    at = tooltip(κ_on_natural_text="kappa:Q", κ_on_random_tokens="kappa_random:Q")
    first = "datum.natural == datum.natural"
    vertical = alt.Chart().mark_rule(**line).transform_filter(first)
    vertical = vertical.transform_aggregate(
        kappa="max(kappa)", kappa_random="max(kappa_random)"
    ).encode(x=alt.X("kappa:Q", title="score on natural text", scale=scale), tooltip=at)
    horizontal = alt.Chart().mark_rule(**line).transform_filter(first)
    horizontal = horizontal.transform_aggregate(
        kappa="max(kappa)", kappa_random="max(kappa_random)"
    ).encode(y=alt.Y("kappa_random:Q", title=y_title, scale=scale), tooltip=at)
    equal = alt.Chart().mark_line(strokeWidth=1, opacity=0.5, color="gray")
    equal = equal.encode(x=x, y=alt.Y("natural:Q", title=y_title, scale=scale), tooltip=tips)
    points = alt.Chart().mark_point(filled=True, size=50, opacity=0.8)
    points = points.encode(
        x=x,
        y=alt.Y("random:Q", title=y_title, scale=scale),
        tooltip=tips,
        **of(kinds("reached", REACHED), "color", "shape"),
    )
    chart = alt.layer(equal, vertical, horizontal, points, data=source(data))
    return finished(chart, description, title, width, height)
