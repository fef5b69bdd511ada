"""The invariants of patches, over random tiny models."""

import contextlib
import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slashpatch as sp
from slashpatch.bridge.attached import active_edits
from slashpatch.errors import EditError, HeadError, OffsetError, PatchError, SlashpatchError

from ..tiny import N_CTX, bridge, llama, random_tokens, tiny_model

# One edit of each kind, so that `cached = uncached` and the rest hold for all of them.
_U = torch.eye(32, dtype=torch.float64)[:9] * torch.ones(2, 1, 1)
AXIS = sp.Axis((0, 1), _U[:, 0], _U[:, 1:], torch.ones(2, 9).double() / 32, torch.ones(2).double())
EDITS = [
    sp.AblateHeads(["L0H1", "L1H2"]),
    sp.AblateHeads(["L0H1", "L1H3"], mode="mean", reference="random"),
    sp.AblateHeads(["L0H0", "L1H1"], mode="resample", reference="random"),
    sp.ScaleOffsets(["L0H1", "L1H0"], [0, 1], 3.0),
    sp.ScaleOffsets(["L0H1", "L1H0"], [0, 2], 0.25, renormalize=False),
    sp.KnockOut(["L0H3", "L1H2"], [0, 1]),
    sp.KnockOut(["L0H3", "L1H2"], [0, 3], renormalize=False),
    sp.KeepOnly(["L0H2", "L0H3", "L1H1"], [1]),
    sp.KeepOnly(["L0H2", "L1H1"], [1, 2], renormalize=False),
    sp.ShiftSlash(["L0H1", "L1H2"], 1),
    sp.ShiftSlash(["L0H1", "L1H2"], -2.5),
    sp.DropBand(["L0H1", "L1H2"], "high"),
    sp.ScaleBand(["L0H1", "L1H3"], "medium+low", 1.7),
    sp.FreezeBand(["L0H1", "L1H2"], "high"),
    sp.SwapBands(["L0H1", "L0H2", "L1H2"], "high", "low"),
    sp.SetFrequencies(["L0H0", "L1H2"], [0.7, 0.5, 0.0, 0.02]),
    sp.PlantSlash(["L0H1", "L1H3"], 2),
    sp.DropDirection(["L0H1", "L1H3"], direction=AXIS),
    sp.DropDirection(["L0H1", "L0H3", "L1H0"], "q", AXIS, "same_size", 3),
]
each_edit = pytest.mark.parametrize("edit", EDITS, ids=str)
some_edits = st.lists(st.sampled_from(EDITS), min_size=1, max_size=3)


@functools.cache
def model_of(seed):
    return tiny_model(seed=seed)


models = st.integers(0, 4).map(model_of)


def logits(model, tokens, *edits, **kwargs):
    with torch.no_grad(), sp.patch(model, *edits):
        return model(tokens, **kwargs)


@each_edit
def test_an_edit_changes_the_logits(tiny, edit):
    tokens = random_tokens(2, 12)
    assert not torch.allclose(logits(tiny, tokens, edit), logits(tiny, tokens))


@given(models, some_edits, st.integers(0, 99))
def test_leaving_restores_bit_for_bit(model, edits, seed):
    tokens = random_tokens(2, 10, seed)
    before = logits(model, tokens)
    logits(model, tokens, *edits)
    assert torch.equal(logits(model, tokens), before)
    assert active_edits(model) == ()


@given(models, some_edits)
def test_leaving_after_an_exception_restores_bit_for_bit(model, edits):
    tokens = random_tokens(1, 10)
    before = logits(model, tokens)

    def fail(tensor, hook):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), sp.patch(model, *edits):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_pattern", fail)])
    assert torch.equal(logits(model, tokens), before)
    assert not any(point._forward_hooks for point in model.hook_points())
    assert not model.original_model._forward_pre_hooks


@given(models, st.permutations(range(3)), st.permutations(range(3)))
def test_patches_and_monitors_nest_in_any_order(model, enter, leave):
    tokens = random_tokens(1, 10)
    before = logits(model, tokens)
    contexts = [
        sp.patch(model, EDITS[0]),
        sp.patch(model, EDITS[5]),
        sp.SlashMonitor(model, [0, 1]),
    ]
    expected = logits(model, tokens, *(EDITS[i] for i in (0, 5)))
    for index in enter:
        contexts[index].__enter__()
    inside = model(tokens)
    for index in leave:
        contexts[index].__exit__(None, None, None)
    torch.testing.assert_close(inside, expected)
    assert torch.equal(logits(model, tokens), before)


