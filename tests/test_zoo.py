"""The whole contract over every family, in every dtype; and inputs that families differ on."""

import dataclasses
import functools

import pytest
import torch
from transformer_lens.model_bridge.supported_architectures.gemma3n import (
    Gemma3nArchitectureAdapter,
)

import slashpatch as sp
from slashpatch.bridge import read
from slashpatch.bridge.frequencies import kept_frequencies
from slashpatch.checking.check import check
from slashpatch.checking.result import CONTRACTS
from slashpatch.errors import ModelError, ScanError
from slashpatch.maths.precision import rounding

from .tiny import bridge, padded, random_tokens, tokenizer
from .zoo import FAMILIES, HEADER, LONG, N_CTX, N_LAYERS, Family, build, in_page, report, row, zoo
from .zoo import rope as rope_of

pytestmark = pytest.mark.filterwarnings("ignore")
SUPPORTED = [name for name in FAMILIES if not FAMILIES[name].refused]
WITH_ROPE = [name for name in SUPPORTED if name != "GPT-2"]
each_family = pytest.mark.parametrize("name", SUPPORTED)
each_rope = pytest.mark.parametrize("name", WITH_ROPE)
LIVE = [name for name in SUPPORTED if "prompt's length" in FAMILIES[name].about]


#: One of each mechanism: scaled and live frequencies, windows, caps, sinks, norms before and after
#: RoPE, clips, wide tables, joint and partial projections, layers without RoPE, experts.
IN_BFLOAT16 = ["Llama", "Llama, YaRN", "Llama, LongRoPE", "Gemma 2", "Gemma 3", "GPT-NeoX, Pythia",
               "OLMo", "OLMo 2", "Cohere 2", "GLM", "GPT-OSS", "SmolLM3", "HunYuan", "Qwen3-MoE",
               "GPT-2"]  # fmt: skip
#: float16 where it is not like bfloat16: masks, sinks, wide tables of cos and sin, capped scores.
IN_FLOAT16 = ["GPT-OSS", "Gemma 2", "OLMo 2", "HunYuan"]
CASES = [
    *((name, torch.float32) for name in FAMILIES),
    *(
        pytest.param(name, dtype, marks=() if name == "GPT-OSS" else pytest.mark.exhaustive)
        for names, dtype in ((IN_BFLOAT16, torch.bfloat16), (IN_FLOAT16, torch.float16))
        for name in names
    ),
]


@pytest.mark.usefixtures("unchecked")  # types are checked in the other tests; this one is long
@pytest.mark.parametrize(("name", "dtype"), CASES, ids=lambda one: str(one))
def test_the_contract(name, dtype):
    if dtype == torch.float32:
        assert row(name) in in_page()[1].splitlines(), "run `make families`"
    if not FAMILIES[name].wrapped:
        with pytest.raises(ModelError, match=FAMILIES[name].refused):
            sp.load(build(FAMILIES[name], dtype))
        return
    found = report(name, dtype)
    assert found.ok, str(found)
    refused = [one for one in found.checks if one.status == "refused"]
    if FAMILIES[name].refused:
        assert [one.contract for one in found.checks] == ["hooks"]
        assert FAMILIES[name].refused in refused[0].detail
        return
    assert {one.contract for one in found.checks} == set(CONTRACTS)
    if name == "HunYuan":
        assert [(one.contract, one.subject) for one in refused] == [("edits", "PlantSlash")]
        return
    if name != "GPT-2":
        assert not refused, str(found)
        return
    assert all("no RoPE" in one.detail or "no layer has RoPE" in one.detail for one in refused)
    assert len(refused) == 8


def test_the_page_of_families_has_a_row_for_each():
    lines = in_page()[1].splitlines()
    assert lines[:2] == HEADER
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == list(FAMILIES)


@each_family
def test_the_bridge_computes_what_transformers_does(name):
    """The bridge's logits equal those of the Transformers model that it wraps."""
    tokens = random_tokens(2, 20)
    with torch.no_grad():
        expected = build(FAMILIES[name])(tokens).logits
        found = bridge(build(FAMILIES[name]), "fresh")(tokens)
    # Two orders of the same float32 sums.
    limit = 1e3 * rounding(torch.float32) * float(expected.abs().max())
    assert float((found - expected).abs().max()) < limit


