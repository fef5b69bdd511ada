"""Verdicts of tests and claims, from what was measured and the rules."""

from __future__ import annotations

import math

from ..maths.resampling import LEAST
from .measured import Measured
from .rules import LEVEL, RULES

SUPPORTED, CONTRADICTED, CANNOT_TELL = "supported", "contradicted", "cannot tell"
VERDICTS = (SUPPORTED, CONTRADICTED, CANNOT_TELL)
#: The outcome of a test that no claim needs.
REPORTED = "reported"
#: Why claims 2 to 9 are open where claim 1 finds that no head is a slash head.
NO_SLASH_HEADS = "no slash heads, by claim 1"


def outcome(measured: Measured) -> tuple[str, str]:
    """Return a test's outcome by its rule, and why if we cannot tell."""
    rule = RULES[measured.test]
    if measured.why_not:
        return CANNOT_TELL, measured.why_not
    if not rule.needed:
        return REPORTED, ""
    if math.isnan(measured.low) or math.isnan(measured.high):
        return CANNOT_TELL, _no_interval(measured)
    sign = 1 if rule.above else -1
    ends = sorted((sign * measured.low, sign * measured.high))
    if ends[1] <= sign * rule.threshold:
        return CONTRADICTED, ""
    if ends[0] <= sign * rule.threshold:
        return CANNOT_TELL, f"the interval includes {rule.threshold:g}"
    if rule.ranked and measured.p_rank > LEVEL + 1e-9:
        few = 1 / (1 + measured.draws) > LEVEL + 1e-9
        reason = (
            f"{measured.draws} draws of the control are too few for rank p ≤ {LEVEL:g}"
            if few
            else f"rank p {measured.p_rank:.2g}: some draws of the control do as much"
        )
        return CANNOT_TELL, reason
    return SUPPORTED, ""


def _no_interval(measured: Measured) -> str:
    """Return why a test has no interval."""
    if not math.isfinite(measured.estimate):
        return "it is not a finite number"
    if measured.n < LEAST:
        return f"{measured.n} prompts are too few for an interval"
    if RULES[measured.test].control and measured.draws < LEAST:
        return f"{measured.draws} draws are too few for an interval"
    return "what it is a share of may be zero"


def verdict(claim: int, tests: list[Measured]) -> tuple[str, str]:
    """Return a claim's verdict from the tests, and what it rests on in words.

    Without slash heads (the score of claim 1 is contradicted), nothing can be said of them.
    """
    scores = [outcome(test)[0] for test in tests if test.test == "score"]
    if claim != 1 and scores == [CONTRADICTED]:
        return CANNOT_TELL, NO_SLASH_HEADS
    needed = {name for name, rule in RULES.items() if rule.claim == claim and rule.needed}
    found = {test.test: outcome(test) for test in tests if test.test in needed}
    against = [name for name, (came, _) in found.items() if came == CONTRADICTED]
    if against:
        return CONTRADICTED, f"against it: {', '.join(against)}"
    open_ones = {
        name: found[name][1] if name in found else "not measured"
        for name in RULES
        if name in needed and found.get(name, (CANNOT_TELL, ""))[0] != SUPPORTED
    }
    if not open_ones:
        return SUPPORTED, ""
    by_reason: dict[str, list[str]] = {}
    for name, why in open_ones.items():
        by_reason.setdefault(why, []).append(name)
    if len(by_reason) == 1 and len(open_ones) == len(needed):
        return CANNOT_TELL, next(iter(by_reason))
    return CANNOT_TELL, "; ".join(f"{', '.join(names)}: {why}" for why, names in by_reason.items())