@given(models, st.sampled_from(["L0H1", "L1H3"]), st.integers(0, 9))
def test_identity_edits_change_nothing(model, head, offset):
    tokens = random_tokens(2, 10)
    before = logits(model, tokens)
    for edit in (
        sp.ScaleOffsets(head, offset, 1.0),
        sp.ScaleOffsets(head, offset, 1.0, renormalize=False),
        sp.KeepOnly(head, range(10)),
        sp.KeepOnly(head, range(10), renormalize=False),
    ):
        assert torch.equal(logits(model, tokens, edit), before)
    assert torch.equal(logits(model, tokens), before)


@each_edit
def test_cached_generation_equals_recomputation(edit):
    model = model_of(1)
    prompt = random_tokens(2, 7)
    with torch.no_grad(), sp.patch(model, edit):
        out = model.generate(
            prompt,
            max_new_tokens=8,
            do_sample=False,
            stop_at_eos=False,
            output_logits=True,
            verbose=False,
        )
        tokens = out.sequences
        whole = model(tokens)[:, 6:-1]
    cached = torch.stack(list(out.logits), dim=1)
    torch.testing.assert_close(cached, whole, atol=1e-5, rtol=1e-4)


def pattern_and_z(model, tokens, *edits):
    """Pattern and z of both layers under the edits."""
    with torch.no_grad(), sp.patch(model, *edits):
        _, cache = model.run_with_cache(tokens)
    return (
        [cache["pattern", layer].clone() for layer in range(2)],
        [cache["z", layer].clone() for layer in range(2)],
    )


def test_a_row_without_keys_writes_nothing_and_no_nan(tiny):
    (pattern, _), (z, _) = pattern_and_z(tiny, random_tokens(1, 6), sp.KnockOut("L0H2", [0, 1]))
    assert torch.equal(pattern[0, 2, :2], torch.zeros(2, 6))
    assert torch.equal(z[0, :2, 2], torch.zeros(2, 8))
    torch.testing.assert_close(pattern[0, 2, 2:].sum(-1), torch.ones(4))
    single = logits(tiny, random_tokens(1, 1), sp.KnockOut("L0H2", 0))
    assert single.isfinite().all()


def test_two_edits_that_empty_a_row_together(tiny):
    edits = (sp.KnockOut("L0H2", 0), sp.KnockOut("L0H2", 1))
    together = pattern_and_z(tiny, random_tokens(1, 6), *edits)[0][0]
    at_once = pattern_and_z(tiny, random_tokens(1, 6), sp.KnockOut("L0H2", [0, 1]))[0][0]
    assert torch.equal(together, at_once)


def test_knocking_out_an_overwhelming_diagonal_leaves_an_exact_row():
    """The removed key holds all but e⁻³⁰⁰ of the row: far below what float32 can hold."""
    model = tiny_model(seed=2)

    def spike(scores, hook):
        scores = scores.clone()
        scores[:, 1].diagonal(0, -2, -1).add_(300.0)
        return scores

    tokens = random_tokens(1, 8)
    point = model.hook_dict["blocks.0.attn.hook_attn_scores"]
    plain = pattern_and_z(model, tokens, sp.KnockOut("L0H1", 0))[0][0]
    point.add_hook(spike)
    spiked = pattern_and_z(model, tokens, sp.KnockOut("L0H1", 0))[0][0]
    torch.testing.assert_close(spiked[0, 1, 1:], plain[0, 1, 1:])


def test_gradients_pass_through_emptied_rows(tiny):
    tokens = random_tokens(1, 6)
    weight = tiny.original_model.model.layers[0].self_attn.q_proj.weight
    for edit in (sp.KnockOut("L0H1", [0, 1]), sp.KeepOnly("L0H1", 3), sp.AblateHeads("L0H1")):
        with sp.patch(tiny, edit):
            loss = tiny(tokens, return_type="loss")
        (gradient,) = torch.autograd.grad(loss, weight)
        assert gradient.isfinite().all()
        assert gradient.any()


def test_other_heads_are_untouched(tiny):
    """Head 1 shares its keys with head 0; only head 1 may change."""
    tokens = random_tokens(1, 9)
    before, z_before = pattern_and_z(tiny, tokens)
    for edit in (sp.KnockOut("L0H1", 1), sp.KeepOnly("L0H1", 1), sp.ScaleOffsets("L0H1", 1, 2)):
        after, z_after = pattern_and_z(tiny, tokens, edit)
        others = [0, 2, 3]
        assert torch.equal(after[0][:, others], before[0][:, others])
        assert torch.equal(z_after[0][:, :, others], z_before[0][:, :, others])
        assert not torch.equal(after[0][:, 1], before[0][:, 1])


def test_mean_ablation_writes_the_mean_of_the_reference(tiny):
    edit = sp.AblateHeads("L0H1", mode="mean", reference=["w1 w2 w3", "w9 w8"])
    with torch.no_grad():
        rows = torch.cat(
            [
                tiny.run_with_cache(tiny.to_tokens(text))[1]["z", 0][0, :, 1]
                for text in edit.reference
            ]
        )
    z = pattern_and_z(tiny, random_tokens(2, 5), edit)[1][0]
    torch.testing.assert_close(z[:, :, 1], rows.mean(0).expand(2, 5, -1))