@each_family
def test_frequencies_and_pairs(name):
    family, layers = FAMILIES[name], read(zoo(name)).qk
    assert len(layers) == N_LAYERS
    last = layers[-1].rotary
    assert (last.pairing if last else "") == family.pairing
    own = [b for n, b in zoo(name).original_model.named_buffers() if n.endswith("inv_freq")]
    for qk in layers:
        if qk.rotary:
            assert any(torch.equal(qk.rotary.inv_freq, buffer.double()) for buffer in own)
        assert (qk.live is not None) == (name in LIVE)
    if name == "Gemma 3":
        assert not torch.equal(layers[0].rotary.inv_freq, layers[1].rotary.inv_freq)
    if "YaRN" in name or "YaRN" in family.about:
        assert last.gain > 1


@each_rope
@pytest.mark.parametrize("n_tokens", [12, 40])
def test_other_frequencies_are_those_of_a_model_that_has_them(name, n_tokens):
    """`SetFrequencies` on all heads against a model whose rotary module was changed."""
    model, tokens = bridge(build(FAMILIES[name]), "one"), random_tokens(2, n_tokens)
    other = bridge(build(FAMILIES[name]), "other")
    for module in other.original_model.modules():
        for buffer, values in module.named_buffers(recurse=False):
            if "inv_freq" in buffer:  # the original too, which dynamic RoPE goes back to
                values.mul_(0.5)
        if name.endswith("LongRoPE") and hasattr(module, "original_inv_freq"):
            module.long_inv_freq = 0.5 * _long_frequencies(module)
    edits = [
        sp.SetFrequencies([(qk.layer, head) for head in range(4)], _halved)
        for qk in read(model).qk
        if qk.rotary
    ]
    with torch.no_grad():
        expected = other(tokens)
        with sp.patch(model, *edits):
            found = model(tokens)
        assert not torch.allclose(model(tokens), expected, atol=1e-2)
    torch.testing.assert_close(found, expected, atol=2e-4 * float(expected.abs().max()), rtol=0)


def _halved(theta):
    return 0.5 * theta


def _long_frequencies(module):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    return ROPE_INIT_FUNCTIONS["longrope"](module.config, "cpu", seq_len=17)[0]


@each_rope
def test_a_shifted_head_scores_as_from_other_positions(name):
    """With equal vectors, the shifted logit at offset Δ + 2 equals the clean logit at Δ."""
    model = zoo(name)
    qk = next(one for one in read(model).qk if one.rotary)
    tokens = torch.full((1, 10), 7)  # one token again and again: one query, one key
    found = {}

    def keep(scores, hook):
        found[hook.name] = scores[0, 1].detach().double()

    hook = (f"blocks.{qk.layer}.attn.hook_attn_scores", keep)
    if qk.layer:
        pytest.skip("vectors are equal for equal tokens in the first layer only")
    if name == "HunYuan":
        pytest.skip("normed after RoPE: its logits depend on where tokens stand")
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[hook])
        clean = found.pop(hook[0])
        with sp.patch(model, sp.ShiftSlash((qk.layer, 1), 2)):
            model.run_with_hooks(tokens, fwd_hooks=[hook])
    shifted = found[hook[0]]
    size = float(clean.masked_fill(clean < -1e4, 0).abs().max())
    for offset in (2, 3, 4):  # what offset Δ had is now at Δ + 2
        before, after = clean.diagonal(2 - offset).max(), shifted.diagonal(-offset).max()
        assert float((before - after).abs()) < 1e-4 * max(size, 1)


@each_family
def test_a_prompt_of_one_token(name):
    scan = sp.scan(zoo(name), torch.tensor([[5]]), [0])
    most = 1.0
    assert bool((scan.scores <= most + 1e-6).all())
    if name != "GPT-OSS":  # whose sink takes a share
        torch.testing.assert_close(scan.scores, torch.ones_like(scan.scores), atol=1e-5, rtol=0)
    with torch.no_grad(), sp.patch(zoo(name), sp.KnockOut("L0H1", 1)):
        assert zoo(name)(torch.tensor([[5]])).isfinite().all()


