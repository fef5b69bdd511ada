import pytest
import torch

import slashpatch as sp
from slashpatch.effects.metrics.logits import next_token_loss
from slashpatch.errors import EditError, HeadError

from ..planted import induction_model
from ..tiny import random_tokens, tiny_model
from ..zoo import zoo


def test_the_planted_edge_is_named(planted_paths):
    frame = planted_paths.frame
    assert frame.loc[0, "reader"] == "all"
    first, second = frame.iloc[1], frame.iloc[2]
    assert (first["reader"], first["input"]) == ("L1H2", "k")
    assert first["effect"] == pytest.approx(frame.loc[0, "effect"], rel=0.05)
    assert first["low"] > 1
    assert abs(second["effect"]) < 0.01 * first["effect"]
    assert len(frame) == 1 + 4 * 3


@pytest.fixture(scope="module")
def planted_paths():
    return sp.paths(induction_model(), "L0H0", n_prompts=10, max_tokens=41)


def with_input(model, tokens, layer, head, of, change):
    """Effects by TransformerLens' split inputs: each head's copy of the residual stream."""
    name = f"blocks.{layer}.attn.hook_{of}_input"

    def put(x, hook):
        x = x.clone()
        x[:, :, head] += change
        return x

    model.set_use_split_qkv_input(True)
    try:
        with torch.no_grad():
            return next_token_loss(model.run_with_hooks(tokens, fwd_hooks=[(name, put)]), tokens)
    finally:
        model.set_use_split_qkv_input(False)


def test_edges_are_those_of_split_inputs():
    """Without grouped-query attention, TransformerLens' split inputs give the same effects."""
    model = tiny_model(seed=4, layers=3, kv_heads=4)
    tokens = random_tokens(3, 10)
    name = "blocks.0.hook_attn_out"
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=name)
        with sp.patch(model, "KnockOut('L0H1, L0H2', 1)"):
            _, edited = model.run_with_cache(tokens, names_filter=name)
    change = edited[name] - cache[name]
    found = sp.paths(model, "KnockOut('L0H1, L0H2', 1)", metric="loss", prompts=tokens)
    rows = found.frame.set_index(["reader", "input"])
    for layer, head in ((1, 0), (1, 3), (2, 1)):
        for of in "qkv":
            expected = with_input(model, tokens, layer, head, of, change).mean()
            row = rows.loc[f"L{layer}H{head}", of]
            assert row["edited"] == pytest.approx(float(expected), abs=1e-5)
            assert abs(row["effect"]) > 1e-5
    assert not any(point._forward_hooks for point in model.hook_points())


@pytest.mark.parametrize("name", ["Gemma 2", "GPT-NeoX, Pythia", "OLMo 2", "Cohere", "HunYuan"])
def test_no_change_gives_no_effect_and_readers_take_part_elsewhere(name):
    """An edit that changes nothing has no effect on any reader; another edit has some."""
    model = zoo(name)
    tokens = random_tokens(2, 10)
    nothing = sp.paths(model, "ScaleOffsets(L0H1, 1, factor=1)", metric="loss", prompts=tokens)
    assert nothing.frame["effect"].abs().max() < 1e-5
    something = sp.paths(model, "L0H1", metric="loss", prompts=tokens)
    assert something.frame.loc[0, "effect"] != 0
    assert (something.frame["effect"].abs() > 1e-6).sum() > 6
    by_batch = sp.paths(model, "L0H1", metric="loss", prompts=tokens, batch_size=1)
    both = [one.frame.set_index(["reader", "input"])["effect"] for one in (something, by_batch)]
    assert (both[0] - both[1]).abs().max() < 1e-4


def test_metrics_of_attention():
    """Before the reader's layer nothing changes; in it, the path by its key moves its pattern."""
    model = tiny_model(seed=1, layers=3)
    tokens = random_tokens(2, 10)
    for head in ("L0H2", "L1H1", "L2H0"):
        found = sp.paths(model, "L0H1", "L1H1, L2H0", sp.SlashScores(head), tokens).frame
        rows = found.set_index(["reader", "input"])["effect"]
        assert (rows["L2H0", "k"] != 0) == (head == "L2H0")
        assert (rows["L1H1", "k"] != 0) == (head != "L0H2")
        assert rows["L1H1", "v"] == 0 or head == "L2H0"


@pytest.mark.parametrize("of", ["k", "v"])
def test_heads_of_a_group_are_left_alone(tiny, of):
    """A path by key or value of one query head leaves the other heads of its group clean."""
    seen = []
    with tiny.hooks(fwd_hooks=[("blocks.1.hook_attn_out", lambda x, hook: seen.append(x))]):
        sp.paths(tiny, "L0H1", "L1H2", "loss", random_tokens(2, 10), inputs=of)
    change = (seen[-1] - seen[0]).flatten(0, 1)
    assert change.abs().max() > 0.1
    for head in range(4):
        writes = tiny.blocks[1].attn.W_O[head].detach()
        found = torch.linalg.lstsq(writes.T, change.T).solution
        left = float((writes.T @ found - change.T).abs().max())
        assert (left < 1e-4) == (head == 2)


def test_bad_input(tiny):
    tokens = random_tokens(2, 8)
    for wrong, error, said in (
        ({"edit": "L1H0"}, EditError, "no head reads the output of layer 1"),
        ({"edit": "AblateHeads('L0H0, L1H0')"}, EditError, "a path starts in one layer"),
        ({"edit": "L0H0", "readers": "L0H1"}, HeadError, "L0H1 does not read layer 0"),
        ({"edit": "L0H0", "readers": "L1H9"}, HeadError, "L1H9 does not exist"),
        ({"edit": "L0H0", "readers": []}, HeadError, "no readers were given"),
        ({"edit": "L0H0", "inputs": "qz"}, EditError, "inputs must be some of q, k and v"),
        ({"edit": "L0H0", "metric": "loss-by-position"}, EditError, "one number per prompt"),
    ):
        with pytest.raises(error, match=said):
            sp.paths(tiny, **{"metric": "loss", "prompts": tokens, **wrong})
    with sp.patch(tiny, "FreezeBand(L1H0, high)"):
        tiny(tokens)
        with pytest.raises(EditError, match="use per-head keys"):
            sp.paths(tiny, "L0H0", metric="loss", prompts=tokens)
