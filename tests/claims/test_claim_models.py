"""The hand-built models have the properties that their docstrings list, by other functions.

A model's properties are one row: which of them hold is compared with what it was built for.
"""

import functools

import pytest

import slashpatch as sp
from slashpatch.errors import ControlError

from .. import claim_models
from ..claim_models import INDUCTION, SLASH, SLASH_TWO, SPARE, WEAK_SLASH

SIZES = {"n_prompts": 4, "max_tokens": 128}
#: Strength at which a planted slash is about as sharp as the wired ones.
STRENGTH = 100.0
BOTH = (SLASH, WEAK_SLASH)
WIRED = {(*SLASH, 1), (*WEAK_SLASH, 1), (*SLASH_TWO, 2)}
#: What is true of `true_model`.
ALL = {
    "on random tokens",
    "r1 above others",
    "rank one keeps",
    "high carries",
    "medium carries",
    "low does not",
    "means predict",
    "axis makes it",
    "copies",
    "copying needs it",
    "text needs it",
    "moves",
    "planting restores",
}


@functools.cache
def scans(name, *args):
    """A model, scans of natural text and of random tokens."""
    model = getattr(claim_models, name)(*args)
    random = sp.scan(model, random_tokens=True, moments=False, **SIZES)
    return model, sp.scan(model, **SIZES), random


def slashes(scan):
    """Heads and offsets above κ."""
    return {(entry.head.layer, entry.head.head, entry.offset) for entry in scan.slash_heads()}


def copying(model, *edits):
    """Loss on the second copy, and how often lags 1 and 2 are copied, under edits."""
    with sp.patch(model, *edits):
        loss = float(sp.copying_losses(model, 4, 60).mean())
        return loss, *sp.copied_lags(model, (1, 2), 4, 60).mean(0).tolist()


def conditions(name, args, heads):
    """Which properties of slashes and their making hold for these (layer, head, offset)."""
    model, natural, control = scans(name, *args)
    scores, random = ([float(scan.scores[at]) for at in heads] for scan in (natural, control))
    found = {"on random tokens"} if min(random) > 0.9 * min(scores) else set()
    table = natural.rank_one.set_index(["layer", "head"])[["r1_q", "r1_k"]]
    chosen = [(layer, head) for layer, head, _ in heads]
    layers = {layer for layer, _ in chosen}
    others = table.drop(chosen + list(INDUCTION)).loc[list(layers)]
    if (table.loc[chosen].mean() > others.mean() + 0.1).all():
        found.add("r1 above others")
    why = sp.explain_all(model, chosen, **SIZES)
    shares = why.filter(regex="drop_|rank_one_qk").div(why["score"], axis=0)
    tests = {
        "rank one keeps": shares["rank_one_qk"] > 0.9,
        "high carries": shares["drop_high"] < 0.5,
        "medium carries": shares["drop_medium"] < 0.8,
        "low does not": shares["drop_low"] > 0.9,
        "means predict": (why["correlation"] > 0.95)
        & (why["predicted_peak"] == [offset for *_, offset in heads]),
    }
    found |= {test for test, holds in tests.items() if holds.all()}
    with no_axis(model, layers):
        left = sp.scan(model, moments=False, **SIZES).scores
    if max(float(left[at]) for at in heads) < 0.5 * min(scores):
        found.add("axis makes it")
    return found


class no_axis:
    """Remove the mean of the attention's inputs from them, in these layers, for q and k."""

    def __init__(self, model, layers):
        self.handles = []
        for layer in layers:
            attention = model.blocks[layer].attn
            self.handles += [
                part.original_component.register_forward_pre_hook(self.remove)
                for part in (attention.q, attention.k)
            ]

    @staticmethod
    def remove(_, args):
        x = args[0]
        axis = x.mean((0, 1), keepdim=True)
        axis = axis / axis.norm()
        return (x - (x * axis).sum(-1, keepdim=True) * axis,)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def effects(name, args, heads, spare):
    """Which effects of slashes at Δ = 1 on copying and on natural text hold."""
    model = scans(name, *args)[0]
    loss, one, two = copying(model)
    knocked = copying(model, sp.KnockOut(heads, 1))
    moved = copying(model, sp.ShiftSlash(heads, 1))
    planted = copying(model, sp.KnockOut(heads, 1), sp.PlantSlash(spare, 1, STRENGTH))
    found = sp.measure(
        model, sp.KnockOut(heads, 1), "loss", n_prompts=8, controls="matched-heads:8"
    )
    row = found.frame.query("against == 'clean'").iloc[0]
    tests = {
        "copies": loss < 3.5 and one > 0.45 and two < 0.05,
        "copying needs it": knocked[0] > loss + 3 and knocked[1] < 0.05,
        "moves": moved[1] < 0.05 and moved[2] > 0.5,
        "planting restores": planted[0] < loss + 0.5 * (knocked[0] - loss)
        and planted[1] > knocked[1] + 0.25,
        "text needs it": row["low"] > 0.05
        and row["effect"] > 5 * found.tables["draws"]["effect"].abs().max(),
    }
    return {test for test, holds in tests.items() if holds}


