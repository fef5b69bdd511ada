import copy
import dataclasses
import json
import math

import pytest
import torch

import slashpatch as sp
from slashpatch.data.files import without_nan
from slashpatch.errors import HeadError, OutputError, ScanError
from slashpatch.explaining.result import verdict
from slashpatch.maths.resampling import halves
from slashpatch.reporting.explanation import sparkline
from slashpatch.scanning.moments import Profile

from ..edits.test_rotary_edits import PLANTED
from ..planted import planted_model
from ..tiny import random_tokens, tiny_model


@pytest.fixture(scope="module")
def planted():
    return planted_model([*PLANTED[:4], None])


def test_planted_heads_are_rope_made(planted):
    frame = sp.explain_all(planted, ["L0H0", "L0H1", "L0H2", "L0H3"], random_tokens(3, 100))
    assert frame.verdict.tolist() == ["RoPE-made slash"] * 4
    assert frame.offset.tolist() == PLANTED[:4]
    assert frame.predicted_peak.tolist() == PLANTED[:4]
    assert (frame.correlation > 0.999).all()
    assert (frame[["r1_q", "r1_k", "cone_q", "cone_k"]] > 0.999).all().all()


@pytest.mark.parametrize("offset", PLANTED)
def test_planted_heads_far_back_are_rope_made(offset):
    model = planted_model(PLANTED)
    head = sp.Head(0, PLANTED.index(offset))
    one = sp.explain(model, head, random_tokens(2, 160), offset=offset)
    assert one.verdict == "RoPE-made slash"
    assert one.profile.predicted_peak == offset


def test_a_head_that_reads_content_is_not(planted):
    one = sp.explain(planted, "L0H4", random_tokens(3, 100), kappa=0.0)
    assert one.verdict != "RoPE-made slash"


def test_scores_under_edits_equal_scans_under_edits():
    """All heads are tried in one pass; each must be as if it had been edited alone."""
    model = tiny_model(seed=1)
    tokens = random_tokens(2, 20)
    heads = ["L0H1", "L1H2", "L1H3"]
    frame = sp.explain_all(model, heads, tokens).set_index("name")
    # The offset is picked on the other half of the prompts.
    measured = [tokens[index] for index in halves(len(tokens), 0)[1]]
    for head in heads:
        offset = int(frame.loc[head, "offset"])
        at = sp.Head.parse(head)
        for label, edit in (
            ("drop_high", sp.DropBand(head, "high")),
            ("freeze_low", sp.FreezeBand(head, "low")),
            ("rank_one_q", sp.RankOne(head, of="q")),
            ("rank_one_qk", sp.RankOne(head)),
        ):
            with sp.patch(model, edit):
                scan = sp.scan(model, measured, [offset], batch_size=1)
            expected = float(scan.scores[at.layer, at.head, 0])
            assert frame.loc[head, label] == pytest.approx(expected, abs=1e-6)


def test_the_report_and_its_json(planted):
    one = sp.explain(planted, "L0H1", random_tokens(2, 60))
    text = str(one)
    assert "L0H1 at Δ=2: RoPE-made slash" in text
    assert "Rule (ours)" in text
    assert "peak 2" in text
    record = json.loads(json.dumps(one.to_dict()))
    assert record["profile"]["predicted_peak"] == 2
    assert set(record["score_with_band_dropped"]) == {"high", "medium", "low"}


def test_explaining_another_offset(planted):
    one = sp.explain(planted, "L0H1", random_tokens(2, 60), offset=9)
    assert (one.offset, one.verdict) == (9, "neither")


def test_a_model_without_rope_is_explained_as_far_as_it_goes():
    one = sp.explain(gpt2(), "L1H2", random_tokens(2, 30), kappa=0.0)
    assert one.profile is None
    assert one.dropped == {}
    assert one.verdict in ("content-made", "neither")
    assert "no RoPE" in str(one)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    from ..tiny import bridge

    config = GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return bridge(GPT2LMHeadModel(config).eval(), "2")


def saved_and_loaded(one, folder):
    one.save(folder / "one.json")
    return sp.Explanation.load(folder / "one.json")


