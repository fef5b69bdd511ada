"""Charts of measured effects: forest plots, flow, copied lags, paths, parts, sweeps, screens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .parts import (
    ROW_HEIGHT,
    axis_title,
    curves,
    finished,
    head_axes,
    kinds,
    of,
    offset_axis,
    require_altair,
    row_labels,
    seen,
    source,
    tooltip,
    zero_rule,
)

if TYPE_CHECKING:
    import altair as alt

    from .parts import Rows, Width

#: What a row of a forest plot shows, in the order of the legend.
WHATS = ("edit", "control")
#: Why a row of a screen was run, in the order of the legend.
WHYS = ("top", "flagged", "audit")


def forest(
    data: Rows,
    draws: Rows | None = None,
    *,
    quantity: str = "effect (edited − clean)",
    width: Width = 420,
    title: str | None = None,
    description: str = "Effects of edits with intervals, and of their controls with single draws.",
) -> alt.LayerChart:
    """Return a forest plot: a point and an interval for each row, and ticks for single draws.

    Args:
        data: Columns row (its label), effect, low, high, what ("edit" or "control").
        draws: Columns row (a label of `data`), effect; None for no draws.
        quantity: Title of the axis, with its unit.
        width: In pixels, or "container".
        title: The title, if any.
        description: What is seen, for screen readers.
    """
    alt = require_altair()
    quantity = axis_title(quantity)
    tips = tooltip(
        row="row:N", effect="effect:Q:+.4f", low="low:Q:+.4f", high="high:Q:+.4f", what="what:N"
    )
    layers = [
        zero_rule(quantity),
        *_intervals(source(data), quantity, tips, of(kinds("what", WHATS), "color", "shape")),
    ]
    if draws is not None:
        ticks = alt.Chart(source(draws, "draws")).mark_tick(thickness=1.5, opacity=0.45, size=14)
        layers.append(
            ticks.encode(
                x=alt.X("effect:Q", title=quantity),
                y=row_labels(),
                tooltip=tooltip(row="row:N", one_draw="effect:Q:+.4f"),
            )
        )
    return finished(alt.layer(*layers), description, title, width, alt.Step(ROW_HEIGHT))


def _intervals(data: Any, quantity: str, tips: list[Any], told: dict[str, Any]) -> list[Any]:
    """Return two layers: a point at the effect, and a rule from low to high."""
    # The points come first: Vega-Lite orders the rows by the first layer, without invalid ones.
    alt = require_altair()
    color = {"color": told["color"]} if told else {}
    rules = (
        alt.Chart(data)
        .mark_rule(strokeWidth=2)
        .encode(
            x=alt.X("low:Q", title=quantity), x2="high:Q", y=row_labels(), tooltip=tips, **color
        )
    )
    points = (
        alt.Chart(data)
        .mark_point(filled=True, size=70, opacity=1)
        .encode(x=alt.X("effect:Q", title=quantity), y=row_labels(), tooltip=tips, **told)
    )
    return [points, rules]


def paths(
    data: Rows,
    *,
    quantity: str = "effect through this input alone",
    width: Width = 420,
    title: str | None = None,
    description: str = "Effect of an edit through one input of one later head, with intervals.",
) -> alt.LayerChart:
    """Return the effect of an edit through each input of later heads, with intervals.

    Args:
        data: Columns row (its label), effect, low, high.
        quantity: Title of the axis, with its unit.
        width: In pixels, or "container".
        title: The title, if any.
        description: What is seen, for screen readers.
    """
    alt = require_altair()
    quantity = axis_title(quantity)
    tips = tooltip(path="row:N", effect="effect:Q:+.4f", low="low:Q:+.4f", high="high:Q:+.4f")
    layers = [zero_rule(quantity), *_intervals(source(data), quantity, tips, {})]
    return finished(alt.layer(*layers), description, title, width, alt.Step(ROW_HEIGHT))


def parts(
    data: Rows,
    *,
    quantity: str = "effect",
    width: Width = 420,
    title: str | None = None,
    description: str = "Effects with intervals, several for each row, told apart by their marks.",
) -> alt.LayerChart:
    """Return several effects with intervals in each row, such as direct, total and repair.

    Args:
        data: Columns row (its label), what (which of the effects), effect, low, high.
        quantity: Title of the axis, with its unit.
        width: In pixels, or "container".
        title: The title, if any.
        description: What is seen, for screen readers.
    """
    alt = require_altair()
    rows, quantity = source(data), axis_title(quantity)
    tips = tooltip(
        row="row:N", what="what:N", effect="effect:Q:+.4f", low="low:Q:+.4f", high="high:Q:+.4f"
    )
    told = kinds("what", seen(rows, "what"))
    beside = alt.YOffset("what:N", sort=None, scale=alt.Scale(domain=seen(rows, "what")))
    where = {"y": row_labels(), "yOffset": beside, "tooltip": tips}
    points = alt.Chart(rows).mark_point(filled=True, size=60, opacity=1)
    points = points.encode(x=alt.X("effect:Q", title=quantity), **told, **where)
    rules = alt.Chart(rows).mark_rule(strokeWidth=2)
    low = alt.X("low:Q", title=quantity)
    rules = rules.encode(x=low, x2="high:Q", color=told["color"], **where)
    chart = alt.layer(zero_rule(quantity), points, rules)
    height = alt.Step(2 * ROW_HEIGHT, **{"for": "position"})
    return finished(chart, description, title, width, height)


def flow(
    data: Rows,
    *,
    log: bool = True,
    width: Width = 420,
    height: int = 220,
    title: str | None = None,
    description: str = "How much a replaced token moves the prediction, by offset, for each edit.",
) -> alt.LayerChart:
    """Return flow by offset: a curve with its interval as a band, for each edit.

    Args:
        data: Columns edit, offset, flow (KL divergence in nats), low, high.
        log: Whether the axis is logarithmic; rows whose flow is 0 are then left out.
        width: In pixels, or "container".
        height: In pixels.
        title: The title, if any.
        description: What is seen, for screen readers.
    """
    alt = require_altair()
    tips = tooltip(
        edit="edit:N", offset_Δ="offset:Q", flow="flow:Q:.4~g", low="low:Q:.4~g", high="high:Q:.4~g"
    )
    chart = curves(
        source(data),
        offset_axis("offset Δ from the replaced token to the prediction (tokens)"),
        "flow",
        "KL divergence (nats)",
        "edit",
        tips,
        alt.Scale(type="log", nice=False) if log else None,
    )
    if log:
        chart = chart.transform_filter("datum.flow > 0 && (datum.low == null || datum.low > 0)")
    return finished(chart, description, title, width, height)


def lags(
    data: Rows,
    *,
    width: Width = 420,
    height: int = 220,
    title: str | None = None,
    description: str = "How often each lag is copied, for each edit.",
) -> alt.LayerChart:
    """Return how often the token at each lag is the likeliest next one, for each edit.

    Args:
        data: Columns edit, lag, top1 (share of tokens), low, high.
        width: In pixels, or "container".
        height: In pixels.
        title: The title, if any.
        description: What is seen, for screen readers.
    """
    alt = require_altair()
    tips = tooltip(
        edit="edit:N", lag="lag:Q", top1="top1:Q:.3f", low="low:Q:.3f", high="high:Q:.3f"
    )
    rows = source(data)
    told = kinds("edit", seen(rows, "edit"))
    lag = alt.X("lag:O", title="lag in the first copy (1: the next token)", axis=_flat(alt))
    group = alt.XOffset("edit:N", sort=None, scale=alt.Scale(domain=seen(rows, "edit")))
    where = {"x": lag, "xOffset": group, "tooltip": tips}
    share = {"title": "share of tokens", "scale": alt.Scale(domain=[0, 1])}
    top1, low = alt.Y("top1:Q", **share), alt.Y("low:Q", **share)
    color = of(told, "color")
    bars = alt.Chart().mark_bar(opacity=0.3).encode(y=top1, **color, **where)
    rules = alt.Chart().mark_rule(strokeWidth=1.5).encode(y=low, y2="high:Q", **color, **where)
    points = alt.Chart().mark_point(filled=True, size=50, opacity=1)
    points = points.encode(y=top1, **of(told, "color", "shape"), **where)
    chart = alt.layer(bars, rules, points, data=rows)
    return finished(chart, description, title, width, height)


def _flat(alt: Any) -> Any:
    return alt.Axis(labelAngle=0)


def sweep(
    data: Rows,
    *,
    quantity: str = "effect",
    level: float = 0.05,
    width: Width = 420,
    cell: int = 18,
    title: str | None = None,
    description: str = "Effect of an edit at one head at a time; a dot marks a small q.",
) -> alt.LayerChart:
    """Return a heat map of effects, whose colours are symmetric around zero; dots mark small q.

    Args:
        data: Columns layer, head, name, effect, low, high, q; a row per head.
        quantity: Title of the legend, with the unit.
        level: A dot marks heads whose q is below it.
        width: In pixels, "container", or an alt.Step for each layer.
        cell: Height of a row of heads, in pixels.
        title: The title, if any.
        description: What is seen, for screen readers.
    """
    alt = require_altair()
    rows = source(data)
    tips = tooltip(
        head="name:N", effect="effect:Q:+.4f", low="low:Q:+.4f", high="high:Q:+.4f", q="q:Q:.3~g"
    )
    ends = f"extent(pluck(data('{rows.name}'), 'effect'))"
    most = f"max(abs({ends}[0]), abs({ends}[1]), 1e-12)"
    scale = alt.Scale(
        range="diverging", domainMin=alt.ExprRef(f"-{most}"), domainMax=alt.ExprRef(most)
    )
    x, y = head_axes()
    legend = alt.Legend(gradientLength=120, tickCount=5)
    color = alt.Color("effect:Q", title=axis_title(quantity), scale=scale, legend=legend)
    cells = alt.Chart().mark_rect().encode(x=x, y=y, color=color, tooltip=tips)
    dots = (
        alt.Chart()
        .mark_text(text="•", fontSize=12)
        .encode(x=x, y=y, tooltip=tips)
        .transform_filter(f"isValid(datum.q) && datum.q < {level}")
    )
    chart = alt.layer(cells, dots, data=rows)
    return finished(chart, description, title, width, alt.Step(cell))


def screen(
    data: Rows,
    *,
    quantity: str = "effect",
    width: Width = 420,
    height: int = 260,
    title: str | None = None,
    description: str = "Estimated and exact effect of each row of a screen that was run.",
) -> alt.LayerChart:
    """Return estimated against exact effects, by why they were run; the line is where they agree.

    Args:
        data: Columns name, estimate, effect, low, high, why ("top", "flagged" or "audit").
        quantity: Title of the effects, with their unit.
        width: In pixels, or "container".
        height: In pixels.
        title: The title, if any.
        description: What is seen, for screen readers.
    """
    alt = require_altair()
    quantity = axis_title(quantity)
    tips = tooltip(
        head="name:N",
        estimate="estimate:Q:+.4f",
        effect="effect:Q:+.4f",
        low="low:Q:+.4f",
        high="high:Q:+.4f",
        why="why:N",
    )
    x = alt.X("estimate:Q", title="estimate by the gradient")
    told = of(kinds("why", WHYS), "color", "shape")
    line = alt.Chart().mark_line(strokeWidth=1, opacity=0.5, color="gray")
    line = line.encode(x=x, y=alt.Y("estimate:Q", title=quantity), tooltip=tips)
    ends = {"y": alt.Y("low:Q", title=quantity), "y2": "high:Q", "color": told["color"]}
    rules = alt.Chart().mark_rule(opacity=0.4).encode(x=x, tooltip=tips, **ends)
    points = alt.Chart().mark_point(filled=True, size=60, opacity=0.9)
    points = points.encode(x=x, y=alt.Y("effect:Q", title=quantity), tooltip=tips, **told)
    chart = alt.layer(line, rules, points, data=source(data))
    return finished(chart, description, title, width, height)
