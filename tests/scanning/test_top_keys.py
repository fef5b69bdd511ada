import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import slashpatch as sp
from slashpatch.errors import (
    HeadError,
    ModelError,
    OffsetError,
    OutputError,
    PromptError,
    ScanError,
)

from ..patching.test_patch import models, some_edits
from ..tiny import N_CTX, bridge, llama, random_tokens, tiny_model
from ..zoo import zoo

HEADS = ("L1H2", "L0H3", "L1H0")
OFFSETS = (0, 1, 3, 11)
ENGINES = pytest.mark.parametrize("engine", ["bridge", "fused"])


def dense(model, tokens, *edits):
    """The whole pattern of each of `HEADS`, as TransformerLens forms it."""
    with torch.no_grad(), sp.patch(model, *edits):
        _, cache = model.run_with_cache(tokens[None])
    at = [sp.Head.parse(name) for name in HEADS]
    return torch.stack([cache["pattern", head.layer][0, head.head] for head in at])


def assert_top_keys(found, pattern, top, limit):
    """Assert that what is listed is the top of each row, by the whole matrix.

    Two engines round differently, so that keys of nearly equal weight may change places.
    """
    n = pattern.shape[-1]
    assert found.keys.shape == found.weights.shape == (len(HEADS), n, top)
    expected = torch.zeros(len(HEADS), n, max(top, n))
    expected[..., :n] = pattern.float().tril().sort(dim=-1, descending=True).values
    torch.testing.assert_close(found.weights, expected[..., :top], atol=limit, rtol=0)
    listed = pattern.gather(-1, found.keys.clamp(min=0)).masked_fill(found.keys < 0, 0)
    torch.testing.assert_close(found.weights, listed.float(), atol=limit, rtol=0)
    for row in found.keys.flatten(0, 1).tolist():
        real = [key for key in row if key >= 0]
        assert len(set(real)) == len(real)
    for column, offset in enumerate(OFFSETS):
        diagonal = found.diagonals[..., column]
        assert not diagonal[:, :offset].any()
        torch.testing.assert_close(
            diagonal[:, offset:], pattern.diagonal(-offset, -2, -1).float(), atol=limit, rtol=0
        )
    assert found._is_consistent()


@ENGINES
@given(models, st.just([]) | some_edits, st.integers(0, 99), st.integers(1, 20), st.integers(1, 7))
def test_top_keys_are_those_of_the_whole_matrix(engine, model, edits, seed, n, top):
    tokens = random_tokens(1, n, seed)[0]
    with sp.patch(model, *edits):
        found = sp.top_keys(model, tokens, HEADS, top=top, offsets=OFFSETS, engine=engine)
    assert_top_keys(found, dense(model, tokens, *edits), top, 1e-5)
    assert found.provenance["edits"] == [str(edit) for edit in edits]
    assert found.provenance["engine"] == engine


FAMILIES = {
    "Mistral": "windows",
    "Gemma 2": "soft-capping and windows",
    "Gemma 3": "one layer with a window",
    "GPT-OSS": "attention sinks",
    "GPT-2": "no RoPE",
    "Cohere 2": "interleaved pairs, a layer without RoPE",
    "GPT-NeoX, Pythia": "no grouped queries",
}
EDITS = {
    "none": [],
    "scores": [sp.KnockOut(["L0H3", "L1H2"], [0, 2]), sp.ScaleOffsets("L1H0", 1, 5.0)],
    "kept": [sp.KeepOnly(["L0H3", "L1H2"], [3, 11])],
    "pattern": [sp.ScaleOffsets(["L0H3", "L1H0"], [0, 1], 3.0, renormalize=False)],
    "per-head keys": [sp.RankOne(["L0H3", "L1H2"], of="k")],
}


