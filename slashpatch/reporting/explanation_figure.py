"""The figure of an explanation: scores under edits, the profile, and the cosines that make it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from .charts.palette import CATEGORIES, MARKERS
from .charts.rows import edit_rows, pair_rows
from .figures import draw_profile
from .style import ink, new_figure, shortened, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..explaining.result import Explanation

#: Pairs with at least this share of the largest amplitude have large points in the figure.
_LARGE = 0.2


@styled
def explanation_figure(explanation: Explanation, titled: bool = True) -> Figure:
    """Draw the score under each edit, the mean logit by offset, and each pair's cosine.

    Without a profile (no RoPE) only the first is drawn.
    """
    if explanation.profile is None:
        figure = new_figure(5.5, 2.2)
        _draw_edits(figure.subplots(), explanation)
    else:
        figure = new_figure(10, 5.2)
        axes = figure.subplots(2, 2, height_ratios=(3, 2))
        _draw_edits(axes[0, 0], explanation)
        draw_profile(axes[0, 1], explanation.profile)
        axes[0, 1].set_title(f"correlation {explanation.profile.correlation:.3f}")
        rows = pair_rows(explanation.cosines).sort_values("wavelength", kind="stable")
        _draw_amplitudes(axes[1, 0], rows)
        _draw_phases(axes[1, 1], rows)
    if titled:
        what = f"{explanation.head} at Δ={explanation.offset}: {explanation.verdict}"
        model = explanation.provenance.get("model", "")
        figure.suptitle(shortened(f"{model} {what}".strip(), 100))
    return figure


def _draw_edits(axis: Axes, explanation: Explanation) -> None:
    rows = edit_rows(explanation)
    at = range(len(rows))
    groups = list(dict.fromkeys(rows["group"]))
    for index, group in enumerate(groups):
        mine = [place for place in at if rows["group"].iloc[place] == group]
        scores = rows["score"].iloc[mine]
        axis.hlines(mine, 0, scores, color=CATEGORIES[index], lw=1.5)
        axis.plot(scores, mine, MARKERS[index], color=CATEGORIES[index], label=group)
    axis.axvline(explanation.natural, color=ink(), ls="--", lw=1)
    axis.set_yticks(at, rows["label"], fontsize=8)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.set_xlabel(f"slash score at Δ={explanation.offset} (dashed: without an edit)")
    axis.grid(axis="x", alpha=0.3)


def _draw_amplitudes(axis: Axes, rows: pd.DataFrame) -> None:
    for index, (band, mine) in enumerate(_bands(rows)):
        places = rows.index.get_indexer(mine.index)
        # One step for each pair: many bars would make a notebook's picture large.
        edges = np.append(places - 0.5, places[-1] + 0.5)
        axis.stairs(mine["amplitude"], edges, fill=True, color=CATEGORIES[index])
        middle = float(places.mean())
        axis.text(middle, 1.02, band, transform=axis.get_xaxis_transform(), ha="center", fontsize=8)
    _pair_axis(axis, rows)
    axis.set_ylabel("amplitude A (logit)")


def _draw_phases(axis: Axes, rows: pd.DataFrame) -> None:
    most = float(rows["amplitude"].max()) or 1.0
    for index, (_, mine) in enumerate(_bands(rows)):
        places = rows.index.get_indexer(mine.index)
        large = (mine["amplitude"] >= _LARGE * most).to_numpy()
        style: dict[str, Any] = {"color": CATEGORIES[index], "marker": MARKERS[index], "ls": ""}
        axis.plot(places[large], mine["phase"][large], markersize=6, **style)
        axis.plot(places[~large], mine["phase"][~large], markersize=2.5, **style)
    axis.set_yticks([-math.pi, 0, math.pi], ["−π", "0", "π"])
    axis.set_ylim(-1.1 * math.pi, 1.1 * math.pi)
    axis.grid(axis="y", alpha=0.3)
    _pair_axis(axis, rows)
    axis.set_ylabel("phase φ (rad)")
    axis.set_title(f"large points: at least {_LARGE:.0%} of the largest amplitude", fontsize=8)


def _bands(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    return [(str(band), mine) for band, mine in rows.groupby("band", sort=False)]


def _pair_axis(axis: Axes, rows: pd.DataFrame) -> None:
    step = max(1, len(rows) // 12)
    axis.set_xticks(range(0, len(rows), step), rows["pair"].astype(str)[::step], fontsize=8)
    axis.set_xlim(-0.7, len(rows) - 0.3)
    axis.set_xlabel("rotary pair, highest frequency first")
