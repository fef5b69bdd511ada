"""Charts of the shallow transformer's training, of its phase diagram, and of a model's check."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .parts import (
    ROW_HEIGHT,
    axis_title,
    finished,
    kinds,
    of,
    require_altair,
    seen,
    source,
    tooltip,
)

if TYPE_CHECKING:
    import altair as alt

    from .parts import Rows, Width

#: Outcomes of a check, in the order of the legend.
STATUSES = ("pass", "fail", "refused")


def training(
    data: Rows,
    *,
    kappa: float | None = None,
    width: Width = 420,
    height: int = 220,
    title: str | None = None,
    description: str = "Slash scores and attention to the answer over the steps of training.",
) -> alt.LayerChart:
    """Return curves over training steps: thin lines for single seeds, thick ones for their mean.

    Args:
        data: Columns step, value, what (what the value is), and seed if there are several.
        kappa: Where to draw a rule, if anywhere.
        width: In pixels, or "container".
        height: In pixels.
        title: The title, if any.
        description: What is seen, for screen readers.
    """
    alt = require_altair()
    x = alt.X("step:Q", title="training step", scale=alt.Scale(type="symlog", constant=8))
    label = "score or attention (share)"
    rows = source(data)
    told = of(kinds("what", seen(rows, "what")), "color", "strokeDash")
    y_scale = alt.Scale(domain=[0, 1])
    tips = tooltip(what="what:N", step="step:Q")
    seeds = (
        alt.Chart()
        .mark_line(opacity=0.35, strokeWidth=1)
        .encode(
            x=x,
            y=alt.Y("value:Q", title=label, scale=y_scale),
            detail="seed:N",
            **told,
            tooltip=[*tips, *tooltip(seed="seed:N", value="value:Q:.3f")],
        )
    )
    mean = alt.Tooltip("mean(value):Q", title="mean over seeds", format=".3f")
    means = (
        alt.Chart()
        .mark_line(strokeWidth=2.5)
        .encode(
            x=x, y=alt.Y("mean(value):Q", title=label, scale=y_scale), **told, tooltip=[*tips, mean]
        )
    )
    layers = [seeds, means]
    if kappa is not None:
        rule = alt.Chart(alt.Data(values=[{"kappa": kappa}])).mark_rule(strokeDash=[4, 3])
        layers.append(rule.encode(y="kappa:Q", tooltip=tooltip(κ="kappa:Q")))
    return finished(alt.layer(*layers, data=rows), description, title, width, height)


def emergence(
    data: Rows,
    *,
    kappa: float | None = None,
    log_steps: bool = False,
    width: Width = 460,
    height: int = 260,
    title: str | None = None,
    description: str = "Slash score of each head over the steps of training.",
) -> alt.LayerChart:
    """Return each head's slash score over training steps.

    Args:
        data: Columns step, score, name (the head), what (the legend's entry).
        kappa: Where to draw a rule, if anywhere.
        log_steps: Whether the axis of steps is logarithmic.
        width: In pixels, or "container".
        height: In pixels.
        title: The title, if any.
        description: What is seen, for screen readers.
    """
    alt = require_altair()
    rows = source(data)
    scale = alt.Scale(type="symlog", constant=8) if log_steps else alt.Undefined
    curves = (
        alt.Chart()
        .mark_line(opacity=0.8)
        .encode(
            x=alt.X("step:Q", title="training step", scale=scale),
            y=alt.Y("score:Q", title="slash score", scale=alt.Scale(domain=[0, 1])),
            detail="name:N",
            **of(kinds("what", seen(rows, "what")), "color", "strokeDash"),
            tooltip=tooltip(head="name:N", step="step:Q", score="score:Q:.3f"),
        )
    )
    layers = [curves]
    if kappa is not None:
        rule = alt.Chart(alt.Data(values=[{"kappa": kappa}])).mark_rule(strokeDash=[4, 3])
        layers.append(rule.encode(y="kappa:Q", tooltip=tooltip(κ="kappa:Q")))
    return finished(alt.layer(*layers, data=rows), description, title, width, height)


def phases(
    data: Rows,
    rows: str = "row",
    columns: str = "column",
    *,
    width: int = 200,
    title: str | None = None,
    description: str = "When a slash emerges, and how high it gets, for each pair of settings.",
) -> alt.HConcatChart:
    """Return two heat maps over two settings: median steps to a slash, and mean final score.

    Args:
        data: Columns row and column (values of the two settings, as text), steps (null: not
            reached), score; a row for each pair of values.
        rows: Name of the setting of the rows; `columns` that of the columns.
        columns: See `rows`.
        width: Of one panel, in pixels.
        title: The title, if any.
        description: What is seen, for screen readers.
    """
    alt = require_altair()
    tips = tooltip(row="row:N", column="column:N", steps="steps:Q:.0f", final_score="score:Q:.2f")
    table = source(data)
    x = alt.X("column:N", title=axis_title(columns), sort=None, axis=alt.Axis(labelAngle=0))
    y = alt.Y("row:N", title=axis_title(rows), sort=None)
    # Vega-Lite leaves cells without a number out; this layer keeps their place and tooltip.
    outlines = alt.Chart().mark_rect(fillOpacity=0).encode(x=x, y=y, tooltip=tips)
    panels = []
    for field, name, form, scale in (
        ("steps", "median steps to the slash", ".0f", alt.Scale(type="log", reverse=True)),
        ("score", "mean final score", ".2f", alt.Scale(domain=[0, 1])),
    ):
        legend = alt.Legend(orient="bottom", gradientLength=width)
        cells = (
            alt.Chart()
            .mark_rect()
            .encode(
                x=x,
                y=y,
                color=alt.Color(f"{field}:Q", title=name, scale=scale, legend=legend),
                tooltip=tips,
            )
        )
        text = alt.Chart().transform_calculate(
            shown=f"isValid(datum.{field}) ? format(datum.{field}, '{form}') : 'none'"
        )
        # The outline keeps numbers readable on any colour.
        halo = {"stroke": "white", "strokeWidth": 3, "strokeOpacity": 0.8}
        layers = [
            text.mark_text(fontSize=11, color="black", **outline).encode(
                x=x, y=y, text="shown:N", tooltip=tips
            )
            for outline in (halo, {})
        ]
        panels.append(
            alt.layer(outlines, cells, *layers).properties(width=width, height=alt.Step(26))
        )
    chart = alt.hconcat(*panels, data=table).resolve_scale(color="independent")
    return finished(chart, description, title)


def checks(
    data: Rows,
    *,
    width: Width = 420,
    title: str | None = None,
    description: str = "How many checks of each contract passed, failed or were refused.",
) -> alt.LayerChart:
    """Return bars of the number of checks by contract and outcome.

    Args:
        data: Columns contract, status ("pass", "fail" or "refused"), n.
        width: In pixels, or "container".
        title: The title, if any.
        description: What is seen, for screen readers.
    """
    alt = require_altair()
    tips = tooltip(contract="contract:N", outcome="status:N", checks="n:Q")
    y = alt.Y("contract:N", title=None, sort=None, axis=alt.Axis(ticks=False))
    x = alt.X("n:Q", title="number of checks", axis=alt.Axis(tickMinStep=1))
    order = alt.Order("status:N", sort="ascending")
    color = kinds("status", STATUSES)["color"]
    bars = alt.Chart().mark_bar().encode(x=x, y=y, color=color, order=order, tooltip=tips)
    counts = [f"(datum['{name}'] ? datum['{name}'] + ' {name}  ' : '')" for name in STATUSES]
    total = " + ".join(f"(datum['{name}'] || 0)" for name in STATUSES)
    labels = (
        alt.Chart()
        .transform_pivot("status", value="n", groupby=["contract"])
        .transform_calculate(label=" + ".join(counts), n=total)
        .mark_text(fontSize=10, align="left", dx=5)
        .encode(x=x, y=y, text="label:N", tooltip=tooltip(contract="contract:N", checks="label:N"))
    )
    chart = alt.layer(bars, labels, data=source(data))
    return finished(chart, description, title, width, alt.Step(ROW_HEIGHT))
