import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slashpatch as sp
from slashpatch.bridge import qk_reading, read
from slashpatch.errors import HeadError, ModelError, ScanError

from ..tiny import bridge, random_tokens, tiny_model


def rows_of(model, prompts, layer):
    """Pre-RoPE queries and keys, and masked scores, of each prompt by itself."""
    qk = read(model).qk[layer]
    scores = f"blocks.{layer}.attn.hook_attn_scores"
    found = []
    for prompt in prompts:
        with torch.no_grad():
            _, cache = model.run_with_cache(
                prompt[None], names_filter=[qk.q.name, qk.k.name, scores]
            )
        q, k = (part.read(cache[part.name])[0].double() for part in (qk.q, qk.k))
        found.append((q, k, cache[scores][0].double()))
    return found


@given(st.integers(0, 99), st.lists(st.integers(2, 20), min_size=1, max_size=4))
def test_rank_and_cone_from_all_rows_at_once(tiny, seed, sizes):
    prompts = [random_tokens(1, n, seed + i)[0] for i, n in enumerate(sizes)]
    table = sp.scan(tiny, prompts, [0]).rank_one.set_index("name")
    rows = rows_of(tiny, prompts, 1)
    q = torch.cat([q for q, _, _ in rows])[:, 3]
    k = torch.cat([k for _, k, _ in rows])[:, 1]
    for part, x in (("q", q), ("k", k)):
        squares = torch.linalg.svdvals(x) ** 2
        share = (squares / squares.sum()).cumsum(0)
        row = table.loc["L1H3"]
        assert row[f"r1_{part}"] == pytest.approx(float(share[0]), abs=1e-5)
        assert row[f"r95_{part}"] in (int((share < 0.95 - e).sum()) + 1 for e in (-1e-6, 1e-6))
        cosine = torch.nn.functional.cosine_similarity(x, x.mean(0)[None], dim=-1).mean()
        assert row[f"cone_{part}"] == pytest.approx(float(cosine), abs=1e-5)


def test_the_profile_is_the_mean_logit_by_offset(tiny):
    prompts = [random_tokens(1, n, n)[0] for n in (12, 7)]
    profile = sp.scan(tiny, prompts, [0]).profile("L1H3")
    rows = rows_of(tiny, prompts, 1)
    for offset in range(12):
        diagonals = [scores[3].diagonal(-offset) for _, _, scores in rows]
        expected = torch.cat(diagonals).mean()
        torch.testing.assert_close(profile.measured[offset], expected, atol=1e-4, rtol=1e-4)
    assert len(profile.measured) == 12


def test_constant_tokens_are_predicted_exactly(tiny):
    """With one token repeated, every query and key is the mean."""
    profile = sp.scan(tiny, torch.full((1, 30), 7), [0]).profile("L0H1")
    torch.testing.assert_close(profile.predicted, profile.measured, atol=1e-3, rtol=1e-3)
    assert profile.correlation == pytest.approx(1, abs=1e-6)
    assert profile.predicted_peak == profile.measured_peak


def test_amplitudes_and_phases_make_the_predicted_profile(tiny):
    scan = sp.scan(tiny, random_tokens(2, 20), [0])
    for head in (sp.Head(0, 1), sp.Head(1, 3)):
        amplitude, phase = scan.moments.amplitude_and_phase(head)
        profile = scan.profile(head)
        angle = scan.moments.inv_freq[head.layer] * profile.offsets[:, None] + phase
        found = (amplitude * angle.cos()).sum(-1)  # this model rotates all dimensions
        torch.testing.assert_close(found, profile.predicted, atol=1e-9, rtol=1e-9)


@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 3))
def test_moments_of_merged_scans_are_those_of_one(tiny, seed, n, m):
    prompts = list(random_tokens(n + m, 9, seed))
    whole = sp.scan(tiny, prompts, [0]).moments
    added = (sp.scan(tiny, prompts[:n], [0]) + sp.scan(tiny, prompts[n:], [0])).moments
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(
            added.tensors()[name], tensor, atol=1e-3, rtol=1e-5, equal_nan=True
        )


def test_padding_does_not_enter(tiny):
    prompts = [random_tokens(1, 4)[0], random_tokens(1, 15, 1)[0]]
    batch = sp.scan(tiny, prompts, [0], batch_size=2).rank_one
    single = sp.scan(tiny, prompts, [0], batch_size=1).rank_one
    assert (batch.drop(columns="name") - single.drop(columns="name")).abs().max().max() < 1e-4


def test_moments_are_saved(tiny, tmp_path):
    scan = sp.scan(tiny, random_tokens(2, 9), [0])
    scan.save(tmp_path / "a.safetensors")
    again = sp.Scan.load(tmp_path / "a.safetensors")
    assert again.rank_one.equals(scan.rank_one)
    assert torch.equal(again.profile("L0H1").predicted, scan.profile("L0H1").predicted)


def test_what_a_scan_cannot_tell(tiny):
    from transformers import GPT2Config, GPT2LMHeadModel

    scan = sp.scan(tiny, random_tokens(1, 9), [0])
    with pytest.raises(HeadError, match="of one head"):
        scan.profile(["L0H0", "L0H1"])
    with pytest.raises(HeadError, match="L9H0 does not exist"):
        scan.profile("L9H0")
    config = GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    gpt2 = sp.scan(bridge(GPT2LMHeadModel(config).eval(), "2"), random_tokens(1, 9), [0])
    assert len(gpt2.rank_one) == 8
    with pytest.raises(ModelError, match="layer 1 has no RoPE"):
        gpt2.profile("L1H0")
    with pytest.raises(ModelError, match="layer 1 has no RoPE"):
        gpt2.moments.amplitude_and_phase(sp.Head(1, 0))


def test_a_model_whose_queries_cannot_be_read_still_scans(monkeypatch):
    def refuse(model, info):
        raise ModelError("unknown layout")

    model = tiny_model(seed=6)
    monkeypatch.setattr(qk_reading, "read_layers", refuse)
    scan = sp.scan(model, random_tokens(1, 9), [0, 1])
    assert scan.slash_heads(0.0)
    with pytest.raises(ScanError, match="unknown layout"):
        scan.rank_one  # noqa: B018


def test_keys_outside_a_sliding_window_are_not_measured():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=80,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        sliding_window=8,
    )
    model = bridge(MistralForCausalLM(config).eval(), "m")
    profile = sp.scan(model, random_tokens(2, 24), [0]).profile("L0H1")
    assert profile.offsets.tolist() == list(range(8))
    assert (profile.measured.abs() < 1e3).all()


def test_scans_of_prompts_of_different_lengths_add(tiny):
    both = sp.scan(tiny, random_tokens(1, 20), [0]) + sp.scan(tiny, random_tokens(1, 9, 1), [0])
    assert len(both.profile("L0H1").measured) == 20


def test_under_edits_with_per_head_keys_there_is_no_rank(tiny):
    with sp.patch(tiny, "FreezeBand(L0H1, high)"):
        scan = sp.scan(tiny, random_tokens(1, 9), [0])
    with pytest.raises(ScanError, match="active edits use per-head keys"):
        scan.rank_one  # noqa: B018
