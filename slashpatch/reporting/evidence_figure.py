"""The figure of `evidence`: each test's interval against its threshold, claim by claim."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..claims.rules import CLAIMS, RULES
from ..claims.verdicts import CANNOT_TELL, CONTRADICTED, SUPPORTED, outcome
from .charts.palette import CATEGORIES
from .evidence import MARKS, title_of
from .style import ink, new_figure, shortened, styled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..claims.measured import Measured
    from ..claims.result import Evidence

_COLORS = {
    SUPPORTED: CATEGORIES[2],
    CONTRADICTED: CATEGORIES[1],
    CANNOT_TELL: "#7a7a7a",
}
_MARKERS = {SUPPORTED: "o", CONTRADICTED: "X", CANNOT_TELL: "D"}


@styled
def evidence_figure(found: Evidence, claims: Sequence[int] | None = None) -> Figure:
    """Draw the tests of some claims (None: all), a panel for each claim.

    A test is a point with its interval; a bar marks its threshold, and > or < the side on which it
    is supported. Tests that were not measured are named without a point.
    """
    wanted = [claim for claim in CLAIMS if claims is None or claim.number in claims]
    tests = {
        claim.number: [t for t in found.of_claim(claim.number) if RULES[t.test].needed]
        for claim in wanted
    }
    heights = [0.9 + 0.32 * max(1, len(tests[claim.number])) for claim in wanted]
    figure = new_figure(7.5, 0.4 + sum(heights))
    axes = figure.subplots(len(wanted), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, claim in zip(axes, wanted, strict=True):
        came, _ = found.verdict(claim.number)
        axis.set_title(f"{claim.number}. {claim.name}: {came}", color=ink())
        _draw(axis, tests[claim.number])
    if claims is None:
        figure.suptitle(shortened(title_of(found), 90), fontsize=11)
    return figure


def _draw(axis: Axes, tests: list[Measured]) -> None:
    for place, test in enumerate(tests):
        came, _ = outcome(test)
        rule = RULES[test.test]
        axis.plot([rule.threshold] * 2, [place - 0.35, place + 0.35], color=ink(), lw=2)
        if math.isnan(test.estimate):
            continue
        low, high = (test.estimate if math.isnan(end) else end for end in (test.low, test.high))
        axis.plot([low, high], [place, place], color=_COLORS[came], lw=2)
        axis.plot(
            test.estimate,
            place,
            _MARKERS[came],
            color=_COLORS[came],
            markerfacecolor=_COLORS[came] if came != CANNOT_TELL else "none",
        )
    names = [f"{test.test}{_side(test)} {MARKS[outcome(test)[0]]}" for test in tests]
    axis.set_yticks(range(len(tests)), names, fontsize=8)
    axis.set_ylim(max(len(tests), 1) - 0.5, -0.5)
    axis.margins(x=0.08)
    axis.grid(axis="x", alpha=0.3)


def _side(test: Measured) -> str:
    """Return on which side of its bar a test is supported."""
    rule = RULES[test.test]
    return f" ({'>' if rule.above else '<'} {rule.threshold:g}{rule.unit and ' ' + rule.unit})"
