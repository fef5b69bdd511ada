"""The charts of the page as Vega-Lite specifications, without data."""

from __future__ import annotations

from typing import Any

from ..charts import doses, effects, heads, persistence
from ..charts import pairs as of_pairs
from ..charts.palette import (
    DARK_DIVERGING,
    DIVERGING,
    SCORES,
    theme,
)

#: Width of every chart, in pixels; the page makes charts narrower where there is less room.
_WIDTH = 480
#: Width of charts whose rows have long labels beside them.
_LABELLED = 320
#: Steps of the colour scales of the grid; odd, so that there is a middle.
_STEPS = 65


def specs() -> dict[str, dict[str, Any]]:
    """Return each chart's specification by name; the page fills in `rows` (and `draws`)."""
    import altair as alt

    rows, draws = alt.NamedData("rows"), alt.NamedData("draws")
    charts: dict[str, Any] = {
        "score_by_offset": heads.score_by_offset(rows, width=_WIDTH),
        "logit_by_offset": heads.logit_by_offset(rows, width=_WIDTH),
        "pairs": of_pairs.pairs(rows, width=_WIDTH),
        "edits_of_explanation": heads.edits_of_explanation(rows, width=_WIDTH),
        "forest": effects.forest(rows, draws, width=_LABELLED),
        "flow": effects.flow(rows, width=_WIDTH),
        "flow_linear": effects.flow(rows, log=False, width=_WIDTH),
        "lags": effects.lags(rows, width=_WIDTH),
        "paths": effects.paths(rows, width=_LABELLED),
        "patched": effects.parts(
            rows, width=_LABELLED, quantity="logit difference (1: the other run)"
        ),
        "direct": effects.parts(rows, width=_LABELLED),
        "persistence": persistence.persistence(rows, width=_WIDTH),
        "sweep": effects.sweep(rows, width=_WIDTH),
        "screen": effects.screen(rows, width=_WIDTH),
        "dose": doses.dose(rows, width=_WIDTH),
        "circuit": doses.circuit(rows, draws, width=_LABELLED),
    }
    return {name: chart.to_dict() for name, chart in charts.items()}


def themes() -> dict[str, dict[str, Any]]:
    """Return the configuration of charts, and the grid's colours, for light and for dark."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    score = colormaps[SCORES]
    change = {
        "light": LinearSegmentedColormap.from_list("light", DIVERGING),
        "dark": LinearSegmentedColormap.from_list("dark", DARK_DIVERGING),
    }
    return {
        name: {
            "config": theme(dark=name == "dark"),
            "score": _steps(score),
            "change": _steps(scale),
        }
        for name, scale in change.items()
    }


def _steps(scale: Any) -> list[str]:
    """Return a colour map as hexadecimal colours from its lower to its upper end."""
    from matplotlib.colors import to_hex

    return [to_hex(scale(step / (_STEPS - 1))) for step in range(_STEPS)]
