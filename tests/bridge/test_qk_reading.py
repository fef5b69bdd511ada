import pytest
import torch

from slashpatch.bridge import read, verify
from slashpatch.bridge.native import Native, NativeRuns
from slashpatch.errors import ModelError

from ..tiny import bridge, llama, tiny_model


def layers_of(model):
    return read(model).qk


def test_frequencies_are_read_from_the_rotary_module(tiny):
    for qk in read(tiny).qk:
        inv_freq = tiny.original_model.model.rotary_emb._original_component.inv_freq
        assert torch.equal(qk.rotary.inv_freq, inv_freq.double())
        assert (qk.rotary.pairing, qk.rotary.gain) == ("half", 1.0)
        assert qk.scale == pytest.approx(8**-0.5)


def test_frequencies_are_not_computed_from_the_config():
    model = llama(seed=1)
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 0.5
    assert layers_of(bridge(model))[0].rotary.inv_freq[0] == 0.5


class _AlwaysEqual(NativeRuns):
    """Reports that both attentions agree."""

    def _compare(self, layer, *args):
        return Native(layer, 0.0, 1.0)


@pytest.mark.parametrize("spoil", ["scale", "layout"])
def test_a_model_whose_queries_and_keys_do_not_reproduce_the_scores_is_refused(spoil, monkeypatch):
    model = tiny_model(seed=2)
    attention = model.blocks[1].attn
    if spoil == "scale":
        attention.hook_rot_q.forward = lambda x: x * 1.1
    else:  # an unknown layout of pairs: dimensions are permuted after RoPE
        attention.hook_rot_q.forward = lambda x: x.roll(1, -1)
    with pytest.raises(ModelError, match=r"layer 1: TransformerLens' attention .* differs by"):
        _ = read(model).qk
    monkeypatch.setattr(verify, "NativeRuns", _AlwaysEqual)  # as if Transformers computed the same
    with pytest.raises(ModelError, match=r"layer 1: they do not reproduce its scores \(largest"):
        _ = read(model).qk


def test_families():
    from transformers import (
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    sizes = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip
    qwen = Qwen3Config(**sizes, num_key_value_heads=2, head_dim=8)
    found = layers_of(bridge(Qwen3ForCausalLM(qwen).eval(), "q"))
    assert found[0].q.name.endswith("hook_q_normed")
    assert found[0].rotary.n_pairs == 4
    neox = layers_of(bridge(GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)).eval(), "n"))
    assert neox[0].rotary.n_pairs == 1  # a quarter of 8 dimensions


def test_low_precision_does_not_lead_to_a_wrong_layout():
    """Adjacent pairs in bfloat16, with rotated parts so small that both layouts nearly fit."""
    from transformers import GlmConfig, GlmForCausalLM

    torch.manual_seed(0)
    config = GlmConfig(
        vocab_size=80,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = GlmForCausalLM(config).eval()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight *= 20
            projection.weight.view(4, 8, -1)[:, :4] *= 0.3
    assert layers_of(bridge(model, "g"))[0].rotary.pairing == "adjacent"
    low = bridge(model.to(torch.bfloat16), "h")
    try:
        assert layers_of(low)[0].rotary.pairing == "adjacent"
    except ModelError as error:
        assert "load the model in float32" in str(error)  # noqa: PT017
