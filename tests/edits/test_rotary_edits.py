"""Edits of queries and keys: per query head, exact, against slow definitions."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slashpatch as sp
from slashpatch.bridge import read
from slashpatch.errors import BandError, EditError, ModelError, PatchError

from ..patching.test_patch import logits, pattern_and_z
from ..planted import planted_model
from ..tiny import bridge, llama, named, random_tokens, tiny_model

KEY_EDITS = [
    sp.FreezeBand("L0H1", "high"),
    sp.SwapBands(["L0H1", "L0H2"], "high", "low"),
    sp.SetFrequencies("L0H1", [0.7, 0.5, 0.0, 0.02]),
    sp.RankOne("L0H1"),
    sp.RankOne(["L0H1", "L0H3"], of="k", rank=2),
    sp.PlantSlash("L0H1", 2),
]
QUERY_EDITS = [
    sp.ShiftSlash("L0H1", 1),
    sp.ShiftSlash("L0H1", -1.5),
    sp.DropBand("L0H1", "high"),
    sp.ScaleBand("L0H1", "low", 2.5),
    sp.RankOne("L0H1", of="q"),
]
ALL = KEY_EDITS + QUERY_EDITS
each_edit = pytest.mark.parametrize("edit", ALL, ids=named)


@functools.cache
def unshared(seed):
    """A model with grouped-query attention, and its copy with one KV head per query head."""
    grouped = llama(seed=seed)
    copy = llama(seed=seed, kv_heads=4)
    state = dict(grouped.state_dict())
    for name in list(state):
        if "k_proj" in name or "v_proj" in name:
            heads = state[name].unflatten(0, (2, 8))
            state[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    copy.load_state_dict(state)
    return bridge(grouped, "grouped"), bridge(copy, "unshared")


def same(x):
    return x


def svd_projection(x, rank=1):
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


def scores_of(model, tokens, *edits):
    """Masked layer-0 scores under the edits."""
    name = "blocks.0.attn.hook_attn_scores"
    with torch.no_grad(), sp.patch(model, *edits):
        return model.run_with_cache(tokens, names_filter=name)[1][name]


@given(st.integers(0, 4), st.integers(-6, 6))
def test_shift_moves_every_logit(seed, by):
    """Constant tokens make the logit a function of Δ alone, so its shift can be read off."""
    model = tiny_model(seed=seed)
    tokens = torch.full((1, 24), 7)
    before, after = (scores_of(model, tokens, *e)[0, 1] for e in ((), (sp.ShiftSlash("L0H1", by),)))
    profile = {i - j: before[i, j] for i in range(24) for j in range(i + 1)}
    for i in range(24):
        for j in range(i + 1):
            if 0 <= i - j - by < 24:
                torch.testing.assert_close(after[i, j], profile[i - j - by], atol=1e-3, rtol=1e-4)


@given(st.floats(-5, 5), st.floats(-5, 5))
def test_shifts_add_up(tiny, a, b):
    tokens = random_tokens(1, 12)
    twice = scores_of(tiny, tokens, sp.ShiftSlash("L0H1", a), sp.ShiftSlash("L0H1", b))
    once = scores_of(tiny, tokens, sp.ShiftSlash("L0H1", a + b))
    torch.testing.assert_close(twice, once, atol=1e-4, rtol=1e-4)


def test_identities_change_nothing(tiny):
    tokens = random_tokens(2, 12)
    before = logits(tiny, tokens)
    for edit in (
        sp.ShiftSlash("L0H1", 0),
        sp.ScaleBand("L0H1", "high", 1),
        sp.SwapBands("L0H1", "low", "low"),
    ):
        assert torch.equal(logits(tiny, tokens, edit), before)
    for edit in (
        sp.RankOne("L0H1", rank=8),
        sp.SwapBands("L0H1", "high+low", "low+high"),
        sp.SetFrequencies("L0H1", sp.Head(1, 1)),
    ):
        torch.testing.assert_close(logits(tiny, tokens, edit), before, atol=1e-4, rtol=1e-4)


def test_dropping_all_bands_leaves_zero_logits(tiny):
    scores = scores_of(tiny, random_tokens(1, 9), sp.DropBand("L0H1", "high+medium+low"))
    assert not scores[0, 1].tril().any()


ALL_PAIRS = "high+medium+low"


@pytest.mark.parametrize(
    ("chain", "same_as"),
    [
        ([sp.FreezeBand("L0H1", "high")] * 2, [sp.FreezeBand("L0H1", "high")]),
        (
            [sp.FreezeBand("L0H1", "high"), sp.FreezeBand("L0H1", "high+low")],
            [sp.FreezeBand("L0H1", "high+low")],
        ),
        ([sp.SwapBands("L0H1", "pairs 0", "pairs 3")] * 2, []),
        (
            [sp.FreezeBand("L0H1", "low"), sp.SetFrequencies("L0H1", [0.5, 0.3, 0.2, 0.1])],
            [sp.SetFrequencies("L0H1", [0.5, 0.3, 0.2, 0.1])],
        ),
        # With nothing turning, the logit is flat in Δ, and there is nothing to shift.
        ([sp.FreezeBand("L0H1", ALL_PAIRS), sp.ShiftSlash("L0H1", 3)],
         [sp.FreezeBand("L0H1", ALL_PAIRS)]),
        ([sp.FreezeBand("L0H1", ALL_PAIRS), sp.PlantSlash("L0H1", 2)],
         [sp.PlantSlash("L0H1", 2)]),
    ],
    ids=named,
)  # fmt: skip
@pytest.mark.parametrize("nested", [False, True])
def test_frequency_edits_mean_what_they_say_after_one_another(tiny, chain, same_as, nested):
    tokens = random_tokens(2, 14)
    expected = logits(tiny, tokens, *same_as)
    if nested:
        with torch.no_grad(), sp.patch(tiny, chain[0]), sp.patch(tiny, chain[1]):
            found = tiny(tokens)
    else:
        found = logits(tiny, tokens, *chain)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_a_users_hook_on_the_scores_runs_after_per_head_keys(tiny):
    tokens = random_tokens(1, 9)
    name = "blocks.0.attn.hook_attn_scores"

    def halve(scores, hook):
        return scores / 2

    with torch.no_grad(), tiny.hooks(fwd_hooks=[(name, halve)]):
        inner = logits(tiny, tokens, sp.FreezeBand("L0H1", "high"))
    with torch.no_grad(), sp.patch(tiny, sp.FreezeBand("L0H1", "high")):
        outer = tiny.run_with_hooks(tokens, fwd_hooks=[(name, halve)])
    torch.testing.assert_close(inner, outer)


SIZES = {"vocab_size": 80, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip


@functools.cache
def family(name):
    """Families that differ in hook layout, rotation, norms or softcap."""
    import transformers as t

    made = {
        "neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZES)),
        "phi3": lambda: t.Phi3ForCausalLM(
            t.Phi3Config(**SIZES, num_key_value_heads=2, pad_token_id=0)
        ),
        "qwen3": lambda: t.Qwen3ForCausalLM(
            t.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16)
        ),
        "gemma2": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=16)
        ),
    }
    torch.manual_seed(0)
    return bridge(made[name]().eval(), name)


@pytest.mark.parametrize("name", ["neox", "phi3", "qwen3", "gemma2"])
def test_families_by_a_pattern_that_is_known_beforehand(name):
    """A planted head's pattern follows from θ alone, with a KV cache as well."""
    model = family(name)
    tokens = random_tokens(2, 16)
    qk = read(model).qk[0]
    edit = sp.PlantSlash("L0H2", 3, 8.0)
    distance = torch.arange(16)[:, None] - torch.arange(16)
    logit = 8.0 * ((distance - 3)[..., None] * qk.rotary.inv_freq).cos().mean(-1)
    if qk.softcap:
        logit = qk.softcap * torch.tanh(logit / qk.softcap)
    expected = logit.masked_fill(distance < 0, -torch.inf).softmax(-1)
    found = pattern_and_z(model, tokens, edit)[0][0]
    torch.testing.assert_close(found[:, 2].double(), expected.expand(2, -1, -1), atol=1e-5, rtol=0)
    with torch.no_grad(), sp.patch(model, edit):
        whole = model(tokens)
        _, cache = model(tokens[:, :9], return_type="logits_and_cache", use_cache=True)
        rest = model(tokens[:, 9:], past_key_values=cache)
    torch.testing.assert_close(rest, whole[:, 9:], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["neox", "phi3", "qwen3", "gemma2"])