@ENGINES
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS)
def test_families(family, engine, edits):
    model = zoo(family)
    tokens = random_tokens(1, 20)[0]
    with sp.patch(model, *edits):
        found = sp.top_keys(model, tokens, HEADS, offsets=OFFSETS, engine=engine)
    assert_top_keys(found, dense(model, tokens, *edits), 5, 2e-5)


@ENGINES
def test_shifted_and_planted_slashes(engine):
    model = tiny_model(seed=1)
    tokens = random_tokens(1, 30)[0]
    edits = [sp.ShiftSlash("L0H3", 2), sp.PlantSlash("L1H2", 3, strength=60.0)]
    with sp.patch(model, *edits):
        found = sp.top_keys(model, tokens, HEADS, offsets=OFFSETS, engine=engine)
    assert_top_keys(found, dense(model, tokens, *edits), 5, 1e-5)
    planted = found.keys[0, 3:, 0]
    assert (planted == torch.arange(3, 30) - 3).float().mean() > 0.9


@ENGINES
def test_keys_that_may_not_be_read_are_not_listed(engine):
    """A window of 7 tokens; a row whose keys are all knocked out; the first rows."""
    tokens = random_tokens(1, 20)[0]
    found = sp.top_keys(zoo("Mistral"), tokens, HEADS, top=9, engine=engine)
    listed = (found.keys >= 0).sum(-1)
    assert (listed == (torch.arange(20) + 1).clamp(max=7)).all()
    with sp.patch(zoo("Mistral"), sp.KeepOnly("L0H3", 2)):
        found = sp.top_keys(zoo("Mistral"), tokens, HEADS, engine=engine)
    assert found.keys[1, :2].tolist() == [[-1] * 5] * 2
    assert found.keys[1, 2:, 0].tolist() == list(range(18))
    assert (found.keys[1, :, 1:] == -1).all()
    torch.testing.assert_close(found.weights[1, 2:, 0], torch.ones(18))


def test_no_matrix_is_formed_in_the_fused_engine(tiny):
    found = sp.top_keys(tiny, random_tokens(1, 20)[0], HEADS)
    assert found.provenance["engine"] == "fused"
    assert found.provenance["engine_of_layers"] == ["flash", "flash"]


def test_half_precision():
    """The bridge engine's are those of its matrix; the fused engine is no further from float32."""
    exact, low = bridge(llama(seed=2)), bridge(llama(seed=2).bfloat16())
    tokens = random_tokens(1, 30)[0]
    right, theirs, ours = (
        sp.top_keys(model, tokens, HEADS, offsets=OFFSETS, engine=engine)
        for model, engine in ((exact, "bridge"), (low, "bridge"), (low, "fused"))
    )
    assert_top_keys(theirs, dense(low, tokens), 5, 0)
    off = [float((x.diagonals - right.diagonals).square().mean()) for x in (theirs, ours)]
    assert off[1] <= 1.25**2 * off[0]
    assert ours.weights.dtype == torch.float32


def test_one_text_in_any_form(tiny, tmp_path):
    text = "the of a and w1 w2"
    found = sp.top_keys(tiny, text, "L1H2")
    assert found.tokens == ("<s>", "the", "of", "a", "and", "w1", "w2")
    assert found.token_ids.tolist() == tiny.to_tokens(text)[0].tolist()
    (tmp_path / "text.txt").write_text(text)
    for same in ([text], tmp_path / "text.txt", found.token_ids, found.token_ids[None],
                 found.token_ids.tolist()):  # fmt: skip
        assert torch.equal(sp.top_keys(tiny, same, "L1H2").keys, found.keys)
    assert len(sp.top_keys(tiny, text, "L1H2", max_tokens=3).tokens) == 3
    natural = sp.top_keys(tiny, None, "L1H2", max_tokens=12, seed=3)
    assert natural.provenance["prompts"][0]["source"] == "natural text, seed 3"
    assert natural.keys.shape == (1, 12, 5)


