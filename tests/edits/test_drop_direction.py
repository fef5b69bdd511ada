"""DropDirection and its axis. The edit itself is compared with a reference in test_drawn_cases."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slashpatch as sp
from slashpatch.bridge import read
from slashpatch.bridge.passes import probe_tokens
from slashpatch.errors import EditError, ModelError, PatchError

from ..tiny import random_tokens, tiny_model
from ..zoo import FAMILIES, zoo

HEADS = ["L0H1", "L1H2"]
AXIS_TOKENS = random_tokens(3, 20)


@pytest.fixture(scope="module")
def axis(tiny):
    return sp.fit_axis(tiny, HEADS, AXIS_TOKENS)


def logits(model, tokens, *edits, **kwargs):
    with torch.no_grad(), sp.patch(model, *edits):
        return model(tokens, **kwargs)


def inputs(model, tokens, layer):
    """Attention inputs [token, d_model] of a layer, float64."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    return cache[f"blocks.{layer}.attn.hook_in"].flatten(0, 1).double()


def test_the_axis_is_the_direction_of_the_mean_and_the_others_are_the_next_strongest(tiny, axis):
    x = inputs(tiny, AXIS_TOKENS, 1)
    u = x.mean(0) / x.mean(0).norm()
    torch.testing.assert_close(axis.of(1), u, atol=1e-6, rtol=1e-5)
    left = x - torch.outer(x @ u, u)
    _, sigma, right = torch.linalg.svd(left, full_matrices=False)
    overlap = (axis.principal_of(1) @ right[:8].T).abs()
    torch.testing.assert_close(overlap, torch.eye(8, dtype=torch.float64), atol=1e-4, rtol=0)
    total = x.square().sum()
    expected = torch.cat([(x @ u).square().sum()[None], sigma[:8].square()]) / total
    torch.testing.assert_close(axis.shares[1], expected, atol=1e-6, rtol=1e-4)
    cosine = torch.nn.functional.cosine_similarity(x, u[None]).mean()
    torch.testing.assert_close(axis.cosines[1], cosine, atol=1e-6, rtol=1e-5)


def test_the_cosine_is_the_cone_of_a_scan(tiny, axis):
    cones = sp.scan(tiny, AXIS_TOKENS, [1]).rank_one.set_index("name")["cone_x"]
    assert float(axis.cosines[1]) == pytest.approx(cones["L1H2"], abs=1e-6)


@given(st.sampled_from([name for name, one in FAMILIES.items() if not one.refused]))
def test_queries_and_keys_computed_again_are_those_of_the_model(name):
    model = zoo(name)
    info = read(model)
    tokens = probe_tokens(info.d_vocab)
    positions = torch.arange(tokens.shape[1])[None]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        for qk, made in zip(info.qk, info.projections, strict=True):
            x = cache[info.hook(qk.layer, "input")]
            for layout, project in ((qk.q, made.q), (qk.k, made.k)):
                carried = qk.unrotate(layout, layout.read(cache[layout.name]), positions)
                torch.testing.assert_close(project(x, positions), carried, atol=2e-5, rtol=1e-4)


def test_the_weight_is_the_map_before_the_norm(tiny):
    x = inputs(tiny, random_tokens(1, 9), 0)
    weight, bias = read(tiny).projections[0].k.weight()
    with torch.no_grad():
        _, cache = tiny.run_with_cache(random_tokens(1, 9))
    expected = cache["blocks.0.attn.hook_k"][0].flatten(-2).double()
    torch.testing.assert_close(x @ weight.T + bias, expected, atol=1e-5, rtol=1e-4)


def test_without_an_axis_it_is_fitted_on_natural_text_when_attached(tiny):
    tokens = random_tokens(2, 12)
    fitted = sp.fit_axis(tiny, "L0H1", n_prompts=8, max_tokens=64)
    one, other = sp.DropDirection("L0H1"), sp.DropDirection("L0H1", direction=fitted)
    assert torch.equal(logits(tiny, tokens, one), logits(tiny, tokens, other))