def test_families_keep_their_logits_under_their_own_frequencies(name):
    model = family(name)
    tokens = random_tokens(2, 16)
    before = logits(model, tokens)
    own = sp.SetFrequencies(["L0H1", "L1H2"], sp.Head(0, 0))
    torch.testing.assert_close(logits(model, tokens, own), before, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(logits(model, tokens, sp.ShiftSlash("L0H1", 2)), before)


@pytest.mark.parametrize("name", ["neox", "qwen3"])
def test_queries_edited_by_an_inner_patch_meet_per_head_keys(name):
    model = family(name)
    tokens = random_tokens(1, 12)
    keys, query = sp.FreezeBand("L0H1", "high"), sp.ShiftSlash("L0H1", 2)
    at_once = logits(model, tokens, keys, query)
    with torch.no_grad(), sp.patch(model, keys), sp.patch(model, query):
        nested = model(tokens)
    assert torch.equal(nested, at_once)
    assert not torch.allclose(at_once, logits(model, tokens, keys))


def test_scores_edited_too_early_are_refused(tiny):
    """An earlier hook on the scores would be overwritten by per-head keys, and so raises."""
    tokens = random_tokens(1, 12)
    hooks = sp.hooks(tiny, sp.FreezeBand("L0H1", "high"))
    with sp.patch(tiny, sp.ScaleOffsets("L0H1", 1, 3.0)):
        tiny(tokens)
        with pytest.raises(PatchError, match="ran before slashpatch computed the scores"):
            tiny.run_with_hooks(tokens, fwd_hooks=hooks)
    with torch.no_grad(), sp.patch(tiny, sp.FreezeBand("L0H1", "high")):
        scaled = sp.hooks(tiny, sp.ScaleOffsets("L0H1", 1, 3.0))
        inner = tiny.run_with_hooks(tokens, fwd_hooks=scaled)
    both = logits(tiny, tokens, sp.FreezeBand("L0H1", "high"), sp.ScaleOffsets("L0H1", 1, 3.0))
    assert torch.equal(inner, both)


# --- rank one, fitted ---


def test_a_fitted_basis_is_the_leading_direction(tiny):
    tokens = random_tokens(3, 20)
    fitted = sp.fit_rank_one(tiny, ["L0H1", "L1H2"], tokens, rank=2)
    qk = read(tiny).qk[1]
    with torch.no_grad():
        _, cache = tiny.run_with_cache(tokens)
    k = cache[qk.k.name][:, :, 1].flatten(0, 1).double()
    own = fitted.of(1, [2], "k")[0]
    torch.testing.assert_close(k @ own @ own.T, svd_projection(k, 2), atol=1e-5, rtol=1e-4)


def test_cached_generation_under_a_fitted_basis():
    grouped, copy = unshared(2)
    prompt = random_tokens(2, 6)
    outs = []
    for model in (grouped, copy):
        edit = sp.RankOne("L0H1", basis=sp.fit_rank_one(model, "L0H1", random_tokens(4, 20)))
        with torch.no_grad(), sp.patch(model, edit):
            out = model.generate(
                prompt,
                max_new_tokens=8,
                do_sample=False,
                stop_at_eos=False,
                output_logits=True,
                verbose=False,
            )
            whole = model(out.sequences)[:, 5:-1]
        torch.testing.assert_close(torch.stack(list(out.logits), 1), whole, atol=1e-4, rtol=1e-3)
        outs.append(whole)
    torch.testing.assert_close(*outs, atol=1e-4, rtol=1e-3)


def test_without_a_basis_generation_is_refused(tiny):
    with pytest.raises(PatchError, match=r"fit_rank_one"), sp.patch(tiny, sp.RankOne("L0H1")):
        tiny.generate(random_tokens(1, 6), max_new_tokens=4, verbose=False)


def test_rank_one_per_prompt_leaves_padding_out(tiny):
    row = random_tokens(1, 9)
    alone = logits(tiny, row, sp.RankOne("L0H1"))
    tokens = torch.cat([torch.full((1, 4), 2), row], dim=1)
    mask = (torch.arange(13) >= 4).long()[None]
    batch = logits(tiny, tokens, sp.RankOne("L0H1"), attention_mask=mask)
    torch.testing.assert_close(batch[:, 4:], alone, atol=1e-4, rtol=1e-3)


def test_a_basis_saves_loads_prints_and_parses(tiny, tmp_path):
    fitted = sp.fit_rank_one(tiny, ["L0H1", "L1H2"], random_tokens(2, 20))
    assert "unsaved" in str(sp.RankOne("L0H1", basis=fitted))
    fitted.save(tmp_path / "basis.safetensors")
    edit = sp.RankOne("L0H1", basis=fitted)
    assert sp.parse_edit(str(edit)) == edit
    assert hash(sp.parse_edit(str(edit))) == hash(edit)
    again = sp.Basis.load(tmp_path / "basis.safetensors")
    assert again == fitted
    assert torch.equal(again.q, fitted.q)
    tokens = random_tokens(1, 12)
    assert torch.equal(
        logits(tiny, tokens, edit), logits(tiny, tokens, sp.RankOne("L0H1", basis=again))
    )


def test_bases_that_do_not_fit(tiny, tmp_path):
    fitted = sp.fit_rank_one(tiny, "L0H1", random_tokens(2, 20))
    with pytest.raises(EditError, match="fitted for L0H1, not for L0H2"):
        logits(tiny, random_tokens(1, 4), sp.RankOne("L0H2", basis=fitted))
    with pytest.raises(EditError, match="has only 1 directions per head"):
        logits(tiny, random_tokens(1, 4), sp.RankOne("L0H1", basis=fitted, rank=2))
    wide = sp.fit_rank_one(tiny_model(d_head=16), "L0H1", random_tokens(2, 20))
    with pytest.raises(EditError, match="the basis has d_head 16, the model 8"):
        logits(tiny, random_tokens(1, 4), sp.RankOne("L0H1", basis=wide))
    with pytest.raises(EditError, match="rank must be at most d_head = 8"):
        logits(tiny, random_tokens(1, 4), sp.RankOne("L0H1", rank=9))
    with pytest.raises(EditError, match="rank must be an integer from 1 to 8"):
        sp.fit_rank_one(tiny, "L0H1", random_tokens(2, 20), rank=9)
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(EditError, match="is no file of the format slashpatch-basis"):
        sp.RankOne("L0H1", basis=tmp_path / "junk.safetensors")


def test_components_can_be_written_along_other_directions(tiny, tmp_path):
    fitted = sp.fit_rank_one(tiny, ["L0H1", "L0H2"], random_tokens(2, 20))
    turned = sp.Basis(fitted.heads, fitted.q.flip(0), fitted.k.flip(0), provenance={})
    edit = sp.RankOne("L0H1", basis=fitted, along=turned)
    qk = read(tiny).qk[0]
    seen = {}
    hooks = [(qk.q.name, lambda q, hook: seen.update(q=q.clone()))]
    with torch.no_grad():
        tiny.run_with_hooks(random_tokens(1, 9), fwd_hooks=hooks)
        q = qk.q.read(seen["q"])[0, :, 1].double()
        with sp.patch(tiny, edit):
            tiny.run_with_hooks(random_tokens(1, 9), fwd_hooks=hooks)
    expected = q @ fitted.of(0, [1], "q")[0] @ fitted.of(0, [2], "q")[0].T
    torch.testing.assert_close(
        qk.q.read(seen["q"])[0, :, 1].double(), expected, atol=1e-5, rtol=1e-4
    )
    with pytest.raises(EditError, match="along needs a basis"):
        sp.RankOne("L0H1", along=turned)
    with pytest.raises(EditError, match="the along was fitted for L0H1, L0H2, not for L0H3"):
        alone = sp.fit_rank_one(tiny, "L0H3", random_tokens(2, 20))
        logits(tiny, random_tokens(1, 4), sp.RankOne("L0H3", basis=alone, along=turned))
    for basis, name in ((fitted, "a"), (turned, "b")):
        basis.save(tmp_path / f"{name}.safetensors")
    assert sp.parse_edit(str(edit)) == edit


# --- refusals ---


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (sp.DropBand("L0H1", "pairs 2-4"), BandError, "outside the 4 rotary pairs, 0 to 3"),
        (sp.DropBand("L0H1", "wavelength 1-2"), BandError, "holds none of the 4 rotary pairs"),
        (sp.SwapBands("L0H1", "pairs 0-1", "pairs 1-2"), BandError, r"share pairs \[1\]"),
        (sp.SetFrequencies("L0H1", [1.0, 0.5]), EditError, "expected 4 finite frequencies"),
        (sp.SetFrequencies("L0H1", lambda t: t / 0), EditError, "expected 4 finite frequencies"),
        (sp.SetFrequencies("L0H1", "L9H0"), sp.SlashpatchError, "L9H0 does not exist"),
    ],
    ids=named,
)
def test_edits_that_do_not_fit(tiny, edit, error, message):
    with pytest.raises(error, match=message):
        logits(tiny, random_tokens(1, 4), edit)
    assert not any(point._forward_hooks for point in tiny.hook_points())