@each_family
def test_a_batch_of_eight_is_eight_prompts(name):
    model = zoo(name)
    rows = [random_tokens(1, n, seed=n)[0] for n in (12, 9, 14, 12, 5, 3, 15, 11)]
    together = sp.scan(model, rows, range(3), batch_size=8)
    apart = sp.scan(model, rows, range(3), batch_size=1)
    # Sums of float32 weights in another order.
    torch.testing.assert_close(together.scores, apart.scores, atol=1e-5, rtol=0)


@each_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_long_padded_prompts_beyond_a_window(name, side):
    """Under an edit, in both engines: the edited logits of each prompt alone."""
    if name in LIVE:
        pytest.skip("prompts batched together rotate by the length of the longest")
    model, edit = zoo(name), sp.ScaleOffsets(["L0H1", "L1H2"], [1, 3], 3.0)
    rows = [random_tokens(1, n, seed=n)[0] for n in (21, 12)]
    tokens, mask = padded(rows, side)
    kwargs = {"attention_mask": mask}
    if side == "left":
        kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), sp.patch(model, edit):
        alone = [model.original_model(row[None]).logits[0] for row in rows]
        both = model.original_model(tokens, **kwargs).logits
        with sp.fused(model):
            fused = model.original_model(tokens, **kwargs).logits
    for place, expected in enumerate(alone):
        real, limit = mask[place].bool(), 2e-4 * float(expected.abs().max())
        torch.testing.assert_close(both[place][real], expected, atol=limit, rtol=0)
        torch.testing.assert_close(fused[place][real], expected, atol=limit, rtol=0)


@each_rope
def test_positions_beyond_the_trained_context(name):
    """Twice the context: both engines agree under an edit, and a cached pass with a whole one."""
    model, tokens = zoo(name), random_tokens(1, 2 * N_CTX)
    layer = next(qk.layer for qk in read(model).qk if qk.rotary)
    edit = sp.FreezeBand((layer, 1), "pairs 1")
    with torch.no_grad(), kept_frequencies(model), sp.patch(model, edit):
        whole = model.original_model(tokens).logits
        with sp.fused(model):
            fused = model.original_model(tokens).logits
        limit = 5e-4 * float(whole.abs().max())
        torch.testing.assert_close(fused, whole, atol=limit, rtol=0)
        if name in LIVE:
            return  # the model itself gives cached keys other frequencies than new ones
        start = model.original_model(tokens[:, :100], use_cache=True)
        rest = model.original_model(tokens[:, 100:], past_key_values=start.past_key_values)
        torch.testing.assert_close(rest.logits, whole[:, 100:], atol=limit, rtol=0)


def test_values_that_only_other_prompts_clip_are_clipped():
    """OLMo whose clip no token of a short probe reaches: still read after it."""
    config = {**FAMILIES["OLMo"].config, "clip_qkv": 1e4}
    model = bridge(build(Family("Olmo", config)), "olmo")
    assert all(qk.q.after_rope and qk.k.after_rope for qk in read(model).qk)


@pytest.mark.parametrize("name", ["HunYuan", "OLMo"])
def test_heads_read_after_rope_leave_the_others_alone(name):
    """Un-rotating, editing and rotating again keeps other heads' values bit for bit."""
    model, tokens, found = zoo(name), random_tokens(2, 12), []

    def keep(z, hook):
        found.append(z.clone())

    hook = ("blocks.0.attn.hook_z", keep)
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[hook])
        with sp.patch(model, "ShiftSlash(L0H1, by=1)", "FreezeBand(L0H1, band='pairs 0')"):
            model.run_with_hooks(tokens, fwd_hooks=[hook])
    others = [0, 2, 3]
    assert torch.equal(found[0][:, :, others], found[1][:, :, others])
    assert not torch.equal(found[0][:, :, 1], found[1][:, :, 1])


