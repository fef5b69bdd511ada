"""Verdicts follow from the numbers and the rules, and can come out in three ways."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slashpatch.claims.measured import Measured
from slashpatch.claims.rules import CLAIMS, LEVEL, RULES, rules_of
from slashpatch.claims.verdicts import (
    CANNOT_TELL,
    CONTRADICTED,
    REPORTED,
    SUPPORTED,
    outcome,
    verdict,
)

NEEDED = [name for name, rule in RULES.items() if rule.needed]


def measured(name, came):
    """Numbers by which a test has this outcome."""
    rule = RULES[name]
    side = 1 if rule.above else -1
    near, far = {SUPPORTED: (0.1, 0.3), CONTRADICTED: (-0.3, -0.1), CANNOT_TELL: (-0.1, 0.1)}[came]
    ends = sorted((rule.threshold + side * near, rule.threshold + side * far))
    control = {"control": 0.0, "draws": 19, "p_rank": 0.05} if rule.control else {}
    return Measured(name, sum(ends) / 2, *ends, n=16, **control)


def test_each_claim_has_a_test_that_it_needs_and_each_test_a_claim():
    assert {rule.claim for rule in RULES.values()} == {claim.number for claim in CLAIMS}
    assert [claim.number for claim in CLAIMS] == list(range(1, 10))
    for claim in CLAIMS:
        assert any(RULES[name].needed for name in rules_of(claim.number))


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("came", [SUPPORTED, CONTRADICTED, CANNOT_TELL])
def test_each_test_can_come_out_in_three_ways(name, came):
    assert outcome(measured(name, came))[0] == came


@given(st.data())
def test_a_claim_needs_all_its_tests(data):
    claim = data.draw(st.sampled_from(CLAIMS)).number
    needed = [name for name in rules_of(claim) if RULES[name].needed]
    outcomes = st.sampled_from([SUPPORTED, CONTRADICTED, CANNOT_TELL])
    came = {name: data.draw(outcomes) for name in needed}
    found, why = verdict(claim, [measured(name, of) for name, of in came.items()])
    expected = (
        CONTRADICTED
        if CONTRADICTED in came.values()
        else SUPPORTED
        if set(came.values()) == {SUPPORTED}
        else CANNOT_TELL
    )
    assert found == expected
    assert bool(why) == (found != SUPPORTED)
    against = [name for name, of in came.items() if of == CONTRADICTED]
    assert all(name in why for name in against)


@given(st.floats(-2, 2), st.floats(0, 2), st.sampled_from(NEEDED))
def test_the_whole_interval_decides(low, width, name):
    rule = RULES[name]
    control = {"draws": 19, "p_rank": 0.05} if rule.control else {}
    came, _ = outcome(Measured(name, low + width / 2, low, low + width, 16, **control))
    inside = low > rule.threshold if rule.above else low + width < rule.threshold
    outside = low + width <= rule.threshold if rule.above else low >= rule.threshold
    assert came == (SUPPORTED if inside else CONTRADICTED if outside else CANNOT_TELL)


def test_missing_tests_leave_a_claim_open():
    for claim in CLAIMS:
        came, why = verdict(claim.number, [])
        assert came == CANNOT_TELL
        assert "not measured" in why


@pytest.mark.parametrize("name", [name for name in NEEDED if RULES[name].ranked])
def test_few_draws_and_draws_that_do_as_much_are_no_support(name):
    test = measured(name, SUPPORTED)
    few = dataclasses.replace(test, draws=9, p_rank=0.1)
    assert outcome(few) == (
        CANNOT_TELL,
        f"9 draws of the control are too few for rank p ≤ {LEVEL:g}",
    )
    came, why = outcome(dataclasses.replace(test, p_rank=0.2))
    assert came == CANNOT_TELL
    assert "some draws of the control do as much" in why


def test_without_an_interval_or_a_number_we_cannot_tell():
    nan = float("nan")
    assert outcome(Measured("rank one", 0.9, nan, nan, 4)) == (
        CANNOT_TELL,
        "4 prompts are too few for an interval",
    )
    assert outcome(Measured("rank one", why_not="no RoPE")) == (CANNOT_TELL, "no RoPE")


def test_a_test_that_is_reported_only_decides_nothing():
    reported = [name for name, rule in RULES.items() if not rule.needed]
    assert reported
    for name in reported:
        assert outcome(Measured(name, 0.0, -1.0, -0.5, 16)) == (REPORTED, "")
        claim = RULES[name].claim
        others = [measured(n, SUPPORTED) for n in rules_of(claim) if RULES[n].needed]
        assert verdict(claim, [*others, Measured(name, 0.0, -1.0, -0.5, 16)])[0] == SUPPORTED


@pytest.mark.parametrize(
    ("numbers", "why"),
    [
        ({"estimate": 0.5, "n": 4}, "4 prompts are too few"),
        ({"estimate": 0.5, "n": 16}, "what it is a share of may be zero"),
        ({"estimate": float("inf"), "n": 16}, "not a finite number"),
        ({"n": 16}, "not a finite number"),
    ],
)
def test_why_there_is_no_interval(numbers, why):
    came, reason = outcome(Measured("rank one", **numbers))
    assert came == CANNOT_TELL
    assert why in reason
    draws = Measured("axis beyond random directions", 0.5, n=16, draws=3, p_rank=0.25)
    assert outcome(draws) == (CANNOT_TELL, "3 draws are too few for an interval")


@pytest.mark.parametrize("claim", [claim.number for claim in CLAIMS[1:]])
def test_nothing_is_said_of_slash_heads_that_are_none(claim):
    """With random weights a head may reach κ by chance and its weak line be of high frequencies."""
    of = [measured(name, SUPPORTED) for name in rules_of(claim) if RULES[name].needed]
    assert verdict(claim, [measured("score", SUPPORTED), *of])[0] == SUPPORTED
    came, why = verdict(claim, [measured("score", CONTRADICTED), *of])
    assert came == CANNOT_TELL
    assert "claim 1" in why
