"""Parts that several charts share: their data, axes, tooltips and outer properties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ...data.files import without_nan
from ...errors import ExtraError
from .palette import DASHES

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd

    Rows: TypeAlias = pd.DataFrame | alt.NamedData | alt.Data
    Width: TypeAlias = int | str | alt.Step

#: Height of one row of a chart whose rows have labels, in pixels.
ROW_HEIGHT = 24


def require_altair() -> Any:
    """Return the module altair. Raises ExtraError if it is not installed."""
    try:
        import altair
    except ImportError:
        raise ExtraError(
            "charts need the package altair, which is not installed; run "
            "pip install 'slashpatch[report]'"
        ) from None
    return altair


def source(data: Rows, name: str = "rows") -> alt.Data:
    """Return rows as a chart's data under a name; NaN and infinities become null.

    Data that have a name are returned as they are. Charts that are combined need different names.
    """
    import pandas as pd

    alt = require_altair()
    if not isinstance(data, pd.DataFrame):
        return data
    records = without_nan(data.to_dict(orient="records"))
    return alt.Data(
        values=[{key: _plain(value) for key, value in row.items()} for row in records], name=name
    )


def _plain(value: Any) -> Any:
    """Return a cell as a JSON value: numpy's and pandas' scalars become Python's."""
    import pandas as pd

    value = value.item() if hasattr(value, "item") else value
    return None if value is pd.NA or value is pd.NaT else without_nan(value)


def finished(
    chart: Any, description: str, title: str | None, width: Width | None = None, height: Any = None
) -> Any:
    """Return a chart with its size, title, description (for ARIA) and no background."""
    given = {"title": title, "width": width, "height": height}
    return chart.properties(
        background="transparent",
        description=description,
        **{name: value for name, value in given.items() if value is not None},
    )


def axis_title(text: str) -> str:
    """Return an untrusted text as the title of an axis or legend.

    Vega-Lite puts these titles into expressions, where it escapes quotes but not backslashes, so a
    backslash could end the text and begin an expression; another sign takes its place.
    """
    return text.replace("\\", "\N{SET MINUS}")


def stacked(*charts: Any) -> alt.VConcatChart:
    """Return charts one below the other, each with its own scales."""
    alt = require_altair()
    panels = [chart.copy() for chart in charts]
    for panel in panels:
        panel.background = alt.Undefined  # only the whole has one
    channels = ("color", "shape", "strokeDash", "size")
    chart = alt.vconcat(*panels).resolve_scale(**dict.fromkeys(channels, "independent"))
    return chart.properties(background="transparent")


def tooltip(**fields: str) -> list[alt.Tooltip]:
    """Return tooltips by title; each field is `name:type` or `name:type:format`.

    Underscores in a title stand for spaces.
    """
    alt = require_altair()
    tips = []
    for title, field in fields.items():
        name, kind, *form = field.split(":")
        shown = {"format": form[0]} if form else {}
        tips.append(alt.Tooltip(f"{name}:{kind}", title=title.replace("_", " "), **shown))
    return tips


def seen(rows: alt.Data, field: str) -> alt.ExprRef:
    """Return a domain: the values of a field, in the order of the rows."""
    alt = require_altair()
    return alt.ExprRef(f"pluck(data('{rows.name}'), '{field}')")


def kinds(field: str, domain: Sequence[str] | alt.ExprRef) -> dict[str, Any]:
    """Return encodings of categories by color, shape and strokeDash, which share one legend."""
    # Vega-Lite joins their legends only if all three have the same domain, stated here.
    alt = require_altair()
    fixed = isinstance(domain, (list, tuple))
    legend = alt.Legend(
        orient="bottom",
        title=None,
        columns=len(domain) if fixed else 1,
        labelLimit=400,
        symbolOpacity=1,
    )
    shared: dict[str, Any] = {"sort": None, "legend": legend}
    scale = {"domain": list(domain) if fixed else domain}
    dashes = alt.Scale(**scale, range=[list(dash) for dash in DASHES])
    return {
        "color": alt.Color(f"{field}:N", **shared, scale=alt.Scale(**scale)),
        "shape": alt.Shape(f"{field}:N", **shared, scale=alt.Scale(**scale)),
        "strokeDash": alt.StrokeDash(f"{field}:N", **shared, scale=dashes),
    }


def of(told: dict[str, Any], *channels: str) -> dict[str, Any]:
    """Return some of the encodings of `kinds`."""
    return {channel: told[channel] for channel in channels}


def curves(
    rows: alt.Data,
    x: Any,
    y: str,
    y_title: str,
    field: str,
    tips: list[Any],
    y_scale: Any = None,
) -> alt.LayerChart:
    """Return bands from low to high, lines, and points, for each category of a field."""
    alt = require_altair()
    axis: dict[str, Any] = {"title": y_title, "scale": y_scale or alt.Scale()}
    told = kinds(field, seen(rows, field))
    where = {"x": x, "y": alt.Y(f"{y}:Q", **axis), "tooltip": tips}
    ends = {**where, "y": alt.Y("low:Q", **axis), "y2": "high:Q"}
    bands = alt.Chart().mark_area(opacity=0.18).encode(**ends, **of(told, "color"))
    lines = alt.Chart().mark_line().encode(**where, **of(told, "color", "strokeDash"))
    points = alt.Chart().mark_point(filled=True, size=36, opacity=1)
    return alt.layer(bands, lines, points.encode(**where, **of(told, "color", "shape")), data=rows)


def offset_axis(title: str = "offset Δ (tokens)") -> alt.X:
    """Return the axis of offsets: whole numbers only."""
    alt = require_altair()
    return alt.X("offset:Q", title=title, axis=alt.Axis(tickMinStep=1, format="d"))


def head_axes() -> tuple[alt.X, alt.Y]:
    """Return the axes of a grid of heads: layers to the right, heads downwards."""
    alt = require_altair()
    axis = alt.Axis(labelOverlap=True, labelSeparation=3, labelAngle=0, ticks=False, domain=False)
    return alt.X("layer:O", title="layer", axis=axis), alt.Y("head:O", title="head", axis=axis)


def row_labels() -> alt.Y:
    """Return the axis of rows with labels, in the order of the rows."""
    alt = require_altair()
    return alt.Y("row:N", title=None, sort=None, axis=alt.Axis(labelLimit=320, ticks=False))


def zero_rule(quantity: str) -> Any:
    """Return a dashed vertical rule at zero, on an axis with the title `quantity`."""
    alt = require_altair()
    rule = alt.Chart(alt.Data(values=[{"at": 0}])).mark_rule(strokeDash=[4, 3], opacity=0.7)
    return rule.encode(x=alt.X("at:Q", title=quantity), tooltip=tooltip(no_effect="at:Q"))
