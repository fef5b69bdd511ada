"""fit_ablation and ablations: the constants that hurt least, and the table of four ablations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slashpatch as sp
from slashpatch.effects.fit_ablation import minimised
from slashpatch.errors import EditError, MetricError, PromptError

from ..planted import induction_model
from ..tiny import random_tokens, tiny_model

HEADS = ["L0H1", "L1H2"]


@pytest.fixture(scope="module")
def tiny():
    return tiny_model()


@pytest.fixture(scope="module")
def fitted(tiny):
    return sp.fit_ablation(tiny, HEADS, random_tokens(6, 20), steps=40)


def loss(model, tokens, *edits):
    """The mean next-token loss, from the logits alone."""
    with torch.no_grad(), sp.patch(model, *edits):
        found = model(tokens).log_softmax(-1)
    return float(-found[:, :-1].gather(-1, tokens[:, 1:, None]).double().mean())


@settings(max_examples=25)
@given(st.integers(0, 999), st.integers(1, 3), st.integers(1, 5), st.floats(0.1, 10))
def test_the_least_of_a_quadratic_is_found(seed, n_heads, d_head, scale):
    generator = torch.Generator().manual_seed(seed)
    start, least = torch.randn(2, n_heads, d_head, generator=generator)
    least = start + scale * least
    weights = 0.5 + torch.rand(n_heads, d_head, generator=generator)

    def quadratic(z):
        return float((weights * (z - least) ** 2).sum()), 2 * weights * (z - least)

    unit = torch.full((n_heads,), scale)
    best, losses = minimised(quadratic, start, unit, 400, 0.3)
    assert losses[0] == quadratic(start)[0]
    assert quadratic(best)[0] == min(losses)
    assert min(losses) <= 0.02 * losses[0]


def test_a_fit_of_no_steps_is_mean_ablation(tiny):
    tokens = random_tokens(4, 16)
    made = sp.fit_ablation(tiny, HEADS, tokens, steps=0)
    means = {}

    def keep(z, hook):
        means[hook.layer()] = z.mean((0, 1))

    hooks = [(f"blocks.{layer}.attn.hook_z", keep) for layer in (0, 1)]
    with torch.no_grad():
        tiny.run_with_hooks(tokens, fwd_hooks=hooks)
    torch.testing.assert_close(made.z, torch.stack([means[0][1], means[1][2]]))
    assert len(made.losses) == 1


def test_on_the_prompts_of_the_fit_nothing_constant_is_better(tiny, fitted):
    tokens = random_tokens(6, 20)
    optimal = loss(tiny, tokens, sp.AblateHeads(HEADS, "optimal", constants=fitted))
    assert optimal == pytest.approx(min(fitted.losses), abs=1e-5)
    start = sp.fit_ablation(tiny, HEADS, tokens, steps=0)
    mean = loss(tiny, tokens, sp.AblateHeads(HEADS, "optimal", constants=start))
    assert mean == pytest.approx(fitted.losses[0], abs=1e-5)
    assert optimal < mean - 0.05
    assert optimal < loss(tiny, tokens, sp.AblateHeads(HEADS))


def test_the_fit_leaves_the_model_as_it_was(tiny):
    weights = list(tiny.original_model.parameters())
    weights[0].requires_grad_(False)
    try:
        before = [weight.requires_grad for weight in weights]
        tokens = random_tokens(2, 9)
        clean = loss(tiny, tokens)
        sp.fit_ablation(tiny, HEADS, tokens, steps=2)
        assert [weight.requires_grad for weight in weights] == before
        assert all(weight.grad is None for weight in weights)
        assert loss(tiny, tokens) == clean
    finally:
        weights[0].requires_grad_(True)


def test_both_engines_fit_the_same_constants(tiny, fitted):
    with sp.fused(tiny):
        fused = sp.fit_ablation(tiny, HEADS, random_tokens(6, 20), steps=40)
    torch.testing.assert_close(fused.z, fitted.z, atol=1e-3, rtol=1e-2)


def test_batches_do_not_change_the_fit(tiny):
    rows = [random_tokens(1, n, n)[0] for n in (9, 9, 12, 15)]
    one, several = (sp.fit_ablation(tiny, HEADS, rows, steps=4, batch_size=b) for b in (1, None))
    torch.testing.assert_close(one.z, several.z, atol=1e-4, rtol=1e-3)
    assert one.losses == pytest.approx(several.losses, abs=1e-5)


def test_the_fit_sees_active_patches(tiny):
    tokens = random_tokens(3, 12)
    with sp.patch(tiny, sp.KnockOut("L0H1", 0)):
        under = sp.fit_ablation(tiny, "L1H2", tokens, steps=1)
    assert under != sp.fit_ablation(tiny, "L1H2", tokens, steps=1)
    assert under.provenance["edits"] == ["KnockOut(L0H1, offsets=0)"]


def test_kl_is_fitted_against_the_clean_run(tiny, monkeypatch):
    tokens = random_tokens(3, 12)
    kept = sp.fit_ablation(tiny, HEADS, tokens, "kl", steps=5)
    assert min(kept.losses) < kept.losses[0]
    monkeypatch.setattr("slashpatch.effects.fit_ablation._KEPT_BYTES", 0)
    assert sp.fit_ablation(tiny, HEADS, tokens, "kl", steps=5).losses == kept.losses


def test_a_head_that_copies_cannot_be_replaced_by_a_constant():
    """The one that the planted circuit needs: no vector does its work; another head's is free."""
    model = induction_model()
    sizes = {"n_prompts": 6, "n_fit": 4, "max_tokens": 25, "steps": 15}
    result = sp.ablations(model, "L0H0", "copying", **sizes)
    effects = result.frame["effect"]
    assert (effects > 1).all()
    assert effects.iloc[3] < effects.min() + 0.01
    free = sp.ablations(model, "L0H1", "copying", **sizes).frame["effect"]
    assert free.abs().max() < 0.1


