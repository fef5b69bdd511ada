"""Screens: exact changes of z, gradients, which rows are run, and what the audit says."""

import itertools
import json
import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slashpatch as sp
from slashpatch import bridge
from slashpatch.data.prompts import PromptSet
from slashpatch.edits import Edit
from slashpatch.effects.every_head.choice import (
    AUDIT,
    FLAGGED,
    TOP,
    audited,
    choose,
    draw,
    estimates,
    most_missed,
)
from slashpatch.effects.every_head.estimates import contributions
from slashpatch.effects.every_head.exact_changes import exact_changes, joined, passes
from slashpatch.effects.every_head.run import _Passes
from slashpatch.effects.every_head.variants import Variant, sweep_variants
from slashpatch.effects.metrics.logits import next_token_loss
from slashpatch.effects.result import Result
from slashpatch.effects.running.evaluation import MetricRunner
from slashpatch.effects.running.gradients import gradients
from slashpatch.effects.running.inputs import Batch, prompts_for
from slashpatch.effects.screen import halves
from slashpatch.errors import EditError, MetricError, PromptError, SweepError
from slashpatch.patching.fused import fused_where_exact, is_fused

from ..planted import induction_model
from ..tiny import bridge as bridge_of
from ..tiny import llama, random_tokens, tiny_model
from ..zoo import FAMILIES, zoo

SMALL = {"n_prompts": 4, "max_tokens": 13}
EDITS = [
    "KnockOut({head}, 1)",
    "KnockOut({head}, [0, 1, 2])",
    "KnockOut({head}, 1, renormalize=False)",
    "ScaleOffsets({head}, 1, factor=3)",
    "KeepOnly({head}, 0)",
    "AblateHeads({head})",
    "AblateHeads({head}, mode=mean, reference=random)",
    "AblateHeads({head}, mode=resample, reference=random)",
    "ShiftSlash({head}, by=1)",
    "DropBand({head}, high)",
    "FreezeBand({head}, low)",
    "RankOne({head}, of=qk)",
    "PlantSlash({head}, 2)",
]


def a_batch(n=2, length=11, seed=0):
    tokens = random_tokens(n, length, seed)
    return Batch(torch.arange(n), tokens, n)


def as_prompts(batch):
    return PromptSet(tuple(batch.tokens), "tokens")


def clean_z(model, batch):
    z = {}
    hooks = [(name, lambda x, hook: z.__setitem__(hook.layer(), x)) for name in all_z(model)]
    with torch.no_grad():
        model.run_with_hooks(batch.tokens, fwd_hooks=hooks)
    return z


def all_z(model):
    return bridge.read(model).hooks("z")


def one_at_a_time(model, batch, variant):
    """The slow reference: one edit alone; its layer's inputs are clean, because it is the first."""
    edited = {}
    layer = variant.edit.layers[0]
    hook = (bridge.read(model).hook(layer, "z"), lambda x, hook: edited.__setitem__(0, x))
    with torch.no_grad(), sp.patch(model, variant.edit):
        model.run_with_hooks(batch.tokens, fwd_hooks=[hook])
    return edited[0]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("run_fused", [True, False])
def test_changes_of_all_heads_in_one_pass_are_those_of_one_edit_at_a_time(edit, run_fused):
    model, batch = tiny_model(seed=2, layers=3), a_batch()
    variants = sweep_variants(model, edit, None, None)
    clean = clean_z(model, batch)
    with sp.fused(model) if run_fused else nullcontext():
        changes = by_index(keep_changes(model, batch, clean, variants))
    assert sorted(changes) == list(range(12))
    for variant in variants:
        layer, heads = variant.edit.layers[0], variant.edit.heads_in(variant.edit.layers[0])
        expected = (one_at_a_time(model, batch, variant) - clean[layer])[:, :, heads]
        torch.testing.assert_close(changes[variant.index], expected, atol=2e-5, rtol=2e-5)


def keep_changes(model, batch, clean, variants):
    kept = []
    exact_changes(model, batch, clean, variants, lambda *given: kept.append(given))
    return kept