def test_heads_in_the_order_given(tiny):
    tokens = random_tokens(1, 12)[0]
    found = sp.top_keys(tiny, tokens, "L1, L0H1")
    assert [str(head) for head in found.heads] == ["L1H0", "L1H1", "L1H2", "L1H3", "L0H1"]
    backwards = sp.top_keys(tiny, tokens, found.heads[::-1])
    assert torch.equal(backwards.keys, found.keys.flip(0))
    scan = sp.scan(tiny, tokens[None], range(3))
    assert sp.top_keys(tiny, tokens, scan).heads == sp.heads(scan)


def test_the_dataframe_lists_every_key(tiny):
    found = sp.top_keys(tiny, "the of a and w1 w2", HEADS, top=3)
    frame = found.to_dataframe()
    assert len(frame) == int((found.keys >= 0).sum())
    row = frame[(frame.name == "L0H3") & (frame["query"] == 4) & (frame["rank"] == 2)].iloc[0]
    assert row.key == int(found.keys[1, 4, 1])
    assert row.weight == float(found.weights[1, 4, 1])
    assert (row.query_token, row.key_token) == ("and", found.tokens[row.key])
    assert row.offset == 4 - row.key
    assert (row.layer, row["head"]) == (0, 3)
    assert "3 heads, 7 tokens, 3 keys a token" in repr(found)


def test_save_and_load(tiny, tmp_path):
    found = sp.top_keys(tiny, "the of </s> a", HEADS, top=2)
    found.save(tmp_path / "a.safetensors")
    again = sp.TopKeys.load(tmp_path / "a.safetensors")
    for name in ("token_ids", "keys", "weights", "diagonals"):
        assert torch.equal(getattr(again, name), getattr(found, name))
    for name in ("heads", "tokens", "offsets", "provenance"):
        assert getattr(again, name) == getattr(found, name)
    with pytest.raises(ScanError, match=".safetensors"):
        found.save(tmp_path / "a.json")
    with pytest.raises(OutputError, match="there is no directory"):
        found.save(tmp_path / "absent" / "a.safetensors")


def parts(file):
    """Header and tensors of a file."""
    with safe_open(str(file), "pt") as opened:
        header = json.loads(opened.metadata()["slashpatch"])
        return header, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    "damage",
    [
        lambda h, t: h.pop("tokens"),
        lambda h, t: h.update(tokens=[1, 2, 3, 4, 5]),
        lambda h, t: h["tokens"].pop(),
        lambda h, t: h.update(tokens=7),
        lambda h, t: h.update(heads=["L0H0", "16."]),
        lambda h, t: h.update(heads=["L0H0", "L0H0"]),
        lambda h, t: h.update(heads=[]),
        lambda h, t: h.update(offsets=[1, 0]),
        lambda h, t: h.update(offsets=[0]),
        lambda h, t: h.update(provenance={}),
        lambda h, t: h.update(provenance=3),
        lambda h, t: h.update(format="slashpatch-scan-3"),
        lambda h, t: t.pop("weights"),
        lambda h, t: t["keys"].__setitem__((0, 1, 0), 2),  # after its query
        lambda h, t: t["keys"].__setitem__((0, 4, 0), -1),
        lambda h, t: t["keys"].__setitem__((0, 0, 0), -2),
        lambda h, t: t["weights"].__setitem__((0, 4, 0), torch.nan),
        lambda h, t: t["weights"].__setitem__((0, 4, 0), -1),
        lambda h, t: t["weights"].__setitem__((0, 4, 1), 1e9),
        lambda h, t: t["diagonals"].__setitem__((0, 4, 0), torch.inf),
        lambda h, t: t["token_ids"].__setitem__(0, -1),
        lambda h, t: t.update(keys=t["keys"].float()),
        lambda h, t: t.update(weights=t["weights"].double()),
        lambda h, t: t.update(keys=t["keys"][..., 0]),
        lambda h, t: t.update({name: t[name][..., :0] for name in ("keys", "weights")}),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_damaged_files(tiny, tmp_path, damage):
    file = tmp_path / "a.safetensors"
    sp.top_keys(tiny, random_tokens(1, 5)[0], ["L0H0", "L0H1"], top=2, offsets=[0, 1]).save(file)
    header, tensors = parts(file)
    damage(header, tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"slashpatch": json.dumps(header)})
    with pytest.raises(ScanError) as caught:
        sp.TopKeys.load(file)
    assert len(str(caught.value).splitlines()) == 1


