import json

import pytest
import torch

import slashpatch as sp
from slashpatch.errors import HeadError, ScanError
from slashpatch.explaining.result import verdict
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
                scan = sp.scan(model, list(tokens), [offset], batch_size=1)
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
    from transformers import GPT2Config, GPT2LMHeadModel

    from ..tiny import bridge

    config = GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    gpt2 = bridge(GPT2LMHeadModel(config).eval(), "2")
    one = sp.explain(gpt2, "L1H2", random_tokens(2, 30), kappa=0.0)
    assert one.profile is None
    assert one.dropped == {}
    assert one.verdict in ("content-made", "neither")
    assert "no RoPE" in str(one)


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