@pytest.mark.parametrize("name", [name for name, f in FAMILIES.items() if not f.refused])
def test_in_every_family_diagonals_in_closed_form_are_those_of_passes(name):
    model, batch = zoo(name), a_batch()
    clean = clean_z(model, batch)
    variants = sweep_variants(model, "KnockOut({head}, {offset})", None, range(4))
    by_pass = by_index(keep_changes(model, batch, clean, variants))
    with fused_where_exact(model):
        closed = by_index(keep_changes(model, batch, clean, variants))
    assert closed.keys() == by_pass.keys() == set(range(len(variants)))
    for index, change in closed.items():
        torch.testing.assert_close(change, by_pass[index], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_an_edit_of_nothing_changes_nothing(dtype):
    """Edited heads are computed in another way than others, whose rounding is no change."""
    model, batch = bridge_of(llama(seed=1, layers=3).to(dtype)), a_batch(length=20)
    clean = clean_z(model, batch)
    variants = sweep_variants(model, "KnockOut({head}, {offset})", None, [1, 30])
    with fused_where_exact(model):
        assert is_fused(model)
        found = by_index(keep_changes(model, batch, clean, variants))
    largest = [[], []]
    for variant in variants:
        largest[variant.offset == 30].append(float(found[variant.index].abs().max()))
    assert min(largest[0]) > 0.01
    assert max(largest[1]) == 0


def by_index(kept):
    return {
        variant.index: change[:, :, variant.edit.heads_in(variant.edit.layers[0])]
        for together, change in kept
        for variant in together
    }


def test_all_offsets_need_one_pass_in_the_fused_engine_and_one_each_without(tiny):
    batch = a_batch()
    clean = clean_z(tiny, batch)
    variants = sweep_variants(tiny, "KnockOut({head}, {offset})", None, range(5))
    n = {}
    with fused_where_exact(tiny):
        pass  # verifies the model with passes of its own, once
    for run_fused in (True, False):
        ran = []
        handle = tiny.original_model.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        try:
            with fused_where_exact(tiny) if run_fused else nullcontext():
                assert is_fused(tiny) is run_fused
                exact_changes(tiny, batch, clean, variants, lambda *_: None)
        finally:
            handle.remove()
        n[run_fused] = len(ran)
    assert n == {True: 1, False: 5}


def test_under_active_patches_changes_are_relative_to_the_patched_model():
    model, batch = tiny_model(seed=3), a_batch()
    variants = sweep_variants(model, "KnockOut({head}, 1)", None, None)
    with sp.patch(model, "AblateHeads(L0H1)", "KnockOut(L1H2, 0)"), fused_where_exact(model):
        clean = clean_z(model, batch)
        found = by_index(keep_changes(model, batch, clean, variants))
        for variant in variants:
            layer, heads = variant.edit.layers[0], variant.edit.heads_in(variant.edit.layers[0])
            expected = (one_at_a_time(model, batch, variant) - clean[layer])[:, :, heads]
            torch.testing.assert_close(found[variant.index], expected, atol=2e-5, rtol=2e-5)


def variants_of(edits):
    return [Variant(i, edit.heads[0], None, edit) for i, edit in enumerate(edits)]


@given(st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=8))
def test_variants_that_share_a_pass_share_no_head(sets):
    variants = variants_of([sp.AblateHeads([(0, head) for head in heads]) for heads in sets])
    groups = passes(variants)
    assert sorted(v.index for group in groups for v in group) == list(range(len(sets)))
    for group in groups:
        heads = [head for variant in group for head in variant.edit.heads]
        assert len(heads) == len(set(heads))


def test_only_own_edits_that_are_equal_are_joined():
    class Mine(Edit):
        def on_z(self, ctx, z):
            return z - z.mean(2, keepdim=True)  # depends on the other heads of the edit

    edits = [sp.KnockOut("L0H0", 1), sp.KnockOut("L1H3", 1), sp.KnockOut("L0H1", 2)]
    assert list(joined(edits)) == [sp.KnockOut("L0H0, L1H3", 1), sp.KnockOut("L0H1", 2)]
    mine = [Mine("L0H0"), Mine("L0H1")]
    assert list(joined(mine)) == mine