def test_resampling_draws_rows_of_the_reference_by_seed(tiny):
    edit = sp.AblateHeads("L0H1", mode="resample", reference="w1 w2 w3 w4 w5")
    with torch.no_grad():
        rows = tiny.run_with_cache(tiny.to_tokens(edit.reference))[1]["z", 0][0, :, 1]
    tokens = random_tokens(2, 6)
    z = pattern_and_z(tiny, tokens, edit)[1][0][:, :, 1]
    for row in z.flatten(0, 1):
        assert (row - rows).abs().sum(-1).min() < 1e-6
    again = pattern_and_z(tiny, tokens, edit)[1][0][:, :, 1]
    other = pattern_and_z(
        tiny, tokens, sp.AblateHeads("L0H1", "resample", "w1 w2 w3 w4 w5", seed=1)
    )[1][0][:, :, 1]
    assert torch.equal(z, again)
    assert not torch.equal(z, other)


def test_text_is_read_as_an_edit(tiny):
    tokens = random_tokens(1, 9)
    typed = logits(tiny, tokens, "KnockOut(L0H1, 1)")
    assert torch.equal(typed, logits(tiny, tokens, sp.KnockOut("L0H1", 1)))


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (sp.KnockOut("L99H0", 1), HeadError, "L99H0 does not exist.*L0H0 to L1H3"),
        (sp.KnockOut("L1H99", 1), HeadError, "L1H99 does not exist"),
        (sp.KnockOut("L1H1", N_CTX), OffsetError, f"offset {N_CTX} does not fit"),
        (sp.AblateHeads, EditError, "expected an edit"),
        ("KnockUp(L0H0, 1)", EditError, "did you mean KnockOut"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_edits_that_do_not_fit_are_refused_before_anything_is_attached(tiny, edit, error, message):
    with pytest.raises(error, match=message), sp.patch(tiny, sp.KnockOut("L0H0", 1), edit):
        pytest.fail("entered")
    assert active_edits(tiny) == ()
    assert not any(point._forward_hooks for point in tiny.hook_points())


def test_a_patch_that_never_ran_raises(tiny):
    with pytest.raises(PatchError, match=r"KnockOut\(L1H0, offsets=1\) changed nothing.*hook_att"):
        with sp.patch(tiny, sp.KnockOut("L1H0", 1)):
            pass
    with pytest.raises(PatchError, match="blocks.1.attn.hook_z never fired"):
        with sp.patch(tiny, sp.AblateHeads(["L0H0", "L1H0"])):
            tiny(random_tokens(1, 4), stop_at_layer=1)


def test_another_model_under_the_patch_raises(tiny):
    other = model_of(2)
    with pytest.raises(PatchError, match="never fired"), sp.patch(tiny, sp.KnockOut("L0H0", 1)):
        other(random_tokens(1, 4))


def test_hooks_on_another_model_raise(tiny):
    other = model_of(2)
    with pytest.raises(
        PatchError, match="outside a forward pass of the model that it was made for"
    ):
        other.run_with_hooks(random_tokens(1, 4), fwd_hooks=sp.hooks(tiny, "KnockOut(L0H0, 1)"))


def test_removed_hooks_raise(tiny):
    with pytest.raises(PatchError, match="hooks of this patch were removed"):
        with sp.patch(tiny, sp.KnockOut("L0H0", 1)):
            tiny(random_tokens(1, 4))
            tiny.reset_hooks(including_permanent=True)


def test_reset_hooks_does_not_end_a_patch(tiny):
    tokens = random_tokens(1, 9)
    expected = logits(tiny, tokens, sp.KnockOut("L0H0", 1))
    with torch.no_grad(), sp.patch(tiny, sp.KnockOut("L0H0", 1)):
        tiny.reset_hooks()
        assert torch.equal(tiny(tokens), expected)


@pytest.mark.parametrize("through_hooks", [False, True])
def test_keys_cached_before_the_patch_raise(tiny, through_hooks):
    tokens = random_tokens(1, 6)
    with torch.no_grad():
        _, cache = tiny(tokens[:, :5], return_type="logits_and_cache", use_cache=True)
    edit = sp.KnockOut("L0H0", 1)
    patched = tiny.hooks(fwd_hooks=sp.hooks(tiny, edit)) if through_hooks else sp.patch(tiny, edit)
    with pytest.raises(PatchError, match="after 5 tokens had been cached without it"), patched:
        tiny(tokens[:, 5:], past_key_values=cache)


def test_a_static_cache_is_refused(tiny):
    from transformers import StaticCache

    cache = StaticCache(config=tiny.original_model.config, max_cache_len=16)
    with pytest.raises(SlashpatchError, match="static caches are not supported"):
        with sp.patch(tiny, sp.KnockOut("L0H0", 1)):
            tiny(random_tokens(1, 6), past_key_values=cache)


@each_edit
def test_masks_under_which_columns_do_not_count_tokens_are_refused(tiny, edit):
    for mask, message in (
        (torch.tensor([[1, 1, 0, 1, 1]]), "gap inside a prompt"),
        (torch.zeros(1, 1, 5, 5).masked_fill(torch.ones(5, 5).triu(1) > 0, -1e30), "0/1 mask"),
    ):
        with pytest.raises(SlashpatchError, match=message), sp.patch(tiny, edit):
            tiny(random_tokens(1, 5), attention_mask=mask)


def test_remove_batch_dim_is_refused(tiny):
    with pytest.raises(PatchError, match="remove_batch_dim"):
        tiny.run_with_hooks(
            random_tokens(1, 5),
            fwd_hooks=sp.hooks(tiny, sp.KnockOut("L0H0", 1)),
            remove_batch_dim=True,
        )


def test_a_cache_kept_by_another_hook_is_not_overwritten(tiny):
    """Edits return new tensors: what a hook saw before the edit stays what it was."""
    kept = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            tiny.hooks(
                fwd_hooks=[
                    ("blocks.0.attn.hook_attn_scores", lambda x, hook: kept.update(seen=x)),
                    ("blocks.0.attn.hook_pattern", lambda x, hook: kept.update(pattern=x)),
                ]
            )
        )
        tokens = random_tokens(1, 7)
        tiny(tokens)
        clean = kept["seen"].clone()
        stack.enter_context(sp.patch(tiny, sp.KnockOut("L0H0", 1)))
        tiny(tokens)
    assert torch.equal(kept["seen"], clean)


