"""Colours of all charts and figures, safe for colour-blind readers, in light and dark."""

from __future__ import annotations

from typing import Any

#: Categories, in this order, on white and on dark backgrounds. Source: Okabe and Ito, "Color
#: Universal Design", 2008; without its yellow on white and its black on dark.
CATEGORIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
DARK_CATEGORIES = ("#56B4E9", "#E69F00", "#2DB891", "#CC79A7", "#F0E442", "#E57B3C", "#BFBFBF")
#: Effects, from the most negative to the most positive; the middle is the background's tone.
DIVERGING = ("#00406B", "#2E86C1", "#A9CDE6", "#F5F5F5", "#F3C08A", "#D9741A", "#853500")
DARK_DIVERGING = ("#8FD0F7", "#3E92C8", "#24506E", "#333333", "#74481A", "#D08A1D", "#FFC65C")
#: The colour map of scores from 0 to 1, by its name in Vega and in matplotlib.
SCORES = "viridis"
#: The score from which a dark number is read better on `SCORES` than a white one.
DARK_TEXT_FROM = 0.6
#: Shapes of points and dashes of lines, in the order of the categories: a chart never tells by
#: colour alone. Shapes by their names in Vega, and as matplotlib's markers.
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-left")
MARKERS = ("o", "s", "^", "D", "P", "v", "<")
DASHES = ((1, 0), (6, 3), (2, 2), (8, 3, 2, 3), (4, 2), (1, 3), (10, 4))


def theme(dark: bool = False) -> dict[str, Any]:
    """Return a Vega-Lite configuration: colours of text, axes and marks, without a background."""
    ink, soft, grid = (
        ("#E6E6E6", "#9A9A9A", "#3A3A3A") if dark else ("#222222", "#767676", "#E2E2E2")
    )
    categories = DARK_CATEGORIES if dark else CATEGORIES
    titles = {"titleColor": ink, "titleFontWeight": "normal", "labelColor": ink, "labelLimit": 280}
    return {
        "background": "transparent",
        "font": "sans-serif",
        "view": {"stroke": None},
        "axis": {
            **titles,
            "gridColor": grid,
            "domainColor": soft,
            "tickColor": soft,
            "labelFontSize": 11,
            "titleFontSize": 12,
        },
        "legend": {**titles, "labelFontSize": 11, "titleFontSize": 11, "symbolStrokeWidth": 2},
        "header": {"titleColor": ink, "labelColor": ink},
        "title": {"color": ink, "subtitleColor": ink, "anchor": "start", "fontSize": 13},
        "mark": {"color": categories[0]},
        "rule": {"color": ink},
        "text": {"color": ink},
        "tick": {"color": ink},
        "range": {
            "category": list(categories),
            "diverging": list(DARK_DIVERGING if dark else DIVERGING),
            "heatmap": {"scheme": SCORES},
            "ramp": {"scheme": SCORES},
            "symbol": list(SHAPES),
        },
    }