@pytest.mark.parametrize("kind", ["planted", "tiny", "one token", "removed", "no RoPE"])
def test_saved_and_loaded(planted, tiny, tmp_path, kind):
    """Every number as it was; also where some are NaN or infinite, or offsets are missing."""
    if kind == "removed":
        with sp.patch(planted, sp.KnockOut("L0H1", 3)):
            one = sp.explain(planted, "L0H1", random_tokens(2, 40), kappa=0.0)
        assert 3 not in one.profile.offsets
    elif kind == "one token":
        one = sp.explain(tiny, "L0H1", random_tokens(1, 1), kappa=0.0)
        assert math.isnan(one.profile.correlation)
        assert one.margin == math.inf
    else:
        model = {"planted": planted, "tiny": tiny}.get(kind) or gpt2()
        one = sp.explain(model, "L0H1", random_tokens(2, 40))
    again = saved_and_loaded(one, tmp_path)
    assert repr(again.to_dict()) == repr(one.to_dict())
    assert repr(again.to_row()) == repr(one.to_row())
    assert str(again) == str(one)
    assert (again.head, again.provenance) == (one.head, one.provenance)


def test_numbers_that_json_lacks(planted, tmp_path):
    one = sp.explain(planted, "L0H1", random_tokens(2, 40))
    pairs = [(0, math.inf, 0.5), *one.pairs[1:]]
    cosines = [one.cosines[0]._replace(wavelength=math.inf), *one.cosines[1:]]
    odd = dataclasses.replace(one, random=math.nan, pairs=pairs, cosines=cosines)
    assert repr(saved_and_loaded(odd, tmp_path).to_dict()) == repr(odd.to_dict())


@pytest.fixture(scope="module")
def record(planted):
    """What is in the file of an explanation."""
    return without_nan(sp.explain(planted, "L0H1", random_tokens(2, 20)).to_dict())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "damage",
    [
        lambda r: r.pop("head"),
        lambda r: r.update(head="16."),
        lambda r: r.update(head=7),
        lambda r: r.update(offset=-1),
        lambda r: r.update(offset=True),
        lambda r: r.update(verdict="perhaps"),
        lambda r: r.update(verdict=[]),
        lambda r: r.update(rule="another"),
        lambda r: r.update(kappa="high"),
        lambda r: r.update(provenance=[]),
        lambda r: r.update(provenance=3),
        lambda r: r.update(pairs=[[1, 2, 3]]),
        lambda r: r["pairs"][0].update(pair=0.5),
        lambda r: r.pop("cosines"),
        lambda r: r["cosines"][0].update(band="middle"),
        lambda r: r["cosines"][0].update(band=["low"]),
        lambda r: r["cosines"][0].update(amplitude="large"),
        lambda r: r["rank"].pop("r1_q"),
        lambda r: r["rank"].update(r1_q=0.9),
        lambda r: r["score"].update(natural=10**400),
        lambda r: r["score_with_band_dropped"].pop("low"),
        lambda r: r["score_at_rank_one"].update(v=0.1),
        lambda r: r["concentration"].update(middle={"q": 1.0, "k": 1.0}),
        lambda r: r["profile"]["offsets"].pop(),
        lambda r: r["profile"]["offsets"].reverse(),
        lambda r: r["profile"]["offsets"].__setitem__(-1, 10**30),
        lambda r: r["profile"].update(measured=3),
        lambda r: r["profile"]["predicted"].__setitem__(0, "x"),
        lambda r: r.update(profile={}),
        lambda r: r["logit_shares"].pop("both"),
        lambda r: r["logit_shares"].update(n_offsets=-2),
        lambda r: r.update(variation=[1, 2]),
        lambda r: r["variation"].update(sign_q="rare"),
        lambda r: r["origin"].pop("q"),
        lambda r: r["origin"]["k"].update(axis="all"),
        lambda r: r["origin"]["controls"].update(random=[]),
        lambda r: r["origin"]["dropped"].pop("qk"),
    ],
)
def test_damaged_files(record, tmp_path, damage):
    broken = copy.deepcopy(record)
    damage(broken)
    file = tmp_path / "one.json"
    file.write_text(json.dumps(broken))
    with pytest.raises(OutputError, match="is not an explanation of one head") as caught:
        sp.Explanation.load(file)
    assert len(str(caught.value).splitlines()) == 1


