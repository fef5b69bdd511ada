import importlib
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slashpatch as sp
from slashpatch.bridge.fingerprint import fingerprint
from slashpatch.errors import ModelError, OffsetError, OutputError, PromptError, ScanError
from slashpatch.maths.slash_scores import slash_scores

from ..tiny import N_CTX, bridge, llama, random_tokens, tiny_model


def direct(model, prompts, offsets):
    """Slash scores by their definition, one prompt at a time, from `hook_pattern`."""
    per_prompt = []
    for prompt in prompts:
        with torch.no_grad():
            _, cache = model.run_with_cache(prompt[None])
        per_prompt.append(
            torch.stack(
                [
                    slash_scores(cache["pattern", layer], offsets)[0]
                    for layer in range(model.cfg.n_layers)
                ]
            )
        )
    return torch.stack(per_prompt)


lengths = st.lists(st.integers(3, 20), min_size=1, max_size=5)


#: Logits of the tiny models reach 40, whose float32 rounding is 4e-6; the fused engine takes a
#: logit and its row's log-sum-exp from two roundings.
#: Batches round float32 logits of order 30 otherwise than single prompts do.
ENGINES = {"bridge": 1e-5, "fused": 1e-5}


@pytest.mark.parametrize("engine", ENGINES)
@given(st.integers(0, 99), lengths, st.sampled_from([None, 1, 2, 8]))
def test_a_scan_is_the_mean_over_prompts_of_the_mean_over_rows(
    tiny, engine, seed, sizes, batch_size
):
    prompts = [random_tokens(1, n, seed + i)[0] for i, n in enumerate(sizes)]
    scan = sp.scan(tiny, prompts, [0, 1, 2], engine, batch_size=batch_size)
    expected = direct(tiny, prompts, [0, 1, 2])
    torch.testing.assert_close(scan.scores, expected.mean(0), atol=ENGINES[engine], rtol=0)
    assert scan.n_tokens == sum(sizes)