def test_a_layer_without_rope_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel, SmolLM3Config, SmolLM3ForCausalLM

    config = GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    gpt2 = bridge(GPT2LMHeadModel(config).eval(), "2")
    for edit in (sp.ShiftSlash("L1H0", 1), sp.DropBand("L1H0", "high"), sp.PlantSlash("L1H0", 1)):
        with pytest.raises(ModelError, match="layer 1 has no RoPE"):
            logits(gpt2, random_tokens(1, 4), edit)
    config = SmolLM3Config(
        vocab_size=80,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        no_rope_layers=[1, 0],
    )
    smol = bridge(SmolLM3ForCausalLM(config).eval(), "3")
    logits(smol, random_tokens(1, 4), sp.ShiftSlash("L0H0", 1))
    with pytest.raises(ModelError, match="layer 1 has no RoPE"):
        logits(smol, random_tokens(1, 4), sp.ShiftSlash("L1H0", 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cache: cache.crop(-2), "5 of 3 cached tokens"),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), "cache was reordered"),
    ],
)
def test_a_changed_cache_is_refused(tiny, change, message):
    tokens = random_tokens(2, 6)
    tokens[1, 4] = tokens[0, 4]  # prompts that differ, but end alike
    with torch.no_grad(), sp.patch(tiny, sp.FreezeBand("L0H1", "high")):
        _, cache = tiny(tokens[:, :5], return_type="logits_and_cache", use_cache=True)
        change(cache)
        with pytest.raises(PatchError, match=message):
            tiny(tokens[:, 5:], past_key_values=cache)