CONTENT = {
    "rank one keeps", "medium carries", "means predict", "axis makes it", "moves",
}  # fmt: skip
UNREAD = {"copying needs it", "text needs it", "moves", "planting restores"}
#: Model, arguments, its slashes, and what is not true of it.
EXHAUSTIVE = pytest.mark.exhaustive
CASES = [
    ("true_model", (), WIRED, set()),
    ("content_slash_model", (), {(*WEAK_SLASH, 1)}, CONTENT | {"r1 above others"}),
    ("content_slash_model", (True,), {(*WEAK_SLASH, 1)}, CONTENT),
    ("several_directions_model", (), WIRED, {"rank one keeps"}),
    ("equal_rank_model", (), WIRED, {"r1 above others"}),
    ("low_frequency_model", (), WIRED, {"high carries", "medium carries", "low does not"}),
    ("no_cone_model", (), WIRED, {"axis makes it"}),
    ("unread_model", (False,), WIRED, UNREAD | {"copies"}),
    ("unread_model", (True,), WIRED, UNREAD),
    ("unmovable_model", (), {(*SLASH, 1)}, {"moves"}),
    ("unrestorable_model", (), WIRED, {"planting restores"}),
]


#: Models that the fast tests run; the long tier runs all.
FAST = ("true_model", "content_slash_model", "low_frequency_model", "no_cone_model")


@pytest.mark.parametrize(
    ("name", "args", "expected", "false"),
    [
        pytest.param(*case, marks=() if case[0] in FAST and case[1] == () else EXHAUSTIVE)
        for case in CASES
    ],
)
def test_models_are_as_built(name, args, expected, false):
    _, natural, _ = scans(name, *args)
    assert slashes(natural) == expected
    assert min(float(natural.scores[at]) for at in expected) > 0.7
    heads = sorted(expected)
    found = conditions(name, args, heads)
    of_one = [(layer, head) for layer, head, offset in heads if offset == 1]
    found |= effects(name, args, of_one, SPARE)
    assert found == ALL - false


def test_a_model_with_slashes_on_natural_text_only():
    model, natural, control = scans("natural_only_model")
    on_text = {slash for slash in slashes(natural) if slash[2]}
    assert on_text >= WIRED
    assert not on_text & slashes(control)
    held = conditions("natural_only_model", (), sorted(WIRED))
    assert {"r1 above others", "rank one keeps", "high carries", "means predict"} <= held
    effect = effects("natural_only_model", (), BOTH, SPARE)
    assert effect == {"text needs it", "planting restores"}
    assert copying(model)[0] > 7 > 4 > copying(model, sp.PlantSlash(SPARE, 1, STRENGTH))[0]


def test_models_that_do_not_copy():
    _, natural, _ = scans("not_copying_model")
    assert slashes(natural) == WIRED
    assert effects("not_copying_model", (), BOTH, SPARE) == {"text needs it"}
    model, natural, _ = scans("delta_zero_model")
    assert slashes(natural) == {(*head, 0) for head in (*BOTH, SLASH_TWO)}
    assert copying(model)[0] > 7


def test_a_model_without_heads_to_compare():
    model, natural, control = scans("two_heads_model")
    assert slashes(natural) - {(1, 0, 0)} == slashes(control) - {(1, 0, 0)} == {(0, 0, 1)}
    loss, one, _ = copying(model)
    assert loss < 3
    assert one > 0.55
    assert copying(model, sp.KnockOut("L0H0", 1))[0] > 6
    assert copying(model, sp.ShiftSlash("L0H0", 1))[2] > 0.55
    for control in ("random-heads:19", "matched-heads:19"):
        with pytest.raises(ControlError, match="cannot be drawn"):
            sp.measure(model, sp.KnockOut("L0H0", 1), "copying", controls=control, n_prompts=2)


def test_gpt2_with_slashes_by_position():
    model, natural, control = scans("gpt2_slash_model")
    assert slashes(natural) == slashes(control) == {(0, 1, 1), (0, 2, 1)}
    why = sp.explain_all(model, ["L0H1", "L0H2"], **SIZES)
    assert set(why["verdict"]) == {"content-made"}
    assert (why["rank_one_qk"] < 0.2 * why["score"]).all()
    assert (why[["r1_q", "r1_k"]] < 0.3).all(axis=None)
    loss, one, _ = copying(model)
    assert loss < 3
    assert one > 0.55
    assert copying(model, sp.KnockOut(["L0H1", "L0H2"], 1))[0] > 6


@pytest.mark.parametrize("name", ["random_model", "gpt2_model"])
def test_random_weights_have_no_slashes(name):
    model, natural, control = scans(name)
    assert not slashes(natural) | slashes(control)
    assert copying(model)[0] > 6


def test_shuffled_queries_and_keys():
    model = claim_models.true_model()
    shuffled = claim_models.shuffled_model(model)
    scores = sp.scan(shuffled, moments=False, **SIZES).scores
    assert scores.max() < 0.4
    assert scores[..., 1:].max() < 0.2
    assert copying(shuffled)[0] > 6
    assert copying(model)[0] < 3  # the given model stays as it was
    for block, other in zip(model.blocks, shuffled.blocks, strict=True):
        for part in ("q", "k"):
            one, two = (
                getattr(b.attn, part).original_component.weight.view(8, -1) for b in (block, other)
            )
            assert not one.equal(two)
            assert one.sort(1).values.equal(two.sort(1).values)