def test_other_files(record, tiny, tmp_path):
    whole = json.dumps(record)
    sp.scan(tiny, random_tokens(1, 9), [1]).save(tmp_path / "scan.safetensors")
    for name, text in (
        ("cut.json", whole[: len(whole) // 2]),
        ("list.json", "[]"),
        ("empty.json", ""),
        ("deep.json", "[" * 100_000),
        ("all.json", json.dumps({"heads": [{"name": "L0H0"}]})),
    ):
        (tmp_path / name).write_text(text)
    (tmp_path / "folder.json").mkdir()
    for entry in tmp_path.iterdir():
        with pytest.raises(OutputError, match="is not an explanation of one head") as caught:
            sp.Explanation.load(entry)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(OutputError, match="no file"):
        sp.Explanation.load(tmp_path / "none.json")
    one = sp.explain(tiny, "L0H1", random_tokens(1, 9))
    with pytest.raises(OutputError, match="is saved as a .json file"):
        one.save(tmp_path / "one.csv")
    with pytest.raises(OutputError, match="there is no directory"):
        one.save(tmp_path / "absent" / "one.json")


def profile(correlation, peak):
    offsets = torch.arange(4)
    predicted = -(offsets - peak).abs().double()
    return Profile(offsets, predicted, predicted, correlation)


@pytest.mark.parametrize(
    ("score", "at_rank_one", "dropped", "fit", "expected"),
    [
        (0.8, 0.7, {"high": 0.0, "low": 0.9}, profile(0.99, 1), "RoPE-made slash"),
        (0.8, 0.7, {"high": 0.0, "low": 0.9}, profile(0.99, 3), "neither"),
        (0.8, 0.7, {"high": 0.0, "low": 0.9}, profile(0.5, 1), "neither"),
        (0.8, 0.7, {"high": 0.7, "low": 0.7}, profile(0.99, 1), "neither"),
        (0.8, 0.3, {"high": 0.0, "low": 0.9}, profile(0.99, 1), "content-made"),
        (0.05, 0.05, {"high": 0.0, "low": 0.0}, profile(0.99, 1), "neither"),
        (0.8, 0.7, {}, None, "neither"),
    ],
)
def test_the_verdict_follows_its_rule(score, at_rank_one, dropped, fit, expected):
    assert verdict(score, 1, at_rank_one, dropped, fit, 0.1) == expected


def test_bad_input(tiny):
    with pytest.raises(HeadError, match="takes one head"):
        sp.explain(tiny, ["L0H0", "L0H1"], random_tokens(1, 9))
    with pytest.raises(HeadError, match="L9H9 does not exist"):
        sp.explain(tiny, "L9H9", random_tokens(1, 9))
    with pytest.raises(ScanError, match="kappa"):
        sp.explain(tiny, "L0H0", random_tokens(1, 9), kappa=2.0)


def test_sparkline():
    assert sparkline([0, 1, 2]) == "▁▅█"
    assert sparkline([3.0, 3.0]) == "▁▁"


def test_offset_and_heads_are_picked_on_other_prompts_than_they_are_measured_on():
    model = tiny_model(seed=1)
    tokens = [row[:n] for row, n in zip(random_tokens(4, 20), (20, 9, 12, 15), strict=True)]
    picking, measured = ([tokens[i] for i in half] for half in halves(4, 5))
    # No offset that only one of the halves is long enough for.
    offsets = range(min(16, *(max(map(len, half)) for half in (picking, measured))))
    picked, estimated = (sp.scan(model, half, offsets) for half in (picking, measured))
    for head in ("L0H1", "L1H3"):
        at = sp.Head.parse(head)
        found = sp.explain(model, head, tokens, seed=5)
        best = int(picked.scores[at.layer, at.head].argmax())
        assert found.offset == best
        assert found.natural == pytest.approx(float(estimated.scores[at.layer, at.head, best]))
    every = sp.explain_all(model, None, tokens, seed=5, kappa=0.12)
    assert set(every["name"]) == {str(one.head) for one in picked.slash_heads(0.12)}
    whole = sp.scan(model, tokens, [2])
    given = sp.explain(model, "L0H1", tokens, offset=2, seed=5)
    assert given.natural == pytest.approx(float(whole.scores[0, 1, 0]))
