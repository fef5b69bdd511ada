"""What the claims about a model show in notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...claims.rules import CLAIMS
from ..evidence import MARKS, NOTE, interval_text, prompts_line, title_of
from ..evidence_figure import evidence_figure
from .block import Block, Table
from .svg import inline_svg

if TYPE_CHECKING:
    from ...claims.result import Evidence


def evidence_html(found: Evidence) -> str:
    """Return the claims with their verdicts, and a picture of their tests."""
    rows = []
    frame = found.frame.set_index("claim")
    for claim in CLAIMS:
        came, why = found.verdict(claim.number)
        test = next((t for t in found.measured if t.test == frame.loc[claim.number, "test"]), None)
        told = "" if test is None else f"{test.test}: {interval_text(test)}"
        rows.append([str(claim.number), claim.says, f"{MARKS[came]} {came}", told, why])
    table = Table(["", "claim", "verdict", "test that decides", "why"], rows, (0, 1, 2, 3, 4))
    label = "Tests of each claim, each with its interval and threshold."
    picture = inline_svg(lambda: evidence_figure(found), label)
    return Block(title_of(found), [prompts_line(found)], [picture], [table], [NOTE]).html()