@pytest.mark.parametrize("run_fused", [True, False])
def test_gradients_are_those_of_finite_differences(run_fused):
    model = tiny_model(seed=4)
    model.original_model.double()
    metric = sp.LogitDifference(3, 5)
    runner, batch = MetricRunner(model, [metric]), a_batch()
    required = [w.requires_grad for w in model.original_model.parameters()]
    with sp.fused(model) if run_fused else nullcontext():
        found = gradients(runner, batch, range(2))
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        direction = torch.randn(found.z[layer].shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (3e-3, -3e-3):  # norms are computed in float32
            step = sign * direction
            moved = (bridge.read(model).hook(layer, "z"), lambda z, hook, step=step: z + step)
            with torch.no_grad():
                logits = model.run_with_hooks(batch.tokens, fwd_hooks=[moved])
            values.append(metric(logits, batch.index, batch.n_prompts))
        slope = (values[0] - values[1]) / 6e-3
        expected = (direction * found.gradient[layer]).sum((1, 2, 3))
        torch.testing.assert_close(slope, expected, atol=1e-3, rtol=2e-3)
    assert [w.requires_grad for w in model.original_model.parameters()] == required
    assert all(w.grad is None for w in model.original_model.parameters())


def test_the_estimate_is_the_effect_of_a_small_change():
    """To first order in the edit's factor, estimate and effect are the same."""
    model = tiny_model(seed=5, layers=3)
    found = sp.screen(
        model,
        "ScaleOffsets({head}, 1, factor=1.01)",
        metric="loss",
        prompts=random_tokens(4, 12, 1),
        split=False,
        verify=12,
        audit=0,
    ).frame
    largest = found.head(6)
    assert largest["estimate"].tolist() == pytest.approx(largest["effect"].tolist(), rel=0.05)


def slow_estimates(model, variants, batch, metric):
    """The estimates from a backward pass of TransformerLens' engine, one variant at a time."""
    runner = MetricRunner(model, [metric])
    found = gradients(runner, batch, range(model.cfg.n_layers))
    rows = []
    for variant in sorted(variants, key=lambda v: v.index):
        layer = variant.edit.layers[0]
        change = one_at_a_time(model, batch, variant) - found.z[layer]
        rows.append((change * found.gradient[layer]).sum((1, 2, 3)))
    return torch.stack(rows, dim=-1).double()


@pytest.mark.parametrize("edit", ["KnockOut({head}, {offset})", "ShiftSlash({head}, by={offset})"])
def test_estimates_are_the_slow_reference(edit):
    model, batch = tiny_model(seed=6), a_batch(3)
    variants = sweep_variants(model, edit, None, range(1, 4))
    runner = MetricRunner(model, [next_token_loss])
    found = contributions(runner, as_prompts(batch), variants, seed=0)
    assert found.shape == (3, 3, 24)
    expected = slow_estimates(model, variants, batch, next_token_loss)
    torch.testing.assert_close(found[0], expected, atol=2e-5, rtol=1e-4)
    assert not torch.equal(found[1], found[0])  # where some heads are moved, gradients differ
    assert not torch.equal(found[1], found[2])


def test_estimates_do_not_depend_on_how_prompts_are_batched():
    model = tiny_model(seed=6)
    runner = MetricRunner(model, [next_token_loss])
    prompts = [random_tokens(1, n, n)[0] for n in (9, 11, 9, 12)]
    variants = sweep_variants(model, "KnockOut({head}, 1)", None, None)
    found = []
    for size in (1, None):
        chosen = prompts_for(model, runner.metrics, prompts, max_tokens=None, n_prompts=4, seed=0)
        found.append(contributions(runner, chosen, variants, seed=0, batch_size=size))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_the_first_screened_layer_may_be_a_later_one():
    model, batch = tiny_model(seed=6, layers=3), a_batch(2)
    runner = MetricRunner(model, [next_token_loss])
    all_heads = sweep_variants(model, "AblateHeads({head})", None, None)
    last_layer = sweep_variants(model, "AblateHeads({head})", "L2", None)
    whole = contributions(runner, as_prompts(batch), all_heads, 0)
    part = contributions(runner, as_prompts(batch), last_layer, 0)
    torch.testing.assert_close(part[0], whole[0, :, 8:], atol=1e-5, rtol=1e-4)


def test_rows_that_are_run_are_those_of_a_sweep_bit_for_bit():
    model = tiny_model(seed=1, layers=3)
    swept = sp.sweep(model, "KnockOut({head}, 1)", **SMALL).frame.set_index("name")["effect"]
    found = sp.screen(model, "KnockOut({head}, 1)", verify=3, audit=2, split=False, **SMALL).frame
    run = found[found["why"] != ""].set_index("name")["effect"]
    assert len(run) >= 5
    assert run.to_dict() == swept[run.index].to_dict()
    assert found.loc[found["why"] == "", "effect"].isna().all()
    assert found["estimate"].notna().all()


def test_a_screen_of_all_rows_is_the_sweep():
    model, sizes = tiny_model(seed=1), {**SMALL, "n_prompts": 6}
    swept = sp.sweep(model, "DropBand({head}, high)", **sizes).frame
    found = sp.screen(model, "DropBand({head}, high)", verify=100, split=False, **sizes)
    columns = ["name", "edit", "baseline", "edited", "effect", "low", "high", "p", "q"]
    assert found.frame[columns].to_dict() == swept[columns].to_dict()
    assert set(found.frame["why"]) == {TOP}
    assert "Every row was run." in found.remarks
    audit = found.tables["audit"].iloc[0]
    assert (audit["unverified"], audit["missed_at_most"], audit["recall"]) == (0, 0, 1)


def test_the_planted_circuit_is_found():
    """The heads that copy are the largest effects; which they are is known by construction."""
    model = induction_model()
    found = sp.screen(model, "AblateHeads({head})", verify=2, audit=2, n_prompts=8, max_tokens=21)
    assert set(found.frame["name"].head(2)) == {"L0H0", "L1H2"}
    assert set(found.frame["why"].head(2)) <= {TOP, FLAGGED}


def test_estimates_and_effects_are_of_different_prompts(monkeypatch):
    model, seen = tiny_model(seed=1), {}
    real_contributions = contributions

    def spy(runner, prompts, variants, seed, batch_size, chosen, *rest):
        seen["estimated"] = chosen
        return real_contributions(runner, prompts, variants, seed, batch_size, chosen, *rest)

    monkeypatch.setattr("slashpatch.effects.screen.contributions", spy)
    found = sp.screen(model, "KnockOut({head}, 1)", prompts=random_tokens(7, 9), metric="loss")
    first, second = halves(7, True, 0)
    assert (len(first), len(second)) == (3, 4)
    assert seen["estimated"] == first
    assert sorted(first + second) == list(range(7))
    assert set(found.frame["n"]) == {4}
    assert "estimates on other prompts" in found.remarks[0]


def test_answers_of_each_prompt_stay_with_their_prompts():
    """LogitDifference has one answer a prompt, in the order of all of them."""
    model, tokens = tiny_model(seed=1), random_tokens(6, 9)
    right, wrong = tuple(range(10, 16)), tuple(range(30, 36))
    metric = sp.LogitDifference(right, wrong)
    found = sp.screen(model, "AblateHeads({head})", metric=metric, prompts=tokens, verify=8).frame
    _, second = halves(6, True, 0)
    for row in found.head(3).itertuples():
        values = []
        for index in second:
            alone = sp.LogitDifference(right[index], wrong[index])
            values.append(
                sp.measure(model, row.edit, alone, tokens[index][None]).frame["effect"].iloc[0]
            )
        assert row.effect == pytest.approx(sum(values) / len(values), abs=1e-5)


def counts(logits, tokens):
    return (logits.argmax(-1) == tokens).double().mean(1)


def flat(logits, tokens):
    return (0 * logits).sum((1, 2))


def outside(logits, tokens):
    return torch.from_numpy(logits.numpy().mean((1, 2)))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("kl", "kl has no gradient at the clean run, because it compares with the clean run"),
        ("top1", "top1 has no gradient at the clean run"),
        ("slash", "slash has no gradient at the clean run, because it reads the attention"),
        (counts, "counts has no gradient, because it counts"),
        (outside, r"outside has no gradient: Can't call numpy\(\).*; screen by another metric"),
        (flat, "flat has a gradient of zero here"),
        ("loss-by-position", "one number per prompt; loss-by-position gives 12"),
    ],
)
def test_a_metric_without_a_gradient_is_refused_by_name(metric, message):
    with pytest.raises(MetricError, match=message):
        sp.screen(tiny_model(seed=1), metric=metric, prompts=random_tokens(4, 13))


