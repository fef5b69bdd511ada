import copy
import gc
import types

import pytest
import torch
from transformer_lens.model_bridge import RemoteBridge

import slashpatch as sp
from slashpatch.bridge import info, read, verify
from slashpatch.errors import ModelError

from ..tiny import bridge, llama, random_tokens, tiny_model


def test_reads_grouped_heads(tiny):
    found = read(tiny)
    assert (found.n_layers, found.n_heads, found.n_kv_heads, found.d_head) == (2, 4, 2, 8)


def test_reading_does_not_change_the_model():
    model = tiny_model(seed=3)
    tokens = random_tokens(1, 9)
    before = model(tokens)
    read(model)
    assert torch.equal(model(tokens), before)
    assert not any(point._forward_hooks for point in model.hook_points())


def test_reading_does_not_run_other_hooks():
    model, fired = tiny_model(seed=4), []
    model.add_hook("blocks.0.attn.hook_pattern", lambda tensor, hook: fired.append(1))
    read(model)
    assert not fired
    model(random_tokens(1, 3))
    assert fired


def test_a_model_is_verified_once(monkeypatch):
    model = tiny_model(seed=5)
    read(model)
    monkeypatch.setattr(verify, "verify_hooks", lambda *_: pytest.fail("verified twice"))
    read(model)


def test_a_model_can_be_freed():
    model = tiny_model(seed=6)
    read(model)
    sp.hooks(model, "KnockOut(L0H0, 1)")
    gc.collect()
    known = len(info._known)
    del model
    gc.collect()
    assert len(info._known) == known - 1


@pytest.mark.parametrize("thing", [None, "gpt2", torch.nn.Linear(2, 2)])
@pytest.mark.usefixtures("unchecked")
def test_anything_but_a_bridge_is_refused(thing):
    with pytest.raises(ModelError, match=r"expected a TransformerBridge, got .*slashpatch\.load"):
        sp.scan(thing)


@pytest.mark.usefixtures("unchecked")
def test_the_wrapped_model_alone_is_refused(tiny):
    with pytest.raises(ModelError, match="LlamaForCausalLM"):
        sp.scan(tiny.original_model)


class _Driver:
    """What a RemoteBridge asks of the process that runs the model, which none is here."""

    architecture = "LlamaForCausalLM"
    tokenizer = None
    supported_hook_points = frozenset({"blocks.0.attn.hook_pattern"})
    non_fireable_hook_points: frozenset[str] = frozenset()
    provides_sequence_logits = True

    def __init__(self, bridge_config):
        self.bridge_config = bridge_config

    def forward(self, input_ids=None, *, capture=(), intervene=None, max_new_tokens=1,
                return_logits=True, **kwargs):  # fmt: skip
        raise AssertionError("a refused model must not run")

    def close(self):
        pass

    def supports(self, feature):
        return False


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["RemoteBridge", "VendorBridge"])
def test_bridges_without_a_model_in_this_process_are_refused_by_name(tiny, name):
    cfg = copy.copy(tiny.cfg)
    adapter = types.SimpleNamespace(cfg=cfg, component_mapping={})
    kind = RemoteBridge if name == "RemoteBridge" else type(name, (RemoteBridge,), {})
    remote = kind(adapter, None, _Driver(cfg))
    for use in (read, sp.load, sp.scan, lambda model: sp.hooks(model, "KnockOut(L0H0, 1)")):
        with pytest.raises(ModelError, match=f"refuses {name}: .*another process.*slashpatch.load"):
            use(remote)


@pytest.mark.usefixtures("unchecked")
def test_a_transformers_model_must_be_loaded_first():
    hf_model = llama(seed=0)
    message = r"LlamaForCausalLM; slashpatch\.load\(model\) wraps a Transformers model"
    with pytest.raises(ModelError, match=message), sp.patch(hf_model, "KnockOut(L0H0, 1)"):
        pass
    with pytest.raises(ModelError, match=message):
        sp.scan(hf_model)


def test_training_mode_is_refused():
    model = tiny_model(seed=7)
    model.train()
    for use in (
        lambda: sp.scan(model, random_tokens(1, 8), [1]),
        lambda: sp.hooks(model, "KnockOut(L0H0, 1)"),
        lambda: sp.SlashMonitor(model),
    ):
        with pytest.raises(ModelError, match=r"training mode.*model\.eval\(\)"):
            use()


def test_gpt_j_is_refused_because_its_attention_hooks_are_read_only():
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(vocab_size=80, n_embd=32, n_layer=2, n_head=4, n_positions=32, rotary_dim=4)
    with pytest.raises(ModelError, match="refuses GPTJForCausalLM at layer 0: its scores hook"):
        read(bridge(GPTJForCausalLM(config).eval(), "j"))


def test_gpt2_without_rope_is_scanned():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = bridge(GPT2LMHeadModel(config).eval(), "2")
    scan = sp.scan(model, random_tokens(2, 20), [0, 1])
    assert scan.scores.shape == (2, 4, 2)


@pytest.mark.parametrize(
    ("method", "replacement", "message"),
    [
        ("hook_pattern", lambda x: x * 0.5 + 0.1, "looks at later tokens"),
        ("hook_pattern", lambda x: x**2, "not the softmax of its scores"),
        ("hook_attn_scores", lambda x: x * 1.5, "not the softmax of its scores"),
    ],
)
def test_a_model_whose_hook_carries_another_tensor_is_refused(method, replacement, message):
    """Scores or pattern are changed between the hook and the model's own computation."""
    model = tiny_model(seed=8)
    point = getattr(model.blocks[1].attn, method)
    if method == "hook_attn_scores":  # the softmax gets other scores than the hooks
        model.blocks[1].attn._masked_softmax = lambda scores, dtype=None: (
            torch.nn.functional.softmax(replacement(scores), -1, dtype=dtype)
        )
    else:
        point.forward = replacement
    with pytest.raises(ModelError, match=f"layer 1.*{message}"):
        read(model)


def test_nan_weights_are_refused():
    model = tiny_model(seed=9)
    with torch.no_grad():
        model.original_model.model.layers[1].self_attn.q_proj.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="layer 1"):
        read(model)
