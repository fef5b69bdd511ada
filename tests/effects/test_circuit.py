"""circuit(): faithfulness, completeness and minimality, where the circuit is known."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slashpatch as sp
from slashpatch import bridge
from slashpatch.data.heads import Head
from slashpatch.effects.sets.members import (
    Member,
    as_members,
    keeping,
    random_sets,
    random_subsets,
    without,
)
from slashpatch.errors import EditError, HeadError, OffsetError, PromptError, SweepError

from ..planted import induction_model
from ..tiny import random_tokens, tiny_model

SIZES = {"n_prompts": 6, "max_tokens": 25}


@pytest.fixture(scope="module")
def planted():
    return induction_model()


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


def shares(result):
    """{(what, member): share}."""
    rows = result.frame.to_dict(orient="records")
    return {(row["what"], row["member"]): row["share"] for row in rows}


@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
def test_the_known_circuit_is_faithful_complete_and_minimal(planted, mode):
    result = sp.circuit(planted, "L0H0, L1H2", mode=mode, **SIZES)
    found = shares(result)
    assert found["faithfulness", ""] == pytest.approx(1, abs=0.05)
    assert abs(found["left without", ""]) < 0.25
    assert found["incompleteness", ""] < 0.3
    for member in ("L0H0", "L1H2"):
        assert found["minimality", member] > 0.6
    # All 15 other sets of one head in each layer are less faithful.
    assert len(result.tables["random_sets"]) == 15
    assert result.tables["random_sets"]["share"].max() < 0.5
    rank = result.frame.set_index("what").loc["faithfulness", "p_rank"]
    assert rank == 1 / 16
    assert any("15 random sets" in remark for remark in result.remarks)


def test_the_known_diagonals(planted):
    found = shares(sp.circuit(planted, [("L0H0", 1), "L1H2"], mode="zero", **SIZES))
    assert found["faithfulness", ""] == pytest.approx(1, abs=0.1)
    assert found["minimality", "L0H0@1"] > 0.6
    other = shares(sp.circuit(planted, "L0H0@2, L1H2", mode="zero", **SIZES))
    assert other["faithfulness", ""] < 0.3
    assert abs(other["minimality", "L0H0@2"]) < 0.3


def test_another_set_is_not(planted):
    found = shares(sp.circuit(planted, "L0H1, L1H3", **SIZES))
    assert abs(found["faithfulness", ""]) < 0.1
    assert found["left without", ""] == pytest.approx(1, abs=0.1)


def test_no_rank_without_a_share(tiny):
    """Where all heads together change nothing, no set is better than another."""
    result = sp.circuit(tiny, "L0H0", lambda logits, tokens: logits[:, 0, 0] * 0 + 1.0, **SIZES)
    row = result.frame.set_index("what").loc["faithfulness"]
    assert math.isnan(row["share"])
    assert math.isnan(row["p_rank"])


def test_a_member_that_does_nothing_is_seen(planted):
    found = shares(sp.circuit(planted, "L0H0, L1H2, L0H3", **SIZES))
    assert found["faithfulness", ""] == pytest.approx(1, abs=0.05)
    assert abs(found["minimality", "L0H3"]) < 0.05


def test_all_heads_are_the_whole_model(tiny):
    result = sp.circuit(tiny, "L0, L1", "kl", random_tokens(6, 12))
    rows = result.frame.set_index("what")
    assert (rows.loc["faithfulness", ["share", "low", "high"]] == 1).all()
    assert rows.loc["left without", "share"] == 0
    assert "random sets" not in rows.index
    assert math.isnan(rows.loc["faithfulness", "p_rank"])


def test_shares_are_those_of_runs_under_patches(tiny):
    tokens = random_tokens(5, 14)
    members = ["L0H1", "L1H2"]
    every = [f"L{layer}H{head}" for layer in (0, 1) for head in range(4)]

    def mean(*heads):
        edit = sp.AblateHeads(list(heads), "mean")
        return float(sp.measure(tiny, edit, "kl", tokens).frame["edited"].iloc[0])

    def share(*ablated):
        return (mean(*ablated) - mean(*every)) / (0 - mean(*every))

    found = shares(sp.circuit(tiny, members, "kl", tokens, n_subsets=3))
    rest = [head for head in every if head not in members]
    assert found["faithfulness", ""] == pytest.approx(share(*rest), abs=1e-6)
    assert found["left without", ""] == pytest.approx(share(*members), abs=1e-6)
    drop = share(*rest) - share(*rest, "L0H1")
    assert found["minimality", "L0H1"] == pytest.approx(drop, abs=1e-6)
    each = [abs(share(*rest, one) - share(one)) for one in members]
    assert found["incompleteness", ""] == pytest.approx(sum(each) / 2, abs=1e-6)


def test_optimal_ablation_of_the_rest(planted):
    every = "L0, L1"
    constants = sp.fit_ablation(planted, every, metric="copying", steps=3, max_tokens=25)
    result = sp.circuit(planted, "L0H0, L1H2", mode="optimal", constants=constants, **SIZES)
    assert shares(result)["faithfulness", ""] == pytest.approx(1, abs=0.1)
    with pytest.raises(EditError, match="go together"):
        sp.circuit(planted, "L0H0", mode="optimal", **SIZES)
    few = sp.fit_ablation(planted, "L0", metric="copying", steps=0, max_tokens=25)
    with pytest.raises(EditError, match="not for L1H0"):
        sp.circuit(planted, "L0H0", mode="optimal", constants=few, **SIZES)


def test_a_killed_run_goes_on(tiny, tmp_path, monkeypatch):
    from slashpatch.data.journal import Journal

    path, tokens = tmp_path / "circuit.json", random_tokens(4, 12)
    whole = sp.circuit(tiny, "L0H1, L1H2", "loss", tokens)
    write, written = Journal.write, []

    def stop(self, rows):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(rows)
        write(self, rows)

    monkeypatch.setattr(Journal, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        sp.circuit(tiny, "L0H1, L1H2", "loss", tokens, path=path)
    monkeypatch.setattr(Journal, "write", write)
    with pytest.raises(SweepError, match="another run"):
        sp.circuit(tiny, "L0H1, L1H3", "loss", tokens, path=path, resume=True)
    done = sp.circuit(tiny, "L0H1, L1H2", "loss", tokens, path=path, resume=True)
    assert done.frame.equals(whole.frame)
    assert sp.circuit(tiny, "L0H1, L1H2", "loss", tokens, path=path, resume=True).kind == "circuit"


@pytest.mark.parametrize(
    ("given", "members"),
    [
        ("L1H2, L0H0", ["L0H0", "L1H2"]),
        ("L0H0-1, L0H0", ["L0H0", "L0H1"]),
        ("L1", ["L1H0", "L1H1", "L1H2", "L1H3"]),
        ([(0, 1), (1, 3)], ["L0H1", "L1H3"]),
        ((0, 1), ["L0H1"]),
        (Head(1, 2), ["L1H2"]),
        ("L0H0@1", ["L0H0@1"]),
        ("L1H2, L0H0@0-2", ["L0H0@0", "L0H0@1", "L0H0@2", "L1H2"]),
        ([("L0H0", 1), (Head(1, 2), 0)], ["L0H0@1", "L1H2@0"]),
        ([Head(0, 0), "L1H2@3"], ["L0H0", "L1H2@3"]),
        (Member(Head(0, 0), 1), ["L0H0@1"]),
    ],
)
def test_members(tiny, given, members):
    assert [str(one) for one in as_members(given, bridge.read(tiny))] == members


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("", HeadError, "expected a head"),
        ("@1", EditError, "L16H0@1"),
        ([], EditError, "at least one member"),
        (["L0H0", "L0H0@1"], EditError, "part of L0H0"),
        ("L9H0", HeadError, "L9H0"),
        ("L9H0@1", HeadError, "L9H0"),
        ("L0H0@64", OffsetError, "context"),
        ("L0H0@x", EditError, "L16H0@1"),
        ("L0@1", HeadError, "expected a head"),
        (3.5, HeadError, "head"),
    ],
)
def test_bad_members(tiny, given, error, message):
    with pytest.raises(error, match=message):
        as_members(given, bridge.read(tiny))


@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 12))
def test_sets_and_subsets_are_what_they_say(seed, n_members, n):
    info = bridge.read(tiny_for_sets())
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(8, generator=generator)[:n_members].tolist()
    members = tuple(sorted(Member(Head(at // 4, at % 4), at % 3 - 1) for at in places))
    for drawn in random_sets(members, info, n, seed):
        assert drawn != members
        for layer in (0, 1):
            of_layer = [[m.offset for m in s if m.head.layer == layer] for s in (members, drawn)]
            assert sorted(of_layer[0]) == sorted(of_layer[1])
        assert len({one.head for one in drawn}) == n_members
    subsets = random_subsets(members, n, seed)
    assert len(set(subsets)) == len(subsets) <= n
    assert all(set(subset) <= set(members) and subset for subset in subsets)
    assert n_members == 1 or members not in subsets
    # Nothing is kept and ablated at once, and all heads are one or the other.
    ablation = sp.AblateHeads(info.heads)
    kept, lost = keeping(members, info, ablation), without(members, ablation)
    ablated = {
        head for edit in kept.edits if isinstance(edit, sp.AblateHeads) for head in edit.heads
    }
    assert ablated == {*info.heads} - {one.head for one in members}
    touched = {head for edit in lost.edits for head in edit.heads}
    assert touched == {one.head for one in members}


def tiny_for_sets(made=[]):  # noqa: B006
    if not made:
        made.append(tiny_model())
    return made[0]


def test_few_prompts_are_named_and_not_called_unclear(tiny):
    remarks = sp.circuit(tiny, "L0H0", "kl", random_tokens(4, 12)).remarks
    assert any("4 prompts: too few for intervals" in remark for remark in remarks)
    assert not any("not clearly different" in remark for remark in remarks)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_circuit(tiny):
    tokens = random_tokens(3, 9)
    with pytest.raises(EditError, match="mode must be one of"):
        sp.circuit(tiny, "L0H0", "loss", tokens, mode="gone")
    with pytest.raises(PromptError, match="n_random"):
        sp.circuit(tiny, "L0H0", "loss", tokens, n_random=0)