def test_other_heads_and_the_values_stay(tiny, axis):
    tokens = random_tokens(2, 12)
    edit = sp.DropDirection("L0H1", direction=axis)
    with torch.no_grad():
        _, before = tiny.run_with_cache(tokens)
        with sp.patch(tiny, edit):
            _, after = tiny.run_with_cache(tokens)
    changed = (before["pattern", 0] != after["pattern", 0]).flatten(2).any(2).any(0)
    assert changed.tolist() == [False, True, False, False]
    assert torch.equal(before["v", 0], after["v", 0])


@pytest.mark.parametrize("control", ["same_size", "random", "principal"])
def test_controls_change_the_input_by_what_they_say(tiny, axis, control):
    edit = sp.DropDirection("L1H2", direction=axis, control=control, draw=1)
    read_at, write = edit.prepare(tiny, read(tiny))[1]
    u = axis.of(1)
    assert float(write.norm()) == pytest.approx(1)
    assert abs(float(write @ u)) < 1e-6
    assert torch.equal(read_at, u if control == "same_size" else write)


def test_cached_generation(tiny, axis):
    edit = sp.DropDirection("L0H1", direction=axis)
    with torch.no_grad(), sp.patch(tiny, edit):
        out = tiny.generate(
            random_tokens(2, 6),
            max_new_tokens=6,
            do_sample=False,
            stop_at_eos=False,
            output_logits=True,
            verbose=False,
        )
        whole = tiny(out.sequences)[:, 5:-1]
    torch.testing.assert_close(torch.stack(list(out.logits), 1), whole, atol=1e-4, rtol=1e-3)


def test_edits_of_queries_act_after_it_in_whatever_order(tiny, axis):
    tokens = random_tokens(2, 12)
    edits = [sp.RankOne("L0H1"), sp.DropDirection("L0H1", direction=axis)]
    one, other = (logits(tiny, tokens, *some) for some in (edits, edits[::-1]))
    assert torch.equal(one, other)
    with sp.patch(tiny, edits[0]):
        assert torch.equal(logits(tiny, tokens, edits[1]), one)


def test_a_hook_that_ran_before_it_is_refused(tiny, axis):
    hooks = sp.hooks(tiny, sp.DropDirection("L0H1", direction=axis))
    with (
        pytest.raises(PatchError, match="before slashpatch computed the queries and keys"),
        sp.patch(tiny, "ShiftSlash(L0H1, 1)"),
    ):
        tiny.run_with_hooks(random_tokens(1, 8), fwd_hooks=hooks)


def test_split_inputs_are_refused(axis):
    model = tiny_model()
    model.set_use_split_qkv_input(True)
    with pytest.raises(ModelError, match="use_split_qkv_input"):
        logits(model, random_tokens(1, 8), sp.DropDirection("L0H1", direction=axis))


def test_an_axis_saves_loads_prints_and_parses(tiny, axis, tmp_path):
    axis.save(tmp_path / "axis.safetensors")
    edit = sp.DropDirection("L0H1", direction=axis, control="principal", draw=2)
    assert sp.parse_edit(str(edit)) == edit
    again = sp.Axis.load(tmp_path / "axis.safetensors")
    assert again == axis
    assert hash(again) == hash(axis)
    assert torch.equal(again.principal, axis.principal)
    with pytest.raises(EditError, match="saved as a .safetensors file"):
        axis.save(tmp_path / "axis.json")
    with pytest.raises(EditError, match="format slashpatch-basis"):
        sp.RankOne("L0H1", basis=tmp_path / "axis.safetensors")


def test_axes_that_do_not_fit(tiny, axis):
    with pytest.raises(EditError, match="fitted for layers 0, not for layer 1"):
        only = sp.fit_axis(tiny, "L0H1", AXIS_TOKENS)
        logits(tiny, random_tokens(1, 4), sp.DropDirection("L1H2", direction=only))
    with pytest.raises(EditError, match="has only 8 principal directions"):
        edit = sp.DropDirection("L1H2", direction=axis, control="principal", draw=8)
        logits(tiny, random_tokens(1, 4), edit)
    wide = sp.fit_axis(tiny_model(d_head=16), HEADS, AXIS_TOKENS)
    with pytest.raises(EditError, match="the axis has d_model 64, the model 32"):
        logits(tiny, random_tokens(1, 4), sp.DropDirection("L1H2", direction=wide))
