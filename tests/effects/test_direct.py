"""Direct effects against logits computed by hand, and a model that repairs itself."""

import pytest
import torch

import slashpatch as sp
from slashpatch.effects.directly.final_norm import FinalNorm, read_final_norm
from slashpatch.errors import EditError, MetricError, ModelError

from ..planted import _OUTPUT, _TOKEN, Circuit, induction_model
from ..tiny import bridge, random_tokens, tiny_model
from ..zoo import zoo

RIGHT_WRONG = sp.LogitDifference(10, 20)


def parts(found, column="effect"):
    """A number of each part, of a result of one edit."""
    return dict(zip(found.frame["part"], found.frame[column], strict=True))


def final_norm_by_hand(module, x, change):
    """Output of a norm for x, and its change by a change of x with the scale held."""
    centred = isinstance(module, torch.nn.LayerNorm)
    if centred:
        x, change = (t - t.mean(-1, keepdim=True) for t in (x, change))
    weight = 1 + module.weight if "Gemma" in type(module).__name__ else module.weight
    bias = module.bias if centred else 0.0
    eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
    scale = (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return weight * x / scale + bias, weight * change / scale


@pytest.mark.parametrize("heads", [["L0H1"], ["L1H2"], ["L0H1", "L0H3", "L1H0"]])
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "GPT-NeoX, Pythia", "Gemma", "GPT-2"])
def test_the_direct_effect_is_that_of_logits_by_hand(name, heads):
    """Zero ablation takes W_O z from the final residual stream, through a norm of fixed scale."""
    model, tokens = zoo(name), random_tokens(3, 12)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        x = cache["ln_final.hook_in"]
        change = torch.zeros_like(x)
        for head in sp.heads(heads):
            z = cache[f"blocks.{head.layer}.attn.hook_z"][:, :, head.head]
            change -= z @ model.blocks[head.layer].attn.W_O[head.head]
        y, dy = final_norm_by_hand(model.ln_final.original_component, x, change)
        unembed = model.original_model.get_output_embeddings().weight
        assert (y @ unembed.T - logits).abs().max() < 1e-4
        after = (logits + dy @ unembed.T)[:, -1]
        before = logits[:, -1]
    expected = ((after[:, 10] - after[:, 20]) - (before[:, 10] - before[:, 20])).mean()
    edit = sp.AblateHeads(heads)
    found = parts(sp.direct_effect(model, edit, RIGHT_WRONG, tokens))
    assert found["direct"] == pytest.approx(float(expected), abs=1e-4)
    assert found["repair"] == pytest.approx(found["total"] - found["direct"])
    total = sp.measure(model, edit, [RIGHT_WRONG], tokens).frame["effect"][0]
    assert found["total"] == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize(
    "name",
    ["Cohere", "GPT-NeoX, Pythia", "Falcon", "Phi", "Gemma 2", "OLMo 2", "Granite", "Mixtral",
     "GPT-OSS", "Nemotron", "GLM", "HunYuan"],
)  # fmt: skip
def test_what_holds_in_every_family(name):
    model, tokens = zoo(name), random_tokens(3, 12)
    nothing = sp.direct_effect(model, "ScaleOffsets(L0H1, 1, factor=1)", "loss", tokens)
    assert nothing.frame["effect"].abs().max() < 1e-5
    edit = "KnockOut(L1H1, (0, 1))"
    found = parts(sp.direct_effect(model, edit, "loss", tokens))
    assert abs(found["direct"]) > 1e-6
    if name in ("Cohere", "GPT-NeoX, Pythia", "Falcon", "Phi"):
        # Attention and MLP read the same input, so nothing comes after the last layer's attention.
        assert found["direct, new norm"] == pytest.approx(found["total"], abs=1e-5)
    one_by_one = parts(sp.direct_effect(model, edit, "loss", tokens, batch_size=1))
    assert one_by_one == pytest.approx(found, abs=1e-5)
    with sp.fused(model):
        fused = parts(sp.direct_effect(model, edit, "loss", tokens))
    assert fused == pytest.approx(found, abs=1e-5)
    assert not any(point._forward_hooks for point in model.hook_points())


def test_the_effects_of_layers_add_up():
    """Each edited layer has clean inputs, so the direct effect on logits is the layers' sum."""
    model, tokens = tiny_model(seed=2, layers=3), random_tokens(3, 12)
    edits = ["KnockOut(L0H1, 1)", "ShiftSlash(L1H2, by=1)", "AblateHeads('L2H0')"]
    found = sp.direct_effect(model, [*edits, edits], RIGHT_WRONG, tokens).frame
    direct = found[found["part"] == "direct"]["effect"].tolist()
    assert sum(direct[:3]) == pytest.approx(direct[3], abs=1e-4)
    total = found[found["part"] == "total"]["effect"].tolist()
    assert abs(sum(total[:3]) - total[3]) > 1e-3