def test_the_metric_may_be_flat_on_some_prompts():
    """As it is for two equal answers; how prompts are batched changes nothing."""
    model, tokens = tiny_model(seed=1), random_tokens(4, 9)
    metric = sp.LogitDifference((5, 6, 7, 8), (9, 9, 7, 9))
    options = {"metric": metric, "prompts": tokens, "split": False, "verify": 8}
    whole = sp.screen(model, **options).frame
    single = sp.screen(model, batch_size=1, **options).frame
    assert single["name"].tolist() == whole["name"].tolist()
    assert single["estimate"].tolist() == pytest.approx(whole["estimate"].tolist(), abs=1e-5)


def column(logits, tokens):
    return next_token_loss(logits, tokens)[:, None]


def test_one_number_per_prompt_may_be_a_column():
    model, tokens = tiny_model(seed=1), random_tokens(4, 9)
    flat_shape = sp.screen(model, metric="loss", prompts=tokens).frame
    as_column = sp.screen(model, metric=column, prompts=tokens).frame
    assert as_column["estimate"].tolist() == flat_shape["estimate"].tolist()
    assert as_column["effect"].dropna().tolist() == flat_shape["effect"].dropna().tolist()


def test_a_screen_in_inference_mode_is_the_same():
    model, tokens = tiny_model(seed=1), random_tokens(4, 9)
    outside_of_it = sp.screen(model, metric="loss", prompts=tokens)
    with torch.inference_mode():
        inside = sp.screen(model, metric="loss", prompts=tokens)
        swept = sp.sweep(model, metric="loss", prompts=tokens, heads="L0")
    assert inside.frame.equals(outside_of_it.frame)
    assert len(swept.frame) == 4