@pytest.mark.parametrize("name", LIVE)
def test_frequencies_follow_the_prompt(name):
    """Each edit acts on the frequencies of its own pass."""
    model = bridge(build(FAMILIES[name]), "live")
    short, long = random_tokens(1, 10), random_tokens(1, N_CTX + 6)
    qk = read(model).qk[0]
    with torch.no_grad():
        model(short)
        few = qk.current().inv_freq
        model(long)
        many = qk.current().inv_freq
        assert torch.equal(few, qk.rotary.inv_freq)
        assert not torch.equal(few, many)
        tables, found = {}, {}

        def table(tensor, hook):
            tables[hook.name.rsplit("_", 1)[1]] = tensor.double()

        hooks = [("blocks.0.attn.hook_cos", table), ("blocks.0.attn.hook_sin", table)]
        model.run_with_hooks(long, fwd_hooks=hooks)
        angle = torch.atan2(tables["sin"], tables["cos"])[0, 1, : len(many)]
        torch.testing.assert_close(angle, many, atol=1e-6, rtol=1e-5)
        edits = [sp.FreezeBand("L0H1", f"pairs 0-{len(many) - 1}")]
        with sp.patch(model, *edits):  # no pair turns: the same scores wherever the tokens stand

            def keep(scores, hook):
                found[len(found)] = scores[0, 1].double()

            repeated = torch.full((1, N_CTX + 6), 7)
            model.run_with_hooks(repeated, fwd_hooks=[("blocks.0.attn.hook_attn_scores", keep)])
        below = found[0].masked_select(torch.ones(2 * (N_CTX + 6,)).tril().bool())
        assert float(below.max() - below.min()) < 1e-4 * max(1.0, float(below.abs().max()))


