"""Bugs found in TransformerLens 4.3 and Transformers 5.23, each with a reproduction.

These tests assert what those libraries do, not what they should do. Where a test fails, the bug has
been fixed upstream, and the refusal or workaround in slashpatch can be removed.
"""

import pytest
import torch

import slashpatch as sp
from slashpatch.bridge import read
from slashpatch.errors import ModelError

from ..tiny import bridge, random_tokens
from ..zoo import FAMILIES, SIZES, Family, build

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.upstream,
]
FALCON = {**SIZES, "new_decoder_architecture": True, "multi_query": False, "alibi": False}
GROUPED_FALCON = {"num_kv_heads": 2, "multi_query": True}


def test_falcon_40b_is_split_in_the_wrong_places():
    """Its joint projection holds [queries of a group, key, value] group by group, but the bridge
    reads all queries, then all keys, then all values. Where the sizes fit, no error is raised.
    """
    family = Family("Falcon", {**FALCON, "num_kv_heads": 4})
    tokens = random_tokens(1, 12)
    with torch.no_grad():
        expected = build(family)(tokens).logits
        model = bridge(build(family), "falcon")
        assert not torch.allclose(model(tokens), expected, atol=1e-2)
    with pytest.raises(ModelError, match="layer 0: TransformerLens' attention .* differs by"):
        read(model)


def test_falcon_40b_with_grouped_heads_does_not_boot():
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        bridge(
            build(Family("Falcon", {**FALCON, "num_kv_heads": 2, "multi_query": True})), "falcon"
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_olmo_in_low_precision_needs_a_kv_cache(dtype):
    """Its tables of cos and sin are float32, and the bridge does not round rotated tensors back."""
    model = bridge(build(FAMILIES["OLMo"], dtype), "olmo")
    tokens = random_tokens(1, 8)
    with torch.no_grad():
        model.original_model(tokens)
        with pytest.raises(RuntimeError, match="same dtype"):
            model.original_model(tokens, use_cache=False)
    assert "use_cache" not in read(model).saving
    assert sp.scan(model, tokens, 1).scores.isfinite().all()


def test_olmo_in_float16_masks_float32_scores_with_the_lowest_float16():
    """Masked scores are therefore not the lowest number of their own dtype."""
    model, found = bridge(build(FAMILIES["OLMo"], torch.float16), "olmo"), []

    def keep(scores, hook):
        found.append(scores)

    with torch.no_grad():
        model.run_with_hooks(
            random_tokens(1, 5), fwd_hooks=[("blocks.0.attn.hook_attn_scores", keep)]
        )
    assert found[0].dtype == torch.float32
    assert -7e4 < float(found[0].min()) < -6e4


def test_gpt_j_runs_its_attention_natively():
    """Its scores hook carries another tensor, and what it returns is ignored."""
    model = bridge(build(FAMILIES["GPT-J"]), "gptj")
    tokens = random_tokens(1, 8)
    hook = ("blocks.0.attn.hook_attn_scores", lambda scores, hook: torch.zeros_like(scores))
    with torch.no_grad():
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[hook]), model(tokens))


#: Families in which compatibility mode changes log-probabilities.
FOLDED = ["Gemma", "Gemma 2", "Gemma 3", "OLMo", "StableLM", "StarCoder2", "GPT-OSS", "Cohere",
          "GPT-NeoX, Pythia"]  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_compatibility_mode_changes_predictions(name):
    """Folding norms and centring weights should not change log-probabilities."""
    tokens = random_tokens(1, 12)
    model = bridge(build(FAMILIES[name]), "folded")
    with torch.no_grad():
        before = model(tokens).log_softmax(-1)
        model.enable_compatibility_mode(disable_warnings=True)
        after = model(tokens).log_softmax(-1)
    assert float((after - before).abs().max()) > 1e-2


def test_compatibility_mode_of_partial_rotary_phi_fails():
    model = bridge(build(FAMILIES["Phi"]), "phi")
    with pytest.raises(RuntimeError, match="must match the size"):
        model.enable_compatibility_mode(disable_warnings=True)
        model(random_tokens(1, 5))


def test_eager_attention_in_float64_gives_nan_beside_padding():
    """Transformers: rows of padding have no key, and their NaN spreads to other rows."""
    model, tokens = build(FAMILIES["Llama"], torch.float64), random_tokens(1, 12)
    model.set_attn_implementation("eager")
    mask = torch.ones_like(tokens)
    mask[:, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask, position_ids=positions).logits
    assert logits[:, 4:].isnan().any()


def test_dynamic_rope_remembers_longer_prompts():
    """Transformers: logits of a prompt beyond the original context depend on earlier prompts."""
    model = build(FAMILIES["Llama, dynamic"])
    longest, middle = random_tokens(1, 94), random_tokens(1, 74)
    with torch.no_grad():
        fresh = model(middle).logits
        model(longest)
        assert not torch.allclose(model(middle).logits, fresh, atol=1e-3)


def test_longrope_gives_cached_keys_other_frequencies_than_new_ones():
    """Transformers: beyond the original context, cached generation differs from one full pass."""
    model = build(FAMILIES["Llama, LongRoPE"])
    tokens = random_tokens(1, 24)
    with torch.no_grad():
        whole = model(tokens).logits[:, -1]
        start = model(tokens[:, :10], use_cache=True)
        rest = model(tokens[:, 10:], past_key_values=start.past_key_values).logits[:, -1]
    assert not torch.allclose(rest, whole, atol=1e-2)