def test_a_stop_in_the_middle_leaves_weights_and_hooks_as_they_were():
    model, calls = tiny_model(seed=1), itertools.count()
    weights = list(model.original_model.parameters())
    weights[0].requires_grad_(False)
    before = [weight.requires_grad for weight in weights]

    def stops(logits, tokens):
        if next(calls) == 1:  # in the second gradient, where some heads are moved
            raise KeyboardInterrupt
        return next_token_loss(logits, tokens)

    with pytest.raises(KeyboardInterrupt):
        sp.screen(model, metric=stops, prompts=random_tokens(4, 9))
    assert [weight.requires_grad for weight in weights] == before
    assert not is_fused(model)
    assert not any(point.fwd_hooks for point in model.hook_points())


def test_a_proxy_is_named():
    model = tiny_model(seed=1)
    tokens = random_tokens(4, 13)
    found = sp.screen(model, metric="kl", proxy="loss", prompts=tokens, verify=4, audit=1)
    assert found.provenance["proxy"] == "loss"
    assert "Estimates are of loss, effects of kl." in found.remarks[0]
    assert (found.frame["effect"].dropna() >= 0).all()
    direct = sp.screen(model, metric="loss", prompts=tokens, verify=4, audit=1).frame
    by_name = found.frame.set_index("name")["estimate"]
    assert by_name.to_dict() == direct.set_index("name")["estimate"].to_dict()