def test_four_ablations_in_one_table_on_prompts_that_the_fit_has_not_seen(tiny):
    tokens = random_tokens(12, 16)
    result = sp.ablations(tiny, HEADS, ("loss", "kl"), tokens, n_prompts=8, n_fit=4, steps=5)
    edits = list(dict.fromkeys(result.frame["edit"]))
    assert [sp_mode(edit) for edit in edits] == ["zero", "mean", "resample", "optimal"]
    assert set(result.frame["metric"]) == {"loss", "kl"}
    assert (result.frame["n"] == 8).all()
    assert len(result.tables["fit"]) == 6
    assert result.provenance["prompts"]["source"].endswith("held out")
    assert result.provenance["fit"]["prompts"]["n"] == 4
    assert not any("were seen" in remark for remark in result.remarks)


def sp_mode(edit):
    return next((mode for mode in ("mean", "resample", "optimal") if mode in edit), "zero")


def test_equal_prompts_go_to_one_side(tiny):
    rows = [*random_tokens(4, 10), *random_tokens(4, 10)]
    result = sp.ablations(tiny, "L0H1", "loss", rows, n_prompts=4, n_fit=4, steps=1)
    assert (result.frame["n"] == 4).all()
    assert not any("were seen" in remark for remark in result.remarks)


def test_measure_remarks_on_prompts_that_the_fit_has_seen(tiny, fitted):
    tokens = torch.cat([random_tokens(6, 20)[:2], random_tokens(6, 20, seed=5)])
    edit = sp.AblateHeads(HEADS, "optimal", constants=fitted)
    result = sp.measure(tiny, edit, "loss", tokens)
    assert "2 of the 8 prompts were seen" in result.remarks[0]
    assert sp.measure(tiny, edit, "loss", tokens[2:]).remarks == ()


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_fitted(tiny):
    tokens = random_tokens(3, 9)
    for metric, message in (
        ("top1", "no gradient"),
        ("slash", "reads the attention"),
        ("loss-by-position", "one number per prompt"),
        (sp.LogitDifference(5, 6), "better the higher"),
        ("lost", "no metric"),
    ):
        with pytest.raises(MetricError, match=message):
            sp.fit_ablation(tiny, HEADS, tokens, metric)
    with pytest.raises(EditError, match="at least one head"):
        sp.fit_ablation(tiny, [], tokens)
    with pytest.raises(EditError, match="steps"):
        sp.fit_ablation(tiny, HEADS, tokens, steps=-1)
    with pytest.raises(EditError, match="learning_rate"):
        sp.fit_ablation(tiny, HEADS, tokens, learning_rate=0)
    with pytest.raises(PromptError, match="cannot be split"):
        sp.ablations(tiny, HEADS, "loss", tokens)
