"""Charts of heads: the grid of all heads, and what is known of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .palette import DARK_TEXT_FROM
from .parts import (
    ROW_HEIGHT,
    curves,
    finished,
    head_axes,
    kinds,
    of,
    offset_axis,
    require_altair,
    source,
    tooltip,
)

if TYPE_CHECKING:
    import altair as alt

    from .parts import Rows, Width

#: Groups of the edits that `explain` tries, in the order of legends.
GROUPS = ("rank one", "band dropped", "band not rotated", "axis dropped", "its controls")


def head_grid(
    data: Rows,
    *,
    kappa: float = 0.1,
    width: Width = 420,
    cell: int = 18,
    title: str | None = None,
    description: str = "Slash score of each head, layers from left to right.",
) -> alt.LayerChart:
    """Return a heat map of scores; a number gives the offset where the score reaches κ.

    κ is the chart's parameter `kappa`, which a page can change.

    Args:
        data: Columns layer, head, name, score (in [0, 1]), offset; a row per head.
        kappa: Least score of a head whose offset is written.
        width: In pixels, "container", or an alt.Step for each layer.
        cell: Height of a row of heads, in pixels.
        title: The title, if any.
        description: What is seen, for screen readers.
    """
    alt = require_altair()
    tips = tooltip(head="name:N", score="score:Q:.3f", offset_Δ="offset:Q")
    x, y = head_axes()
    cells = (
        alt.Chart()
        .mark_rect()
        .encode(
            x=x,
            y=y,
            color=alt.Color(
                "score:Q",
                title="slash score",
                scale=alt.Scale(domain=[0, 1], clamp=True, range="heatmap"),
                legend=alt.Legend(gradientLength=120, tickCount=5),
            ),
            tooltip=tips,
        )
    )
    numbers = (
        alt.Chart()
        .mark_text(fontSize=10)
        .encode(
            x=x,
            y=y,
            text="offset:Q",
            color=alt.condition(
                f"datum.score > {DARK_TEXT_FROM}", alt.value("black"), alt.value("white")
            ),
            tooltip=tips,
        )
        .transform_filter("datum.score >= kappa")
    )
    chart = alt.layer(cells, numbers, data=source(data)).add_params(
        alt.param(name="kappa", value=kappa)
    )
    return finished(chart, description, title, width, alt.Step(cell))


def score_by_offset(
    data: Rows,
    *,
    width: Width = 420,
    height: int = 200,
    title: str | None = None,
    description: str = "Slash score of one head by offset, on each kind of tokens.",
) -> alt.LayerChart:
    """Return a head's slash score by offset: lines, points and the intervals as bands.

    Args:
        data: Columns tokens (such as "natural" and "random"), offset, score, low, high.
        width: In pixels, or "container".
        height: In pixels.
        title: The title, if any.
        description: What is seen, for screen readers.
    """
    tips = tooltip(
        tokens="tokens:N",
        offset_Δ="offset:Q",
        score="score:Q:.3f",
        low="low:Q:.3f",
        high="high:Q:.3f",
    )
    chart = curves(source(data), offset_axis(), "score", "slash score", "tokens", tips)
    return finished(chart, description, title, width, height)


def logit_by_offset(
    data: Rows,
    *,
    width: Width = 420,
    height: int = 200,
    title: str | None = None,
    description: str = "Mean logit of one head by offset, measured and predicted.",
) -> alt.LayerChart:
    """Return a head's mean logit by offset, measured and predicted from its mean query and key.

    Args:
        data: Columns offset, logit, which ("measured" or "predicted").
        width: In pixels, or "container".
        height: In pixels.
        title: The title, if any.
        description: What is seen, for screen readers.
    """
    alt = require_altair()
    tips = tooltip(logit="which:N", offset_Δ="offset:Q", value="logit:Q:.3f")
    told = kinds("which", ("measured", "predicted"))
    y = alt.Y("logit:Q", title="mean logit", scale=alt.Scale(zero=False))
    where = {"x": offset_axis(), "y": y, "tooltip": tips}
    lines = alt.Chart().mark_line().encode(**where, **of(told, "color", "strokeDash"))
    points = alt.Chart().mark_point(filled=True, size=28, opacity=1)
    points = points.encode(**where, **of(told, "color", "shape"))
    chart = alt.layer(lines, points, data=source(data))
    return finished(chart, description, title, width, height)


def edits_of_explanation(
    data: Rows,
    *,
    width: Width = 420,
    title: str | None = None,
    description: str = "Slash score of one head under each edit; the rule is the unedited score.",
) -> alt.LayerChart:
    """Return the slash score under each edit that `explain` tried, beside the unedited score.

    Args:
        data: Columns label (such as "drop high"), group (one of GROUPS), score, clean (the
            unedited score, the same in each row).
        width: In pixels, or "container".
        title: The title, if any.
        description: What is seen, for screen readers.
    """
    alt = require_altair()
    tips = tooltip(edit="label:N", group="group:N", score="score:Q:.3f", unedited="clean:Q:.3f")
    told = of(kinds("group", GROUPS), "color", "shape")
    y = alt.Y("label:N", title=None, sort=None, axis=alt.Axis(labelLimit=320, ticks=False))
    x = alt.X("score:Q", title="slash score at the offset (dashed: without an edit)")
    stems = (
        alt.Chart()
        .mark_rule(strokeWidth=2)
        .encode(x=x, x2=alt.datum(0), y=y, color=told["color"], tooltip=tips)
    )
    points = (
        alt.Chart()
        .mark_point(filled=True, size=80, opacity=1)
        .encode(x=x, y=y, **told, tooltip=tips)
    )
    clean = (
        alt.Chart()
        .mark_rule(strokeDash=[4, 3])
        .encode(
            x="mean(clean):Q",
            tooltip=[alt.Tooltip("mean(clean):Q", title="unedited", format=".3f")],
        )
    )
    chart = alt.layer(stems, points, clean, data=source(data))
    return finished(chart, description, title, width, alt.Step(ROW_HEIGHT))