def test_edits_of_several_layers_are_refused():
    def both(head):
        return sp.AblateHeads([(0, head.head), (1, head.head)])

    with pytest.raises(EditError, match="screen takes edits of one layer"):
        sp.screen(tiny_model(seed=1), both, prompts=random_tokens(4, 9), metric="loss")


def test_an_edit_may_act_on_several_heads_of_a_layer():
    model, tokens = tiny_model(seed=1), random_tokens(4, 9)

    def neighbours(head):
        return sp.AblateHeads([(head.layer, head.head), (head.layer, (head.head + 1) % 4)])

    found = sp.screen(model, neighbours, prompts=tokens, metric="loss", verify=8).frame
    single = sp.screen(model, "AblateHeads({head})", prompts=tokens, metric="loss", verify=8).frame
    of_one = single.set_index("name")["estimate"]
    for row in found.itertuples():
        other = f"L{row.layer}H{(row.head + 1) % 4}"
        assert row.estimate == pytest.approx(of_one[row.name] + of_one[other], abs=1e-5)


def test_too_few_prompts_cannot_be_split():
    with pytest.raises(PromptError, match="3 prompts cannot be split"):
        sp.screen(tiny_model(seed=1), metric="loss", prompts=random_tokens(3, 9))


@pytest.mark.parametrize(
    "wrong",
    [
        {"verify": 0},
        {"verify": True},
        {"audit": -1},
        {"above": -1.0},
        {"above": True},
        {"above": math.nan},
        {"above": "large"},
    ],
)
def test_wrong_options_are_refused(wrong, unchecked):
    with pytest.raises(MetricError, match=f"{next(iter(wrong))} must be"):
        sp.screen(tiny_model(seed=1), metric="loss", prompts=random_tokens(4, 9), **wrong)


# which rows are run


def test_flagged_rows_are_large_elsewhere_but_not_at_the_clean_gradient():
    found = estimates(
        torch.tensor(
            [
                [[5.0, 0.0, 1.0, 0.1, 0.2, 0.3], [5.0, 0.0, -1.0, 0.1, 0.2, 0.3]],
                [[5.0, 9.0, 1.0, 0.1, 0.2, 0.3], [5.0, -9.0, -1.0, 0.1, 0.2, 0.3]],
            ],
            dtype=torch.float64,
        )
    )
    why = choose(found, torch.tensor([0, 0, 0, 1, 1, 1]), verify=2, audit=1, seed=0)
    assert {index for index, reason in why.items() if reason == TOP} == {0, 5}
    assert {index for index, reason in why.items() if reason == FLAGGED} == {1}
    assert sum(reason == AUDIT for reason in why.values()) == 1


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 45), st.integers(0, 3))
def test_the_audit_is_spread_over_the_layers(n_items, n_layers, n, seed):
    layers = [index % n_layers for index in range(n_items)]
    drawn = draw(list(range(n_items)), layers, n, seed)
    assert len(drawn) == len(set(drawn)) == min(n, n_items)
    if n < n_items:
        for layer in range(n_layers):
            size = layers.count(layer)
            assert abs(sum(layers[i] == layer for i in drawn) - n * size / n_items) < 2


def test_every_row_has_the_same_chance_in_the_audit():
    layers = [0] * 3 + [1] * 9
    times = torch.zeros(12)
    for seed in range(3000):
        times[draw(list(range(12)), layers, 4, seed)] += 1
    assert times.min() / 3000 > 1 / 3 - 0.04
    assert times.max() / 3000 < 1 / 3 + 0.04