def test_hooks_may_be_freed_in_the_middle_of_a_pass(tiny):
    """Garbage collection can strike between two of torch's hooks."""
    import gc

    held = [sp.hooks(tiny, sp.KnockOut("L0H0", 1))]
    tokens = random_tokens(1, 5)
    expected = tiny(tokens)

    def free(module, args):
        held.clear()
        gc.collect()

    handle = tiny.original_model.register_forward_pre_hook(free, prepend=True)
    try:
        assert torch.equal(tiny(tokens), expected)
    finally:
        handle.remove()
    assert not tiny.original_model._forward_pre_hooks


def test_a_copied_cache_is_known(tiny):
    import copy

    tokens = random_tokens(1, 6)
    with torch.no_grad(), sp.patch(tiny, sp.KnockOut("L0H1", 1)):
        whole = tiny(tokens)
        _, cache = tiny(tokens[:, :5], return_type="logits_and_cache", use_cache=True)
        step = tiny(tokens[:, 5:], past_key_values=copy.deepcopy(cache))
    torch.testing.assert_close(step[:, -1], whole[:, -1], atol=1e-5, rtol=1e-4)


def test_our_own_passes_do_not_count_as_running(tiny):
    """The reference prompts of an inner edit are no run of the outer patch."""
    inner = sp.AblateHeads("L0H0", mode="mean", reference="random")
    with pytest.raises(PatchError, match="never fired"), sp.patch(tiny, "KnockOut(L1H0, 1)"):
        sp.hooks(tiny, inner)


def test_layers_below_start_at_layer_do_not_count(tiny):
    tokens = random_tokens(1, 6)
    with torch.no_grad():
        _, cache = tiny.run_with_cache(tokens)
    resid = cache["resid_pre", 1]
    with pytest.raises(PatchError, match="never fired"), sp.patch(tiny, "KnockOut(L0H0, 1)"):
        tiny(resid, start_at_layer=1)
    with sp.SlashMonitor(tiny, [1]) as monitor:
        tiny(resid, start_at_layer=1)
    assert monitor.n_rows.tolist() == [[0], [5]]


def test_one_hook_of_several_is_refused(tiny):
    hooks = sp.hooks(tiny, "KnockOut(L0H0, 1)")
    with pytest.raises(PatchError, match="attach all hooks"):
        tiny.run_with_hooks(random_tokens(1, 6), fwd_hooks=hooks[1:])


def test_float64_models_work():
    model = bridge(llama(seed=1).double(), "double")
    tokens = random_tokens(1, 9)
    scan = sp.scan(model, tokens, [1])
    reference = sp.scan(bridge(llama(seed=1), "single"), tokens, [1])
    torch.testing.assert_close(scan.scores, reference.scores, atol=1e-5, rtol=0)
    assert not torch.allclose(logits(model, tokens, "KnockOut(L0H0, 1)"), logits(model, tokens))
