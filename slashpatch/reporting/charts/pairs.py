"""Charts of rotary pairs: amplitude and phase of the cosines that make a head's profile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .parts import finished, kinds, of, require_altair, source, tooltip

if TYPE_CHECKING:
    import altair as alt

    from .parts import Rows, Width

#: Bands of rotary pairs, in the order of legends.
BANDS = ("high", "medium", "low")


def amplitudes(
    data: Rows,
    *,
    width: Width = 420,
    height: int = 140,
    title: str | None = None,
    description: str = "Amplitude of each rotary pair's cosine, and the bands of pairs.",
) -> alt.LayerChart:
    """Return bars of the amplitudes A_l, the highest frequency first, with the bands' names.

    Arguments as for `pairs`; `width` may be "container".
    """
    alt = require_altair()
    bars = (
        alt.Chart()
        .mark_bar()
        .encode(
            x=_pair_axis(alt, labels=False),
            y=alt.Y("amplitude:Q", title="amplitude A (logit)"),
            color=kinds("band", BANDS)["color"].legend(None),
            tooltip=_pair_tips(),
        )
    )
    # A band's name stands at its middle pair.
    names = (
        alt.Chart()
        .transform_window(
            place="row_number()",
            groupby=["band"],
            sort=[alt.SortField("wavelength", order="ascending")],
        )
        .transform_joinaggregate(pairs="count()", groupby=["band"])
        .transform_filter("datum.place == ceil(datum.pairs / 2)")
        .mark_text(fontStyle="italic", dy=-6)
        .encode(
            x=_pair_axis(alt, labels=False),
            y=alt.value(0),
            text="band:N",
            tooltip=tooltip(band="band:N"),
        )
    )
    chart = alt.layer(bars, names, data=source(data))
    return finished(chart, description, title, width, height)


def phases_of_pairs(
    data: Rows,
    *,
    width: Width = 420,
    height: int = 140,
    title: str | None = None,
    description: str = "Phase of each rotary pair's cosine; larger points have larger amplitudes.",
) -> alt.Chart:
    """Return points of the phases φ_l from −π to π; the area of a point grows with its amplitude.

    Arguments as for `pairs`; `width` may be "container".
    """
    alt = require_altair()
    names = {-2: "−π", -1: "−π/2", 0: "0", 1: "π/2", 2: "π"}
    told = of(kinds("band", BANDS), "color", "shape")
    label = "".join(
        f"round(datum.value * 2 / PI) == {at} ? '{name}' : " for at, name in names.items()
    )
    chart = (
        alt.Chart(source(data))
        .mark_point(filled=True, opacity=1)
        .encode(
            x=_pair_axis(alt, labels=True),
            y=alt.Y(
                "phase:Q",
                title="phase φ (rad)",
                scale=alt.Scale(domain=[-3.1416, 3.1416], nice=False),
                axis=alt.Axis(values=[-3.1416, -1.5708, 0, 1.5708, 3.1416], labelExpr=label + "''"),
            ),
            **told,
            size=alt.Size("amplitude:Q", legend=None, scale=alt.Scale(range=[12, 140])),
            tooltip=_pair_tips(),
        )
    )
    return finished(chart, description, title, width, height)


def pairs(
    data: Rows,
    *,
    width: int = 420,
    title: str | None = None,
    description: str = "Amplitude and phase of each rotary pair's cosine, by band.",
) -> alt.VConcatChart:
    """Return two panels, amplitudes above phases, of a head's rotary pairs.

    The predicted logit at offset Δ is Σ_l A_l cos(θ_l Δ + φ_l), plus the unrotated dimensions.

    Args:
        data: Columns pair (its index), wavelength (tokens), band ("high", "medium" or "low"),
            amplitude (A_l ≥ 0, in logits), phase (φ_l, radians from −π to π).
        width: In pixels. Vega-Lite has no "container" for several panels; `amplitudes` and
            `phases_of_pairs` have.
        title: The title, if any.
        description: What is seen, for screen readers.
    """
    alt = require_altair()
    rows = source(data)
    panels = [amplitudes(rows, width=width), phases_of_pairs(rows, width=width)]
    for panel in panels:
        panel.background = panel.data = alt.Undefined  # only the whole has them
    chart = alt.vconcat(*panels, data=rows, spacing=8)
    # Each panel has colours of its own, because only one of the two has a legend.
    return finished(
        chart.resolve_scale(color="independent", shape="independent"), description, title
    )


def _pair_axis(alt: Any, labels: bool) -> Any:
    return alt.X(
        "pair:O",
        title="rotary pair, highest frequency first" if labels else None,
        sort=alt.EncodingSortField("wavelength", op="min", order="ascending"),
        axis=alt.Axis(
            labelOverlap=True, labelSeparation=4, labelAngle=0, labels=labels, ticks=labels
        ),
    )


def _pair_tips() -> list[Any]:
    return tooltip(
        pair="pair:Q",
        wavelength_in_tokens="wavelength:Q:.4~g",
        band="band:N",
        amplitude="amplitude:Q:.3f",
        phase="phase:Q:.3f",
    )
