"""The page of `evidence`: claims, verdicts, tests and rules in one HTML file without scripts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..claims.rules import CLAIMS, RULES
from ..claims.verdicts import CONTRADICTED, REPORTED, SUPPORTED, outcome
from .evidence import (
    MARKS,
    NOTE,
    control_text,
    evidence_table,
    interval_text,
    markdown,
    prompts_line,
    sources_of,
    title_of,
)
from .evidence_figure import evidence_figure
from .notebook.svg import inline_svg
from .style import printable
from .tables import plain

if TYPE_CHECKING:
    from ..claims.result import Evidence


def evidence_text(found: Evidence, page: str = "") -> str:
    """Return the table as plain text, or a page: "md" for Markdown, "html" for HTML."""
    pages = {"md": markdown, "html": evidence_page}
    return pages[page](found) if page else plain(evidence_table(found))


def evidence_page(found: Evidence) -> str:
    """Return the page as text. It needs no network, and its policy allows none."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("slashpatch.reporting", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    claims = [_claim(found, claim.number) for claim in CLAIMS]
    for claim in claims:
        number, name = claim["number"], claim["name"]
        if claim["tests"]:
            label = f"Tests of claim {number}, {name}, each with its interval and threshold."
            claim["picture"] = Markup(
                inline_svg(lambda n=number: evidence_figure(found, [n]), label)  # type: ignore[misc]
            )
    return environment.get_template("evidence.html.j2").render(
        title=title_of(found),
        claims=claims,
        note=NOTE,
        prompts=prompts_line(found),
        sources=sources_of(found),
    )


def _claim(found: Evidence, number: int) -> dict[str, Any]:
    claim = CLAIMS[number - 1]
    came, why = found.verdict(number)
    return {
        "number": number,
        "name": claim.name,
        "says": claim.says,
        "verdict": came,
        "mark": MARKS[came],
        "style": _style(came),
        "why": printable(why),
        "picture": "",
        "tests": [_test(test) for test in found.of_claim(number)],
    }


def _test(test: Any) -> dict[str, Any]:
    came, why = outcome(test)
    rule = RULES[test.test]
    return {
        "name": test.test,
        "question": rule.question,
        "estimate": interval_text(test),
        "rule": str(rule),
        "against": control_text(test),
        "needed": rule.needed,
        "outcome": came,
        "mark": MARKS[came],
        "style": _style(came),
        "why": printable(why),
        "detail": printable(test.detail),
        "n": test.n,
    }


def _style(came: str) -> str:
    """Return the class of an outcome in the page's style sheet."""
    return {SUPPORTED: "yes", CONTRADICTED: "no", REPORTED: "dim"}.get(came, "open")
