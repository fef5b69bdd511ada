import pandas as pd
import pytest
import torch

import slashpatch as sp
from slashpatch.errors import OffsetError, PromptError

from ..planted import reading_model
from ..tiny import random_tokens

SMALL = {
    "offsets": range(7),
    "random_tokens": True,
    "n_prompts": 10,
    "max_tokens": 24,
    "n_replaced": 6,
}


@pytest.fixture(scope="module")
def near():
    return reading_model(1)


@pytest.fixture(scope="module")
def both():
    return reading_model(1, 3)


def curve(found, edit="clean", column="flow"):
    rows = found.frame[found.frame["edit"] == edit]
    return rows.set_index("offset")[column]


def test_flow_by_definition(tiny):
    """Compared with one forward pass per replaced token, where all tokens are replaced."""
    tokens = random_tokens(2, 9)
    found = sp.flow(tiny, tokens, offsets=[0, 2, 5], n_replaced=99)
    assert found.provenance["n_replaced"] == [3, 3]
    by_batch = sp.flow(tiny, tokens, offsets=[0, 2, 5], n_replaced=99, batch_size=2)
    pd.testing.assert_frame_equal(found.frame, by_batch.frame, atol=1e-6, rtol=1e-4)
    from slashpatch.data.prompts import PromptSet
    from slashpatch.effects.flow import _replace_tokens

    sums = torch.zeros(3, dtype=torch.float64)
    for prompt in range(2):
        one = _replace_tokens(PromptSet(tuple(tokens), ""), prompt, 5, 99, 0)
        assert one.positions.tolist() == [1, 2, 3]
        for row, place in zip(one.tokens[1:], one.positions.tolist(), strict=True):
            assert (row != tokens[prompt]).nonzero()[:, 0].tolist() == [place]
            with torch.no_grad():
                p, q = (tiny(t[None])[0].double().log_softmax(-1) for t in (tokens[prompt], row))
            kl = (p.exp() * (p - q)).sum(-1)
            sums += kl[torch.tensor([place, place + 2, place + 5])]
    assert curve(found).tolist() == pytest.approx((sums / 6).tolist(), rel=1e-3, abs=1e-6)


def test_planted_offsets_are_found(both):
    flow = curve(sp.flow(both, **SMALL))
    assert flow[[1, 3]].min() > 1
    assert flow.drop([1, 3]).max() < 0.01


def test_removing_a_slash_lowers_the_flow_there_alone(near):
    own, other = (f"KnockOut(L0H{head}, offsets=1, renormalize=False)" for head in (0, 2))
    found = sp.flow(near, edits=[own, other], **SMALL)
    edited = curve(found, own)
    assert curve(found)[1] > 1
    assert edited[1] < 0.01
    effect = curve(found, own, "effect")
    assert effect.drop(1).abs().max() < 0.01 * curve(found)[1]
    assert found.remarks[0].startswith(f"{own}: lowers the flow at Δ = 1 (adjusted")
    assert "at no offset; not at Δ = 1, which it edits" in found.remarks[1]


def test_the_report_says_where_else_it_changes(both):
    """Two heads share one softmax over tokens: without the far head, the near head decides more.

    A head whose row is renormalised attends to the neighbouring tokens instead.
    """
    (remark,) = sp.flow(both, edits="KnockOut(L0H2, 3)", **SMALL).remarks
    assert "lowers the flow at Δ = 3" in remark
    assert "raises the flow at Δ = 1" in remark
    assert "it does not edit Δ = 1" in remark


def test_what_an_edit_keeps_is_not_what_it_edits(both):
    (keep,) = sp.flow(both, edits="KeepOnly(L0H2, 3)", **SMALL).remarks
    assert "Δ = 3, which it edits" not in keep
    from slashpatch.effects.flow import _edited_offsets
    from slashpatch.effects.running.conditions import conditions

    def aimed(*edits):
        return _edited_offsets(conditions([list(edits)])[0], set(range(5)))

    assert aimed("KeepOnly(L0H2, 3)") == {0, 1, 2, 4}
    assert aimed("KnockOut(L0H2, 3)") == aimed("KnockOut(L0H2, 3, renormalize=False)") == {3}
    assert aimed("KnockOut(L0H2, 3)", "KnockOut(L0H2, 1)") == {1, 3}
    assert aimed("ScaleOffsets(L0H2, 3, factor=1)") == set()
    assert aimed("KnockOut(L0H2, 3)", "AblateHeads(L0H0)") is None


def test_few_prompts_say_nothing(near):
    for n in (1, 5):
        found = sp.flow(near, edits="KnockOut(L0H0, 1)", **{**SMALL, "n_prompts": n})
        assert f"{n} prompts are too few to tell one changed offset among 7" in found.remarks[0]
        assert "too few for intervals and p-values, which need at least 6" in found.remarks[1]
        assert found.frame[["flow_low", "low", "p", "q"]].isna().all(axis=None)


def test_moved_slashes_move_the_flow(near):
    found = sp.flow(near, edits="ShiftSlash(L0H0, by=3)", **SMALL)
    moved = curve(found, "ShiftSlash(L0H0, by=3)")
    assert moved.idxmax() == 4
    assert moved[1] < 0.01


def test_equal_seeds_give_equal_results(tiny):
    def run(seed):
        return sp.flow(tiny, offsets=[1, 2], n_prompts=2, max_tokens=9, seed=seed).frame

    pd.testing.assert_frame_equal(run(1), run(1))
    assert not run(1)["flow"].equals(run(2)["flow"])


@pytest.mark.usefixtures("unchecked")
def test_bad_input(tiny):
    for wrong, error, said in (
        ({"prompts": random_tokens(2, 9), "offsets": [8]}, PromptError, "need at least 10"),
        ({"prompts": torch.full((2, 9), 5), "offsets": [1]}, PromptError, "one and the same token"),
        ({"offsets": [-1]}, OffsetError, "an offset is an integer from 0"),
        (
            {"offsets": [1], "n_replaced": 1.5},
            PromptError,
            "n_replaced must be an integer of at least 1",
        ),
        (
            {"offsets": [1], "n_replaced": 0},
            PromptError,
            "n_replaced must be an integer of at least 1",
        ),
    ):
        with pytest.raises(error, match=said):
            sp.flow(tiny, **wrong)