@pytest.mark.parametrize("name", LIVE)
def test_an_identity_is_one_beyond_the_context_too(name):
    model, tokens = bridge(build(FAMILIES[name]), "same"), random_tokens(1, N_CTX + 6)
    for theta in (lambda theta: theta, "L1H0"):
        with torch.no_grad():
            model(tokens)
            expected = model(tokens)
            with sp.patch(model, sp.SetFrequencies(["L0H0", "L1H1"], theta)):
                torch.testing.assert_close(model(tokens), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_with_frequencies_of_their_own_that_begin_alike(kind, dtype):
    """θ of one type of layer follows the prompt's length; on a short one both types agree."""
    full = {"rope_type": kind, "rope_theta": 1e4}
    full |= {"factor": 4.0} if kind == "dynamic" else LONG["rope_parameters"]
    own = {"full_attention": full, "sliding_attention": rope_of("default")["rope_parameters"]}
    gemma = FAMILIES["Gemma 3"]
    family = dataclasses.replace(gemma, config={**gemma.config, "rope_parameters": own})
    model = bridge(build(family, dtype), "gemma")
    layers = read(model).qk
    assert layers[0].live is None
    assert layers[1].live[1] == "full_attention_inv_freq"
    before = [qk.rotary.inv_freq.clone() for qk in layers]
    with torch.no_grad(), kept_frequencies(model):
        model(random_tokens(1, N_CTX + 20))
        assert not torch.equal(layers[1].current().inv_freq, before[1])
    assert all(torch.equal(qk.rotary.inv_freq, own) for qk, own in zip(layers, before, strict=True))
    assert torch.equal(layers[1].current().inv_freq, before[1])  # kept


@pytest.mark.parametrize("name", LIVE)
def test_profiles_over_different_frequencies_are_refused(name):
    model = bridge(build(FAMILIES[name]), "mixed")
    rows = [random_tokens(1, n)[0] for n in (10, N_CTX)]
    if "dynamic" in name:
        model.cfg.n_ctx *= 2  # its frequencies change beyond the context
        rows[1] = random_tokens(1, N_CTX + 6)[0]
    with pytest.raises(ScanError, match=r"follow the prompt's length.*moments=False"):
        sp.scan(model, rows, 1)
    assert sp.scan(model, rows, 1, moments=False).scores.isfinite().all()
    assert sp.scan(model, rows[:1], 1).profile("L0H0").predicted.isfinite().all()


def test_reading_a_dynamic_model_leaves_its_memory_alone():
    """It remembers the longest prompt that it saw, which a short pass of ours would reset."""
    model = bridge(build(FAMILIES["Llama, dynamic"]), "memory")
    long, middle = random_tokens(1, N_CTX + 30), random_tokens(1, N_CTX + 10)
    with torch.no_grad():
        model(long)
        expected = model(middle)
        model(long)
        _ = read(model).qk
        check(model)
        assert torch.equal(model(middle), expected)


def _tables(model, change):
    """The model with other cos and sin tables."""
    rotary = model.model.rotary_emb
    forward = rotary.forward

    @functools.wraps(forward)
    def changed(x, position_ids):
        return change(*forward(x, position_ids), position_ids[..., None])

    rotary.forward = changed
    return bridge(model, "strange")


THETA = 1e4 ** (-torch.arange(8) / 8)
STRANGE = {
    "the two halves of a pair turn by different angles": lambda cos, sin, at: (
        torch.cat([cos[..., :8], cos[..., 8:].flip(-1)], -1),
        torch.cat([sin[..., :8], sin[..., 8:].flip(-1)], -1),
    ),
    "angles that grow with the square of the position": lambda cos, sin, at: (
        (at**2 * torch.cat([THETA, THETA])).cos(),
        (at**2 * torch.cat([THETA, THETA])).sin(),
    ),
    "keys and queries that shrink with the position": lambda cos, sin, at: (
        cos / (1 + at),
        sin / (1 + at),
    ),
}


@pytest.mark.parametrize("what", STRANGE)
def test_a_rotary_layout_that_nobody_has_is_refused(what):
    model = _tables(build(FAMILIES["Llama"]), STRANGE[what])
    with pytest.raises(ModelError, match="layer 0: they do not reproduce its scores"):
        _ = read(model).qk
    with (
        pytest.raises(ModelError, match="do not reproduce"),
        sp.patch(model, "ShiftSlash(L0H1, 1)"),
    ):
        pass
    report = check(model)
    assert report.ok  # nothing is wrong: what it cannot do, it says
    assert report.status("q, k and RoPE") == "refused"
    assert report.status("edits") == "part"
    assert sp.scan(model, random_tokens(1, 9), 1).moments is None


@pytest.mark.parametrize("processed", [True, False])
@pytest.mark.parametrize("name", ["Qwen3", "Phi-3", "GPT-2"])
def test_compatibility_mode(name, processed):
    """Works with and without folded weights, but for the fused engine.

    Families whose predictions TransformerLens' own folding changes stand in test_upstream.py.
    """
    tokens = random_tokens(1, 12)
    model = bridge(build(FAMILIES[name]), "compatible")
    with torch.no_grad():
        before = model(tokens).log_softmax(-1)
        model.enable_compatibility_mode(disable_warnings=True, no_processing=not processed)
        after = model(tokens).log_softmax(-1)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
    report = check(model)
    assert report.ok, str(report)
    assert report.status("hooks") == "pass"
    folded = processed and name != "Qwen3"
    assert report.status("attention") == ("refused" if folded else "pass")
    fused = [one for one in report.checks if one.contract == "fused"]
    assert [one.status for one in fused] == ["refused"]
    assert "compatibility mode" in fused[0].detail
    with sp.patch(model, sp.KnockOut("L1H2", 1)):
        scan = sp.scan(model, tokens, [1])
    assert float(scan.scores[1, 2, 0]) == 0


def test_a_norm_after_rope_has_no_profile_by_offset():
    """Its logits depend on where tokens stand, so what would be predicted does not exist."""
    scan = sp.scan(zoo("HunYuan"), random_tokens(2, 20), 1)
    with pytest.raises(ModelError, match="norms queries and keys after RoPE"):
        scan.profile("L0H1")
    assert sp.explain(zoo("HunYuan"), "L0H1", random_tokens(2, 20)).profile is None
    even = build(FAMILIES["HunYuan"])
    with torch.no_grad():
        for layer in even.model.layers:
            layer.self_attn.query_layernorm.weight.fill_(1.5)
            layer.self_attn.key_layernorm.weight.fill_(0.7)
    model = bridge(even, "even")
    profile = sp.scan(model, torch.full((1, 20), 5), 1).profile("L0H1")
    torch.testing.assert_close(profile.predicted, profile.measured, atol=1e-4, rtol=0)
    with torch.no_grad(), sp.patch(model, sp.PlantSlash("L0H1", 2, 30.0)):
        scan = sp.scan(model, random_tokens(2, 20), range(4))
    assert float(scan.scores[0, 1].argmax()) == 2


@pytest.mark.parametrize(
    ("name", "architecture"), [("Gemma 4", "Gemma4ForCausalLM"), ("GPT-J", "GPTJForCausalLM")]
)
def test_attention_that_hooks_cannot_change_is_refused_by_name(name, architecture):
    """TransformerLens shows what Transformers computed, and drops what hooks return."""
    model, tokens = zoo(name), random_tokens(1, 9)
    message = f"refuses {architecture} at layer 0: its scores hook fires after.*no hook can"
    with pytest.raises(ModelError, match=message):
        sp.scan(model, tokens, 1)
    with torch.no_grad():
        hooks = [("blocks.0.attn.hook_pattern", lambda pattern, hook: torch.zeros_like(pattern))]
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=hooks), model(tokens))