def repairing_model():
    """L0H0 says the token before; layer 1 takes away whatever has been said."""
    made = Circuit(2)
    made.looks_back(0, 0, 1)
    made.copies(0, 0, _TOKEN, _OUTPUT)
    made.looks_back(1, 0, 0)
    made.copies(1, 0, _OUTPUT, _OUTPUT)
    model = bridge(made.model, "repairing")
    tokens = random_tokens(1, 20)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        said, more = (
            cache[f"blocks.1.{at}"][0, 5:, _OUTPUT] for at in ("hook_in", "hook_attn_out")
        )
        made.parts(1, 0)[3].mul_(-float((said * said).sum() / (said * more).sum()))
    return model


def test_a_model_that_repairs_itself():
    """Layer 1 cancels what L0H0 writes: the total effect is nothing, and the direct effect is."""
    model, tokens = repairing_model(), random_tokens(8, 20, seed=5)
    tokens[:, -2], tokens[:, -1] = 10, 30
    found = sp.direct_effect(model, sp.KnockOut("L0H0", 1), RIGHT_WRONG, tokens)
    effects = parts(found)
    assert effects["direct"] < -5
    assert abs(effects["total"]) < 0.02 * abs(effects["direct"])
    assert effects["repair"] == pytest.approx(-effects["direct"], rel=0.02)
    assert parts(found, "repaired")["repair"] == pytest.approx(1, abs=0.02)
    assert parts(found, "repaired_low")["repair"] > 0.9
    assert "undo 100% of the direct effect" in found.remarks[0]


def test_a_circuit_is_not_direct():
    """L0H0 writes what L1H2 reads: its effect on copying is total, and not direct."""
    result = sp.direct_effect(
        induction_model(), ["KnockOut(L0H0, 1)", "AblateHeads(L1H2)"], "copying", n_prompts=6
    )
    assert "larger through later layers than directly" in result.remarks[0]
    assert result.frame["repaired"].notna().sum() <= 1
    found = result.frame.set_index(["edit", "part"])["effect"]
    first, second = found.loc["KnockOut(L0H0, offsets=1)"], found.loc["AblateHeads(L1H2)"]
    assert abs(first["direct"]) < 1e-3
    assert first["total"] == pytest.approx(first["repair"])
    assert first["total"] > 5
    assert second["direct"] == pytest.approx(second["total"], rel=1e-3)


def test_active_patches_are_part_of_the_clean_run(tiny):
    tokens = random_tokens(2, 10)
    with sp.patch(tiny, "FreezeBand(L0H1, high)", "KnockOut(L1H2, 0)"):
        found = parts(sp.direct_effect(tiny, "AblateHeads(L1H0)", "loss", tokens))
        total = sp.measure(tiny, "AblateHeads(L1H0)", ["loss"], tokens).frame["effect"][0]
    assert found["total"] == pytest.approx(total, abs=1e-5)


def test_metrics_of_several_numbers(tiny):
    found = sp.direct_effect(tiny, "AblateHeads(L1H0)", "loss-by-position", random_tokens(3, 6))
    assert len(found.frame) == 4 * 5
    assert set(found.frame["of"]) == set("01234")
    assert sp.direct_effect(tiny, "AblateHeads(L1H0)", "kl", random_tokens(3, 6)).frame["effect"][2]


def test_what_cannot_be_held_is_refused(tiny, monkeypatch):
    tokens = random_tokens(2, 8)
    with pytest.raises(MetricError, match="reads attention"):
        sp.direct_effect(tiny, "AblateHeads(L0H0)", "slash", tokens)
    with pytest.raises(EditError, match="expected an edit"):
        sp.direct_effect(tiny, [], "loss", tokens)
    x = torch.randn(2, 3, 32)
    with pytest.raises(ModelError, match="neither a LayerNorm nor an RMSNorm"):
        read_final_norm(tiny, x, x.tanh())
    wrong = FinalNorm(torch.ones(32).double(), torch.zeros(32).double(), 0.0, False)
    monkeypatch.setattr("slashpatch.effects.direct.read_final_norm", lambda *args: wrong)
    monkeypatch.setattr(FinalNorm, "change", lambda self, x, change: change.double())
    with pytest.raises(ModelError, match="a final norm with a changed input differ"):
        sp.direct_effect(tiny, "AblateHeads(L0H0)", "loss", tokens)


@pytest.mark.parametrize("site", ["blocks.1.hook_in", "blocks.0.hook_out", "blocks.1.hook_out"])
def test_a_residual_stream_that_does_more_is_refused(tiny, site):
    """Where something scales the residual stream between blocks, no direct effect is defined."""
    edit, tokens = "AblateHeads(L0H0)", random_tokens(2, 8)
    with tiny.hooks(fwd_hooks=[(site, lambda x, hook: 0.9 * x)]):
        with pytest.raises(ModelError, match="does not reach the final norm as it is"):
            sp.direct_effect(tiny, edit, "loss", tokens)
    sp.direct_effect(tiny, edit, "loss", tokens)
