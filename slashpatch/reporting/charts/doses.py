"""Charts of doses and circuits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .parts import (
    ROW_HEIGHT,
    axis_title,
    curves,
    finished,
    require_altair,
    row_labels,
    source,
    tooltip,
    zero_rule,
)

if TYPE_CHECKING:
    import altair as alt

    from .parts import Rows, Width


def dose(
    data: Rows,
    *,
    quantity: str = "effect (edited − clean)",
    width: Width = 420,
    height: int = 220,
    title: str | None = None,
    description: str = "Effect of an edit by dose, with its interval as a band, and its controls.",
) -> alt.LayerChart:
    """Return the effect by dose: a curve with its interval as a band, and one for each control.

    Args:
        data: Columns series ("edit", or the control), dose, effect, low, high.
        quantity: Title of the effects, with their unit.
        width: In pixels, or "container".
        height: In pixels.
        title: The title, if any.
        description: What is seen, for screen readers.
    """
    alt = require_altair()
    tips = tooltip(
        curve="series:N",
        dose="dose:Q",
        effect="effect:Q:+.4f",
        low="low:Q:+.4f",
        high="high:Q:+.4f",
    )
    x = alt.X("dose:Q", title="dose: the number in the edit", scale=alt.Scale(zero=False))
    chart = curves(source(data), x, "effect", axis_title(quantity), "series", tips)
    return finished(chart, description, title, width, height)


def circuit(
    data: Rows,
    draws: Rows | None = None,
    *,
    quantity: str = "share of what ablating all heads changes",
    width: Width = 420,
    title: str | None = None,
    description: str = "Faithfulness, completeness and minimality of a circuit, with intervals.",
) -> alt.LayerChart:
    """Return each share of a circuit, a point with its interval; ticks are single random sets.

    Args:
        data: Columns row (its label), share, low, high.
        draws: Columns row (a label of `data`), share; None for no draws.
        quantity: Title of the axis.
        width: In pixels, or "container".
        title: The title, if any.
        description: What is seen, for screen readers.
    """
    alt = require_altair()
    quantity = axis_title(quantity)
    tips = tooltip(row="row:N", share="share:Q:.3f", low="low:Q:.3f", high="high:Q:.3f")
    rows = source(data)
    x = alt.X("share:Q", title=quantity)
    points = alt.Chart(rows).mark_point(filled=True, size=70, opacity=1)
    rules = alt.Chart(rows).mark_rule(strokeWidth=2)
    whole = alt.Chart(alt.Data(values=[{"at": 1}])).mark_rule(strokeDash=[1, 3], opacity=0.7)
    layers = [
        zero_rule(quantity),
        whole.encode(x=alt.X("at:Q", title=quantity), tooltip=tooltip(whole_model="at:Q")),
        points.encode(x=x, y=row_labels(), tooltip=tips),
        rules.encode(x=alt.X("low:Q", title=quantity), x2="high:Q", y=row_labels(), tooltip=tips),
    ]
    if draws is not None:
        ticks = alt.Chart(source(draws, "draws")).mark_tick(thickness=1.5, opacity=0.45, size=14)
        one = tooltip(row="row:N", one_set="share:Q:.3f")
        layers.append(ticks.encode(x=x, y=row_labels(), tooltip=one))
    return finished(alt.layer(*layers), description, title, width, alt.Step(ROW_HEIGHT))