def test_the_multimodal_gemma_3n_is_refused_by_name(monkeypatch):
    """The class that TransformerLens does wrap, here without its towers for images and sound."""
    from transformers import Gemma3nConfig, Gemma3nForConditionalGeneration
    from transformers.models.gemma3n import modeling_gemma3n

    from_config = modeling_gemma3n.AutoModel.from_config

    def without_towers(config, **kwargs):
        if config.model_type in ("gemma3n_vision", "gemma3n_audio"):
            return torch.nn.Identity()
        return from_config(config, **kwargs)

    monkeypatch.setattr(modeling_gemma3n.AutoModel, "from_config", without_towers)
    monkeypatch.setattr(Gemma3nArchitectureAdapter, "required_libraries", [])
    config = Gemma3nConfig(text_config=FAMILIES["Gemma 3n"].config)
    model = sp.load(Gemma3nForConditionalGeneration(config), tokenizer=tokenizer())
    message = r"Gemma3nForConditionalGeneration has no hook blocks\.0\.attn\.hook_attn_scores"
    with pytest.raises(ModelError, match=message):
        sp.scan(model, random_tokens(1, 9), 1)


def test_accumulators_are_of_float64_in_low_precision():
    rows = [random_tokens(1, 14, seed=n)[0] for n in range(3)]
    exact = sp.scan(zoo("Llama"), rows, range(3))
    for dtype in (torch.bfloat16, torch.float16):
        low = sp.scan(zoo("Llama", dtype), rows, range(3))
        assert low.sums.dtype == low.moments.gram_q.dtype == torch.float64
        assert low.provenance["dtype"] == str(dtype).removeprefix("torch.")
        # Logits of order 20 in units of eps, and the residual stream before them.
        assert float((low.scores - exact.scores).abs().max()) < 40 * rounding(dtype)


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_a_model_whose_weights_lie_elsewhere(where, tmp_path):
    """Dispatched over devices: weights are brought in for each layer, and are on none meanwhile."""
    from accelerate import cpu_offload, dispatch_model

    whole, tokens = build(FAMILIES["Llama"]), random_tokens(2, 12)
    expected = sp.scan(bridge(build(FAMILIES["Llama"]), "whole"), tokens, range(3))
    if where == "disk":
        places = dict.fromkeys(
            ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"],
            "cpu",
        )
        places["model.layers.1"] = "disk"
        hf_model = dispatch_model(whole, places, "cpu", offload_dir=tmp_path, force_hooks=True)
    else:
        hf_model = cpu_offload(whole, execution_device="cpu")
    model = bridge(hf_model, where)
    devices = {parameter.device.type for parameter in model.original_model.parameters()}
    assert "meta" in devices
    found = sp.scan(model, tokens, range(3))
    assert torch.equal(found.scores, expected.scores)
    report = check(model)
    assert report.ok, str(report)
    assert all(one.status == "pass" for one in report.checks)
