"""The hand-built models have the properties that their docstrings list, by other functions."""

import functools

import pytest
import torch

import slashpatch as sp

from .. import claim_models
from ..claim_models import SLASH, SLASH_TWO, SPARE, WEAK_SLASH

SIZES = {"n_prompts": 4, "max_tokens": 192}
#: Strength at which a planted slash is as sharp as the wired ones.
STRENGTH = 100.0


@functools.cache
def scans(model):
    """Scans of natural text and of random tokens."""
    return sp.scan(model, **SIZES), sp.scan(model, random_tokens=True, moments=False, **SIZES)


def slashes(model):
    """Heads and offsets above κ on natural text, with scores on it and on random tokens."""
    natural, control = scans(model)
    return {
        (entry.head.layer, entry.head.head, entry.offset): (
            entry.score,
            float(control.scores[entry.head.layer, entry.head.head, entry.offset]),
        )
        for entry in natural.slash_heads()
    }


def r1(model):
    """r1 of Q and K: least of the slash heads at Δ ≥ 1, and largest mean of the others."""
    table = scans(model)[0].rank_one
    found = {(layer, head) for layer, head, offset in slashes(model) if offset}
    is_slash = [(row.layer, row.head) in found for row in table.itertuples()]
    both = table[["r1_q", "r1_k"]]
    of_layers = table["layer"].isin({layer for layer, _ in found})
    others = both[of_layers & ~torch.tensor(is_slash).numpy()]
    return float(both[is_slash].min().min()), float(others.mean().max())


@functools.cache
def explained(model, head):
    """Why a head is a slash head."""
    return sp.explain(model, head, **SIZES)


def copying(model, *edits):
    """Loss on the second copy and how often lags 1 and 2 are copied, under edits."""
    with sp.patch(model, *edits):
        loss = float(sp.copying_losses(model, 4, 60).mean())
        return [loss, *sp.copied_lags(model, (1, 2), 4, 60).mean(0).tolist()]


def natural_effects(model, edit, metric="loss"):
    """Effect of an edit on natural text, and the largest of 19 matched heads'."""
    found = sp.measure(model, edit, metric, n_prompts=8, controls="matched-heads:19")
    clean = found.frame.query("against == 'clean'")["effect"].item()
    return clean, float(found.tables["draws"]["effect"].abs().max())


def read_by_copying(model, heads):
    """Check that the slash at Δ = 1 passes information, and that planting one restores it."""
    loss, one, two = copying(model)
    assert loss < 3
    assert one > 0.55
    assert two < 0.05
    knocked = copying(model, sp.KnockOut(heads, 1))
    assert knocked[0] > 7
    assert knocked[1] < 0.05
    planted = copying(model, sp.KnockOut(heads, 1), sp.PlantSlash(SPARE, 1, STRENGTH))
    assert planted[0] < loss + 0.5 * (knocked[0] - loss)
    assert planted[1] > 0.3
    effect, of_others = natural_effects(model, sp.KnockOut(heads, 1))
    assert effect > 0.3
    assert effect > 5 * of_others


def moves(model, heads):
    """Check that shifting the slash moves copying from lag 1 to lag 2."""
    _, one, two = copying(model, sp.ShiftSlash(heads, 1))
    assert one < 0.05
    assert two > 0.5


def explained_by_rope(model, low=False):
    """Check that rank one keeps all slashes, mean q and k predict them, and bands carry them."""
    for head, offset in ((SLASH, 1), (WEAK_SLASH, 1), (SLASH_TWO, 2)):
        why = explained(model, head)
        assert why.verdict == "RoPE-made slash"
        assert why.offset == why.profile.predicted_peak == offset
        assert why.profile.correlation > 0.99
        assert why.rank_one["qk"] > 0.95 * why.natural
        if low:
            assert why.dropped["low"] < 0.1 * why.natural
            assert min(why.dropped["high"], why.dropped["medium"]) > 0.95 * why.natural
        else:
            assert why.dropped["high"] < 0.2 * why.natural
            assert why.dropped["medium"] < 0.65 * why.natural
            assert why.dropped["low"] > 0.95 * why.natural


def as_wired(model):
    """Check that the three wired slashes are there, and no other."""
    found = slashes(model)
    assert set(found) == {(*SLASH, 1), (*WEAK_SLASH, 1), (*SLASH_TWO, 2)}
    for natural, control in found.values():
        assert natural > 0.7
        assert abs(natural - control) < 0.05


def test_true_model():
    model = claim_models.true_model()
    as_wired(model)
    least, others = r1(model)
    assert least > 0.9 > 0.5 > others
    explained_by_rope(model)
    read_by_copying(model, [SLASH, WEAK_SLASH])
    moves(model, [SLASH, WEAK_SLASH])


def test_content_slash_model():
    model = claim_models.content_slash_model()
    found = slashes(model)
    assert set(found) == {(*WEAK_SLASH, 1)}
    assert min(found[(*WEAK_SLASH, 1)]) > 0.9
    least, others = r1(model)
    assert least < others < 0.5
    why = explained(model, WEAK_SLASH)
    assert why.verdict == "content-made"
    assert why.rank_one["qk"] < 0.2
    assert why.profile.correlation < 0.6
    assert why.dropped["high"] < 0.5 * why.natural
    assert why.dropped["low"] > 0.95 * why.natural
    with sp.patch(model, sp.DropBand(WEAK_SLASH, "high+medium")):
        scores = sp.scan(model, moments=False, **SIZES).scores
    assert scores[(*WEAK_SLASH, 1)] < 0.1
    read_by_copying(model, [WEAK_SLASH])
    _, one, two = copying(model, sp.ShiftSlash(WEAK_SLASH, 1))
    assert one > 0.5
    assert two < 0.05


def test_low_frequency_model():
    model = claim_models.low_frequency_model()
    as_wired(model)
    least, others = r1(model)
    assert least > 0.9 > 0.5 > others
    explained_by_rope(model, low=True)
    read_by_copying(model, [SLASH, WEAK_SLASH])
    moves(model, [SLASH, WEAK_SLASH])


@pytest.mark.parametrize("copies", [False, True])
def test_unread_model(copies):
    model = claim_models.unread_model(copies)
    as_wired(model)
    least, others = r1(model)
    assert least > 0.9 > 0.5 > others
    explained_by_rope(model)
    loss, one, _ = copying(model)
    assert (loss < 3) == (one > 0.55) == copies
    for edit in (sp.KnockOut, sp.ShiftSlash):
        edited = copying(model, edit([SLASH, WEAK_SLASH], 1))
        assert edited[0] == pytest.approx(loss, abs=0.05)
        assert edited[1] == pytest.approx(one, abs=0.05)
    effect, of_others = natural_effects(model, sp.KnockOut([SLASH, WEAK_SLASH], 1), "kl")
    assert effect < min(0.003, 0.5 * of_others)