@pytest.mark.parametrize("n_true", [0, 1, 4, 15, 60])
def test_the_bound_on_missed_rows_holds_as_often_as_it_says(n_true):
    """Wherever the rows that count lie: all in one layer, or spread over all of them."""
    layers = [index // 8 for index in range(160)]
    for place in (list(range(n_true)), list(range(0, 160, 160 // max(1, n_true)))[:n_true]):
        # 0.9, and two standard errors of the simulation below
        assert how_often_the_bound_holds(layers, 32, place, 0.9) >= 0.87


def how_often_the_bound_holds(layers, n, true, confidence):
    held, everything = 0, list(range(len(layers)))
    for seed in range(400):
        found = len(set(draw(everything, layers, n, seed)) & set(true))
        held += len(true) - found <= most_missed(len(layers), n, found, confidence)
    return held / 400


@pytest.mark.parametrize(("n_layers", "n_heads", "n"), [(64, 8, 32), (26, 8, 13), (100, 2, 50)])
@pytest.mark.parametrize("every", [2, 4])
def test_the_bound_holds_where_every_second_layer_is_alike(n_layers, n_heads, n, every):
    """Steps of two layers, as local and global attention alternate in some models."""
    layers = [layer for layer in range(n_layers) for _ in range(n_heads)]
    true = [index for index, layer in enumerate(layers) if layer % every == 0]
    assert how_often_the_bound_holds(layers, n, true, 0.95) >= 0.93


def test_the_bound_is_not_careless():
    assert most_missed(238, 32, 0, 0.95) == 21
    assert most_missed(100, 100, 3, 0.95) == 0
    assert most_missed(100, 0, 0, 0.95) == 100
    assert most_missed(10, 5, 5, 0.95) == 5
    assert most_missed(1000, 500, 0, 0.95) < 7


def a_frame(effects, why, estimates=None):
    import pandas as pd

    given = effects if estimates is None else estimates
    return pd.DataFrame({"effect": effects, "why": why, "estimate": given})


def test_what_the_audit_says():
    nan = float("nan")
    effects = [5.0, -3.0, 0.5, 0.1, 0.2, -2.5, 0.3, nan, nan, nan, nan]
    why = [TOP] * 3 + [AUDIT] * 4 + [""] * 4
    found = audited(a_frame(effects, why), above=2.0, confidence=0.95).iloc[0]
    assert (found["found"], found["by_audit"], found["audited"], found["unverified"]) == (
        3,
        1,
        4,
        4,
    )
    assert found["missed"] == 1.0
    assert found["recall"] == 3 / 4
    assert found["missed_at_most"] == 4
    assert found["recall_at_least"] == 3 / 7
    default = audited(a_frame(effects, why), above=None, confidence=0.95).iloc[0]
    assert default["above"] == 0.5  # fewer than ten: the smallest verified


@pytest.mark.parametrize("above", [1.0, 0.0, None])
def test_no_effects_at_all_say_nothing_of_recall(above):
    frame = a_frame([0.0, 0.0, float("nan")], [TOP, AUDIT, ""])
    found = audited(frame, above=above, confidence=0.95).iloc[0]
    assert (found["found"], found["missed"], found["missed_at_most"]) == (0, 0, 1)
    assert math.isnan(found["recall"])
    assert math.isnan(found["spearman"])


def test_edits_that_change_nothing_have_no_effects():
    """No prompt has an offset of 30: every estimate and every effect is zero."""
    found = sp.screen(
        tiny_model(seed=1), "KnockOut({head}, 30)", metric="loss", prompts=random_tokens(4, 12),
        verify=3, audit=2,
    )  # fmt: skip
    assert (found.frame["estimate"] == 0).all()
    assert (found.frame["effect"].dropna() == 0).all()
    assert "about 0 and at most 3 (95%) have an effect other than zero." in found.remarks[1]
    assert "nan" not in found.remarks[1]


def test_q_counts_every_screened_row_where_prompts_are_not_split():
    from slashpatch.effects.statistics import false_discovery

    model = tiny_model(seed=1, layers=3)
    options = {"metric": "loss", "prompts": random_tokens(12, 12), "verify": 3, "audit": 2}
    alone = sp.screen(model, split=False, **options).frame
    chosen = alone[alone["why"].isin([TOP, FLAGGED])]
    padded = torch.cat([torch.tensor(chosen["p"].tolist()), torch.ones(12 - len(chosen))])
    assert chosen["q"].tolist() == pytest.approx(false_discovery(padded)[: len(chosen)].tolist())
    assert alone.loc[alone["why"].isin([AUDIT, ""]), "q"].isna().all()
    apart = sp.screen(model, **options).frame
    chosen = apart[apart["why"].isin([TOP, FLAGGED])]
    by_hand = false_discovery(torch.tensor(chosen["p"].tolist()))
    assert chosen["q"].tolist() == pytest.approx(by_hand.tolist())


# files


def test_a_screen_is_saved_and_loaded(tmp_path):
    model = tiny_model(seed=1)
    options = {"verify": 3, "audit": 2, **SMALL}
    path = tmp_path / "screen.json"
    made = sp.screen(model, offsets=[1, 2], make_edit="KnockOut({head}, {offset})", path=path,
                     **options)  # fmt: skip
    assert list(tmp_path.iterdir()) == [path]
    loaded = Result.load(path)
    assert loaded.kind == "screen"
    assert loaded.frame["why"].tolist() == made.frame["why"].tolist()
    assert (
        loaded.tables["audit"]["unverified"].tolist() == made.tables["audit"]["unverified"].tolist()
    )
    again = sp.screen(model, offsets=[1, 2], make_edit="KnockOut({head}, {offset})", path=path,
                      resume=True, **options)  # fmt: skip
    assert again.frame["effect"].dropna().tolist() == made.frame["effect"].dropna().tolist()
    with pytest.raises(SweepError, match="is of another"):
        sp.screen(model, path=path, resume=True, **{**options, "verify": 4})


def test_an_interrupted_screen_goes_on_where_it_stopped(tmp_path, monkeypatch):
    model, path = tiny_model(seed=1, layers=3), tmp_path / "screen.json"
    whole = sp.screen(model, verify=4, audit=3, **SMALL)
    run, calls = _Passes._run, itertools.count()

    def stop(self, *given):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return run(self, *given)

    monkeypatch.setattr(_Passes, "_run", stop)
    with pytest.raises(KeyboardInterrupt):
        sp.screen(model, verify=4, audit=3, path=path, **SMALL)
    journal = tmp_path / "screen.json.unfinished"
    rows = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    assert len(rows) == 4  # the clean run and three others
    ran = []
    monkeypatch.setattr(_Passes, "_run", lambda self, *given: ran.append(1) or run(self, *given))
    resumed = sp.screen(model, verify=4, audit=3, path=path, resume=True, **SMALL)
    assert len(ran) == (resumed.frame["why"] != "").sum() - 3
    assert resumed.frame.equals(whole.frame)
    assert not journal.exists()


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_a_finished_screen_that_is_loaded_answers_for_another_effect(tmp_path, suffix):
    model, path = tiny_model(seed=1), tmp_path / f"screen.{suffix}"
    options = {"verify": 3, "audit": 2, **SMALL}
    made = sp.screen(model, path=path, above=100.0, **options)
    assert made.tables["audit"]["found"].tolist() == [0]
    again = sp.screen(model, path=path, resume=True, above=0.0, **options)
    fresh = sp.screen(model, above=0.0, **options)
    assert again.tables["audit"].equals(fresh.tables["audit"])
    assert again.remarks == fresh.remarks
    assert again.frame.equals(fresh.frame)


def test_rows_of_the_journal_that_are_not_chosen_now_are_not_shown(tmp_path):
    """Rounding on another machine may choose others."""
    from slashpatch.data.journal import row

    model, path = tiny_model(seed=1, layers=3), tmp_path / "screen.json"
    whole = sp.screen(model, verify=4, audit=3, **SMALL)
    journal = tmp_path / "screen.json.unfinished"

    class Stop(Exception):
        pass

    def stop_at_the_end(self, target):
        raise Stop

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Result, "save", stop_at_the_end)
        with pytest.raises(Stop):
            sp.screen(model, verify=4, audit=3, path=path, **SMALL)
    done = {json.loads(line)["index"] for line in journal.read_text().splitlines()[1:]}
    other = next(index for index in range(12) if index not in done)
    with open(journal, "a") as file:
        file.write(json.dumps(row(other, [7.0, 7.0])) + "\n")
    resumed = sp.screen(model, verify=4, audit=3, path=path, resume=True, **SMALL)
    assert resumed.frame.equals(whole.frame)