def test_other_files(tiny, tmp_path):
    scan = tmp_path / "scan.safetensors"
    sp.scan(tiny, random_tokens(1, 9), [1]).save(scan)
    with pytest.raises(ScanError, match="holds nothing of the format slashpatch-top-keys"):
        sp.TopKeys.load(scan)
    deep = tmp_path / "deep.safetensors"
    save_file({"a": torch.ones(1)}, deep, metadata={"slashpatch": "[" * 100_000})
    whole = scan.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    for name in (".", "none.safetensors", "cut.safetensors", "deep.safetensors"):
        with pytest.raises(ScanError) as caught:
            sp.TopKeys.load(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1
    sp.top_keys(tiny, "the of", "L0H0").save(tmp_path / "keys.safetensors")
    with pytest.raises(ScanError, match="holds nothing of the format slashpatch-scan"):
        sp.Scan.load(tmp_path / "keys.safetensors")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"heads": []}, HeadError, "no heads were given"),
        ({"heads": "L9H9"}, HeadError, "L9H9 does not exist"),
        ({"top": 0}, ScanError, "top is an integer from 1"),
        ({"top": True}, ScanError, "top is an integer from 1"),
        ({"top": 2.0}, ScanError, "top is an integer from 1"),
        ({"top": N_CTX + 1}, ScanError, f"context of {N_CTX}; got {N_CTX + 1}"),
        ({"offsets": -1}, OffsetError, "integer from 0"),
        ({"offsets": N_CTX}, OffsetError, "does not fit the model's context"),
        ({"engine": "warp"}, ScanError, "engine must be one of"),
        ({"text": ["w1", "w2"]}, PromptError, "reads one text; got 2"),
        ({"text": random_tokens(2, 5)}, PromptError, "reads one text; got 2"),
        ({"text": ""}, PromptError, "empty"),
        ({"text": "w1 " * 200}, PromptError, f"context is {N_CTX}"),
        ({"text": "absent.txt"}, PromptError, "no file"),
    ],
)
def test_bad_input(tiny, kwargs, error, message):
    arguments = {"text": "w1 w2", "heads": "L0H0", **kwargs}
    with pytest.raises(error, match=message):
        sp.top_keys(tiny, **arguments)


def test_nan_in_a_pattern_is_named():
    model = tiny_model(seed=2)

    def spoil(pattern, hook):
        pattern = pattern.clone()
        pattern[:, 2, 5, 4] = torch.nan
        return pattern

    tokens = random_tokens(1, 9)[0]
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", spoil)]):
        with pytest.raises(ScanError, match="pattern of L1H2 has NaN or infinite"):
            sp.top_keys(model, tokens, HEADS, offsets=[0])
        assert sp.top_keys(model, tokens, "L1H1").provenance["engine"] == "bridge"


def test_a_hook_that_does_not_fire_is_noticed(tiny, monkeypatch):
    from slashpatch import bridge as module

    monkeypatch.setattr(module, "run_for_hooks", lambda *args: None)
    with pytest.raises(ModelError, match="layer 1 did not fire"):
        sp.top_keys(tiny, "w1 w2", "L1H0")


def test_the_model_is_left_alone(tiny):
    tokens = random_tokens(1, 12)
    before = tiny(tokens)
    sp.top_keys(tiny, tokens[0], HEADS)
    assert torch.equal(tiny(tokens), before)