def test_a_prompt_counts_for_the_offsets_that_it_can_hold(tiny):
    prompts = [random_tokens(1, 4)[0], random_tokens(1, 12, 1)[0]]
    scan = sp.scan(tiny, prompts, [1, 8])
    assert scan.counts.tolist() == [2, 1]
    expected = direct(tiny, prompts, [1, 8])
    torch.testing.assert_close(scan.scores[..., 0], expected[..., 0].mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(scan.scores[..., 1], expected[1, ..., 1], atol=1e-5, rtol=0)


def test_one_token_prompts(tiny):
    scan = sp.scan(tiny, torch.tensor([[5], [6]]), 0)
    ones = torch.ones(2, 4, 1, dtype=torch.float64)
    torch.testing.assert_close(scan.scores, ones, atol=1e-5, rtol=0)


@given(st.integers(0, 99), st.integers(1, 4), st.integers(1, 4))
def test_scans_add_exactly(tiny, seed, n, m):
    prompts = list(random_tokens(n + m, 9, seed))
    whole = sp.scan(tiny, prompts, range(4))
    added = sp.scan(tiny, prompts[:n], range(4)) + sp.scan(tiny, prompts[n:], range(4))
    torch.testing.assert_close(added.scores, whole.scores, atol=1e-6, rtol=0)
    assert (added.n_tokens, added.counts.tolist()) == (whole.n_tokens, whole.counts.tolist())
    torch.testing.assert_close(
        added.intervals(), whole.intervals(), atol=1e-5, rtol=1e-4, equal_nan=True
    )


def test_intervals_are_student_t_over_prompts(tiny):
    from scipy import stats

    prompts = list(random_tokens(5, 9))
    scan = sp.scan(tiny, prompts, [1])
    sample = direct(tiny, prompts, [1])[:, 1, 2, 0].numpy()
    low, high = stats.t.interval(0.95, 4, sample.mean(), stats.sem(sample))
    found = scan.intervals()
    assert float(found[0][1, 2, 0]) == pytest.approx(low, abs=1e-6)
    assert float(found[1][1, 2, 0]) == pytest.approx(high, abs=1e-6)
    single = sp.scan(tiny, prompts[:1], [1])
    assert single.intervals()[0].isnan().all()


def test_slash_heads_best_first(tiny):
    scan = sp.scan(tiny, random_tokens(3, 12), range(3))
    found = scan.slash_heads(0.2)
    assert [entry.score for entry in found] == sorted((e.score for e in found), reverse=True)
    assert len(found) == int((scan.scores >= 0.2).sum())
    for entry in found:
        assert float(scan.scores[entry.head.layer, entry.head.head, entry.offset]) == entry.score
        assert entry.interval[0] <= entry.score <= entry.interval[1]
    assert all(entry.offset >= 1 for entry in scan.slash_heads(0.0, min_offset=1))
    assert sp.heads(scan)[0] == scan.slash_heads()[0].head


@pytest.mark.parametrize("kappa", [-0.1, 1.1, math.nan])
def test_kappa_outside_0_to_1(tiny, kappa):
    scan = sp.scan(tiny, random_tokens(1, 8), [1])
    with pytest.raises(ScanError, match="kappa must be a score from 0 to 1"):
        scan.slash_heads(kappa)
    with pytest.raises(ScanError, match="kappa"):
        sp.SlashMonitor(tiny, kappa=kappa)


def test_the_dataframe_holds_every_score_with_its_interval(tiny):
    scan = sp.scan(tiny, random_tokens(3, 12), [0, 2])
    frame = scan.to_dataframe()
    assert list(frame.columns) == [
        "layer", "head", "name", "offset", "score", "low", "high", "n_prompts",
    ]  # fmt: skip
    assert len(frame) == 2 * 4 * 2
    row = frame[(frame.name == "L1H3") & (frame.offset == 2)].iloc[0]
    assert row.score == float(scan.scores[1, 3, 1])
    assert row.low < row.score < row.high
    assert row.n_prompts == 3


def test_the_table_names_the_heads(tiny):
    scan = sp.scan(tiny, random_tokens(3, 12), range(3))
    best = scan.slash_heads()[0]
    assert str(best.head) in str(scan)
    assert f"{best.score:.3f}" in scan.table()
    assert "2 × 4 heads" in repr(scan)


def test_save_and_load(tiny, tmp_path):
    scan = sp.scan(tiny, random_tokens(2, 9), [0, 3])
    scan.save(tmp_path / "a.safetensors")
    again = sp.Scan.load(tmp_path / "a.safetensors")
    assert torch.equal(again.scores, scan.scores)
    assert again.provenance == scan.provenance
    assert (again.offsets, again.n_tokens) == (scan.offsets, scan.n_tokens)
    torch.testing.assert_close((again + scan).scores, scan.scores)
    assert json.dumps(scan.provenance)


def test_provenance_says_what_ran(tiny):
    with sp.patch(tiny, "KnockOut(L0H0, 1)"):
        scan = sp.scan(tiny, random_tokens(1, 9), [1])
    assert scan.provenance["edits"] == ["KnockOut(L0H0, offsets=1)"]
    assert scan.provenance["dtype"] == "float32"
    assert scan.provenance["prompts"][0]["source"] == "token ids"
    assert set(scan.provenance["versions"]) >= {"torch", "transformers", "transformer-lens"}


def test_scans_that_cannot_be_added(tiny):
    tokens = random_tokens(1, 9)
    scan = sp.scan(tiny, tokens, [1])
    with pytest.raises(ScanError, match="different offsets"):
        scan + sp.scan(tiny, tokens, [2])
    with pytest.raises(ScanError, match="different fingerprint"):
        scan + sp.scan(tiny_model(seed=1), tokens, [1])
    with sp.patch(tiny, "KnockOut(L0H0, 1)"):
        edited = sp.scan(tiny, tokens, [1])
    with pytest.raises(ScanError, match="different edits"):
        scan + edited


def test_files_that_are_no_scan(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(ScanError, match="no file"):
        sp.Scan.load(tmp_path / "absent.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(ScanError, match="is no file of the format slashpatch-scan"):
        sp.Scan.load(tmp_path / "junk.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ScanError, match="holds nothing of the format slashpatch-scan"):
        sp.Scan.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "damage",
    [
        lambda h: h.pop("offsets"),
        lambda h: h.pop("provenance"),
        lambda h: h.update(offsets=3),
        lambda h: h.update(offsets=[1, 0]),
        lambda h: h.update(offsets=[0, 1, 2]),
        lambda h: h.update(n_tokens="many"),
        lambda h: h.update(provenance={}),
        lambda h: h.update(provenance=7),
        lambda h: h.pop("pairing"),
    ],
)
def test_damaged_headers(tiny, tmp_path, damage):
    from safetensors import safe_open
    from safetensors.torch import save_file

    file = tmp_path / "a.safetensors"
    sp.scan(tiny, random_tokens(2, 9), [0, 1]).save(file)
    with safe_open(str(file), "pt") as opened:
        header = json.loads(opened.metadata()["slashpatch"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    damage(header)
    save_file(tensors, file, metadata={"slashpatch": json.dumps(header)})
    with pytest.raises(ScanError):
        sp.Scan.load(file)
    save_file(tensors, file, metadata={"slashpatch": "[]"})
    with pytest.raises(ScanError):
        sp.Scan.load(file)


def test_scans_under_hooks_of_somebody_are_marked(tiny):
    tokens = random_tokens(1, 9)
    clean = sp.scan(tiny, tokens, [1])
    with tiny.hooks(fwd_hooks=sp.hooks(tiny, "KeepOnly(L0H1, 1)")):
        ours = sp.scan(tiny, tokens, [1])
    assert ours.provenance["edits"] == ["KeepOnly(L0H1, offsets=1)"]
    name = "blocks.0.attn.hook_attn_scores"
    with tiny.hooks(fwd_hooks=[(name, lambda scores, hook: scores / 2)]):
        foreign = sp.scan(tiny, tokens, [1])
    assert foreign.provenance["other_hooks"] == [name]
    for other in (ours, foreign):
        with pytest.raises(ScanError, match="different"):
            clean + other


def zeroed(w):
    w[:, 8:16] = 0


def negated(w):
    w.neg_()


def half_negated(w):
    w[:, 8:16].neg_()


def exchanged(w):
    w[:, :16] = w[:, :16].roll(8, dims=1)


def rows_exchanged(w):
    w[:16] = w[:16].roll(8, dims=0)


@pytest.mark.parametrize("change", [zeroed, negated, half_negated, exchanged, rows_exchanged])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_changed_head_changes_the_fingerprint(change, dtype):
    model = bridge(llama(seed=3).to(dtype))
    before = fingerprint(model)
    assert fingerprint(bridge(llama(seed=3).to(dtype))) == before
    with torch.no_grad():
        change(model.original_model.model.layers[1].self_attn.o_proj.weight)
    assert fingerprint(model) != before


def test_nothing_is_written_half(tiny, tmp_path, monkeypatch):
    scan = sp.scan(tiny, random_tokens(1, 9), [1])
    with pytest.raises(OutputError, match="there is no directory"):
        scan.save(tmp_path / "absent" / "a.safetensors")
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(OutputError, match="it is a directory"):
        scan.save(tmp_path / "a.safetensors")
    with pytest.raises(ScanError, match=".safetensors"):
        scan.save(tmp_path / "a.pt")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OutputError, match="disk full"):
        scan.save(tmp_path / "b.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_scan_sees_active_patches_and_leaves_the_model_alone(tiny):
    tokens = random_tokens(2, 12)
    before = tiny(tokens)
    with sp.patch(tiny, "KeepOnly(L1H1, 2)"):
        scan = sp.scan(tiny, tokens, [1, 2])
    assert scan.scores[1, 1].tolist() == pytest.approx([0, 1])
    assert torch.equal(tiny(tokens), before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_a_pattern_is_named(value):
    model = tiny_model(seed=2)

    def spoil(pattern, hook):
        pattern = pattern.clone()
        pattern[:, 2, 5, 4] = value
        return pattern

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", spoil)]):
        with pytest.raises(ScanError, match="pattern of L1H2 has NaN or infinite"):
            sp.scan(model, random_tokens(1, 9), [1])


def test_nan_in_padding_does_not_matter():
    """Padding rows of the pattern are not read."""
    model = tiny_model(seed=2)
    prompts = [random_tokens(1, 4)[0], random_tokens(1, 9, 1)[0]]
    expected = sp.scan(model, prompts, [1], batch_size=1).scores

    def spoil(pattern, hook):
        pattern = pattern.clone()
        if pattern.shape[0] == 2:
            pattern[0, :, 4:] = math.nan
        return pattern

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", spoil)]):
        scan = sp.scan(model, prompts, [1], batch_size=2)
    torch.testing.assert_close(scan.scores, expected, atol=1e-6, rtol=0)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"offsets": []}, OffsetError, "no offsets"),
        ({"offsets": [-1]}, OffsetError, "integer from 0"),
        ({"offsets": 1.5}, OffsetError, "integer from 0"),
        ({"offsets": 9}, OffsetError, "needs a prompt of at least 10 tokens; the longest has 9"),
        ({"engine": "warp"}, ScanError, "engine must be one of auto, fused, bridge; got 'warp'"),
        ({"batch_size": 0}, ScanError, "batch_size"),
        ({"prompts": []}, PromptError, "no prompts were given"),
        ({"prompts": ""}, PromptError, "empty"),
        ({"prompts": ["w1 w2", ""]}, PromptError, "empty"),
        ({"prompts": torch.zeros(0, 5).long()}, PromptError, "no prompts were given"),
        ({"prompts": torch.zeros(2, 0).long()}, PromptError, "empty"),
        ({"prompts": torch.zeros(1, 5)}, PromptError, "integers"),
        ({"prompts": torch.zeros(1, 2, 3).long()}, PromptError, "integers"),
        ({"prompts": [[1, 2], "w1"]}, PromptError, "integers"),
        ({"prompts": 7}, PromptError, "expected a text, texts, a file or token ids, got int"),
        ({"prompts": [[1, 200]]}, PromptError, "outside the vocabulary"),
        ({"prompts": [[1, -1]]}, PromptError, "outside the vocabulary"),
        ({"prompts": torch.ones(1, N_CTX + 1).long()}, PromptError, f"context is {N_CTX}"),
        ({"prompts": "w1 " * 200}, PromptError, f"context is {N_CTX}"),
        ({"prompts": "absent.txt"}, PromptError, "no file 'absent.txt'"),
        ({"prompts": None, "n_prompts": 0}, PromptError, "n_prompts"),
        ({"prompts": None, "max_tokens": 0}, PromptError, "max_tokens"),
        ({"prompts": "w1", "random_tokens": True}, PromptError, "not both"),
    ],
)
def test_bad_input(tiny, kwargs, error, message):
    arguments = {"prompts": random_tokens(1, 9), "offsets": [1], **kwargs}
    with pytest.raises(error, match=message):
        sp.scan(tiny, **arguments)


def test_a_hook_that_does_not_fire_is_noticed(tiny, monkeypatch):
    module = importlib.import_module("slashpatch.bridge")
    monkeypatch.setattr(module, "run_for_hooks", lambda *args: None)
    with pytest.raises(ModelError, match="layer 0 did not fire"):
        sp.scan(tiny, random_tokens(1, 9), [1])