# --- planted models: what is known must be found, and must move ---

PLANTED = [1, 2, 5, 0, 17, 64]


@pytest.fixture(scope="module")
def planted():
    return planted_model(PLANTED)


def test_scan_finds_exactly_the_planted_heads(planted):
    scan = sp.scan(planted, random_tokens(3, 160), range(80))
    found = {(entry.head.head, entry.offset) for entry in scan.slash_heads(0.5)}
    assert found == set(enumerate(PLANTED))
    assert len(scan.slash_heads(0.5)) == len(PLANTED)


@pytest.mark.parametrize("by", [1, 3, -1])
def test_shift_moves_every_planted_slash(planted, by):
    heads = [sp.Head(0, h) for h, offset in enumerate(PLANTED) if offset + by >= 0]
    with sp.patch(planted, sp.ShiftSlash(heads, by)):
        scan = sp.scan(planted, random_tokens(3, 160), range(80))
    found = {(entry.head.head, entry.offset) for entry in scan.slash_heads(0.5)}
    assert found == {
        (head, offset + by if offset + by >= 0 else offset) for head, offset in enumerate(PLANTED)
    }


@pytest.mark.parametrize("offset", [0, 1, 7, 30])
def test_plant_makes_any_head_a_slash_head(offset):
    model = tiny_model(seed=4, d_head=32, n_ctx=128)
    with sp.patch(model, sp.PlantSlash("L1H2", offset, 40.0)):
        scan = sp.scan(model, random_tokens(2, 100), range(40))
    best = scan.slash_heads(0.0)[0]
    assert (best.head, best.offset) == (sp.Head(1, 2), offset)
    assert best.score > 0.5


def test_a_planted_slash_moves_too():
    model = tiny_model(seed=4, d_head=32, n_ctx=128)
    edits = sp.PlantSlash("L1H2", 3, 40.0), sp.ShiftSlash("L1H2", 2)
    with sp.patch(model, *edits):
        scan = sp.scan(model, random_tokens(2, 60), range(10))
    assert int(scan.scores[1, 2].argmax()) == 5
