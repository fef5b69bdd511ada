"""Activation patching against activations that are replaced by hand, and the planted circuit."""

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slashpatch as sp
from slashpatch.bridge import read
from slashpatch.effects.between_runs.targets import targets
from slashpatch.errors import EditError, HeadError, ModelError, OffsetError, PromptError

from ..planted import induction_model
from ..tiny import random_tokens, tiny_model
from ..zoo import zoo


def some_pairs(n=2, pos=10, seed=0):
    clean, corrupt = random_tokens(n, pos, seed), random_tokens(n, pos, seed + 100)
    return sp.Pairs(tuple(clean), tuple(corrupt), (10,) * n, (20,) * n)


def answers(model, tokens, hooks=()):
    """Logit differences of a run with plain TransformerLens hooks."""
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, fwd_hooks=list(hooks))[:, -1].double()
    return logits[:, 10] - logits[:, 20]


def activations(model, tokens):
    """All activations of a run, by hook name."""
    with torch.no_grad():
        return model.run_with_cache(tokens)[1]


def z_by_hand(model, cache, part, layer, head, other, offset):
    """z of one head with a part from another run; Llama only, by whole matrices."""
    name = f"blocks.{layer}.attn."
    n_heads, group = model.cfg.n_heads, model.cfg.n_heads // model.cfg.n_key_value_heads
    assert head < n_heads
    kv = head // group

    def rotated(of, x):
        """[batch, pos, d_head] with the run's own cos and sin."""
        cos, sin = (of[name + f"hook_{table}"] for table in ("cos", "sin"))
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def of(run, which):
        at = head if which == "q" else kv
        return run[name + f"{which}.hook_out"][:, :, at]

    def pattern(q, k):
        scores = rotated(cache, q) @ rotated(cache, k).mT / math.sqrt(model.cfg.d_head)
        return scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)

    q, k, v = (of(other if part == which else cache, which) for which in "qkv")
    if part == "z":
        return other[name + "hook_z"][:, :, head]
    if part != "diagonal":
        return pattern(q, k) @ v
    z = cache[name + "hook_z"][:, :, head].clone()
    here, there = (run[name + "hook_pattern"][:, head] for run in (cache, other))
    for i in range(offset, z.shape[1]):
        j = i - offset
        z[:, i] += there[:, i, j, None] * of(other, "v")[:, j] - here[:, i, j, None] * v[:, j]
    return z


@pytest.mark.parametrize("engine", [contextlib.nullcontext, sp.fused])
@settings(max_examples=12, deadline=None)
@given(
    head=st.tuples(st.integers(0, 1), st.integers(0, 3)),
    part=st.sampled_from(["z", "q", "k", "v", "diagonal"]),
    offset=st.integers(0, 5),
    seed=st.integers(0, 100),
)
def test_a_patch_equals_z_replaced_by_hand(tiny, engine, head, part, offset, seed):
    pairs, (layer, index) = some_pairs(seed=seed), head
    runs = {"clean": torch.stack(pairs.clean), "corrupt": torch.stack(pairs.corrupt)}
    caches = {name: activations(tiny, tokens) for name, tokens in runs.items()}
    given_ = {"offsets": offset} if part == "diagonal" else {"parts": part}
    with engine(tiny) if engine is sp.fused else engine():
        found = sp.activation_patching(tiny, [sp.Head(*head)], pairs, **given_).frame
    for direction, here, there in (
        ("denoising", "corrupt", "clean"),
        ("noising", "clean", "corrupt"),
    ):
        new = z_by_hand(tiny, caches[here], part, layer, index, caches[there], offset)

        def put(z, hook, new=new):
            z = z.clone()
            z[:, :, index] = new
            return z

        expected = answers(tiny, runs[here], [(f"blocks.{layer}.attn.hook_z", put)])
        row = found[found["direction"] == direction].iloc[0]
        assert row["edited"] == pytest.approx(float(expected.mean()), abs=2e-4)
        assert row["baseline"] == pytest.approx(float(answers(tiny, runs[here]).mean()), abs=2e-4)


FAMILIES = [
    "Gemma 2", "GPT-NeoX, Pythia", "OLMo 2", "Cohere", "HunYuan", "Falcon", "Phi-3", "GPT-2",
    "GPT-OSS", "SmolLM3",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_parts_add_up_in_every_family(name):
    """q, k and v of a head together are its z; and so are all its diagonals."""
    model, pairs = zoo(name), some_pairs(pos=9)
    for head in ("L0H1", "L1H2"):
        items = [head, [f"{head}.{part}" for part in "qkv"], sp.KnockOut(head, range(9))]
        frame = sp.activation_patching(model, items, pairs).frame.set_index(["part", "direction"])
        for direction in ("denoising", "noising"):
            whole = frame.loc[("z", direction), "edited"]
            assert frame.loc[("q, k, v", direction), "edited"] == pytest.approx(whole, abs=2e-4)
            assert frame.loc[("diagonal", direction), "edited"] == pytest.approx(whole, abs=2e-4)
            assert abs(frame.loc[("z", direction), "effect"]) > 1e-5


def test_both_engines_agree_and_batches_do_not_matter():
    model, pairs = zoo("Qwen3"), some_pairs(3)
    items = ["L0H1.q", "L0H1.k", "L1H3.v", "L0H2@1", ["L0H0@0", "L1H1@2", "L1H0.k", "L1H3"]]
    whole = sp.activation_patching(model, items, pairs).frame
    by_one = sp.activation_patching(model, items, pairs, batch_size=1).frame
    with sp.fused(model):
        fused = sp.activation_patching(model, items, pairs).frame
    for other in (by_one, fused):
        assert (whole["edited"] - other["edited"]).abs().max() < 1e-4
    assert not any(point._forward_hooks for point in model.hook_points())


def test_everything_from_the_other_run_is_the_other_run():
    """All z of all layers: what is left of the run is its last token, which both runs share."""
    model, clean = tiny_model(seed=3), random_tokens(2, 10)
    corrupt = random_tokens(2, 10, 9)
    corrupt[:, -1] = clean[:, -1]
    pairs = sp.Pairs(tuple(clean), tuple(corrupt), (10, 11), (20, 21))
    found = sp.activation_patching(model, [["L0", "L1"]], pairs)
    values = found.tables["values"].groupby(["patched", "direction"], sort=False)["value"]
    clean, corrupt, *patched = (torch.tensor(of.to_numpy()) for _, of in values)
    for after, other in zip(patched, (clean, corrupt), strict=True):
        assert float((after - other).abs().max()) < 1e-4
    assert float((clean - corrupt).abs().min()) > 0.01


def test_a_run_patched_from_itself_does_not_change(tiny):
    tokens = tuple(random_tokens(6, 10))
    pairs = sp.Pairs(tokens, tokens, (10,) * 6, (20,) * 6)
    items = ["L0H1", "L0H1.q", "L0H1.k", "L0H1.v", "L1H0@1", ["L0", "L1"]]
    found = sp.activation_patching(tiny, items, pairs)
    assert found.frame["effect"].abs().max() < 1e-5
    assert found.frame["normalized"].isna().all()
    assert "do not differ clearly" in found.remarks[1]


def test_only_the_heads_own_keys_and_values_are_patched(tiny):
    """Heads 0 and 1 share keys: patching those of head 0 leaves z of head 1 alone."""
    pairs = some_pairs()
    for part in "kv":
        seen = []
        read = ("blocks.0.hook_attn_out", lambda x, hook, seen=seen: seen.append(x))
        with tiny.hooks(fwd_hooks=[read]):
            sp.activation_patching(tiny, f"L0H0.{part}", pairs, directions="noising")
        change = (seen[-1] - seen[0]).flatten(0, 1)
        assert change.abs().max() > 1e-3
        writes = tiny.blocks[0].attn.W_O[0].detach()
        found = torch.linalg.lstsq(writes.T, change.T).solution
        assert float((writes.T @ found - change.T).abs().max()) < 1e-4


@pytest.fixture(scope="module")
def planted():
    model = induction_model()
    items = ["L0H0@1", "L0H0@2", "L0H1", "L1H2.q", "L1H2.k", "L1H2.v", "L1H2", "L1H1"]
    return sp.activation_patching(model, items, n_prompts=6)


def test_the_known_circuit_comes_out(planted):
    frame = planted.frame.set_index(["patched", "direction"])
    for direction in ("denoising", "noising"):
        share = frame.xs(direction, level="direction")["normalized"]
        for carries in ("L0H0@1", "L1H2.k", "L1H2"):
            assert share[carries] == pytest.approx(1, abs=0.01)
        for does_not in ("L0H0@2", "L0H1", "L1H2.q", "L1H2.v", "L1H1"):
            assert share[does_not] == pytest.approx(0, abs=0.01)
    values = planted.tables["values"].set_index(["patched", "direction"])["value"]
    assert (values.loc["clean", ""] > 5).all()
    assert (values.loc["corrupt", ""] < -5).all()
    assert "100% and 100%" in planted.remarks[0]
    assert planted.provenance["prompts"]["n"] == 6


def test_active_patches_are_part_of_both_runs():
    """With the slash knocked out the circuit copies nothing, and its diagonal carries nothing."""
    model = induction_model()
    with sp.patch(model, "KnockOut(L0H0, 1)"):
        found = sp.activation_patching(model, ["L0H0@1", "L1H2.k"], n_prompts=4)
    assert found.frame["effect"].abs().max() < 0.5
    with sp.patch(model, "AblateHeads(L0H0)"), pytest.raises(ModelError, match="pattern times"):
        sp.activation_patching(model, "L0H0@1", n_prompts=2)


def test_what_heads_can_be(tiny):
    info = read(tiny)

    def named(*args, **more):
        return [str(group) for group in targets(info, *args, **more)]

    assert named("L0H1") == named([(0, 1)]) == named(sp.Head(0, 1)) == ["L0H1"]
    assert named("L0H1, L1H0") == ["L0H1", "L1H0"]
    assert named("L0H1", "q,k") == ["L0H1.q", "L0H1.k"]
    assert named([["L0H0", "L1H0"]], ("z", "v")) == ["L0H0, L1H0", "L0H0.v, L1H0.v"]
    assert named("L0H1", None, [1, 2]) == ["L0H1@1", "L0H1@2"] == named("L0H1@1-2")
    assert named([[("L0H1", 1), ("L1H0", 2)]]) == ["L0H1@1, L1H0@2"]
    assert named([[sp.KnockOut("L0H1", 1), "KnockOut(L1H0, 2)"]]) == ["L0H1@1, L1H0@2"]
    assert named("KnockOut((L0H1, L1H0), (1, 2))") == ["L0H1@1, L0H1@2, L1H0@1, L1H0@2"]
    assert named(["L0H1.k", ["L0H1.q", "L0H1.k"]]) == ["L0H1.k", "L0H1.k, L0H1.q"]
    assert len(named([["L0", "L1"]])[0].split(", ")) == 8


def test_bad_input(tiny):
    pairs = some_pairs()
    for wrong, error, said in (
        ({"heads": "L9H0"}, HeadError, "L9H0 does not exist"),
        ({"heads": "L0H0.w"}, EditError, "or a diagonal such as"),
        ({"heads": "L0H0@99"}, OffsetError, "does not fit the model"),
        ({"heads": "L0H0@20"}, PromptError, "needs prompts of at least 21 tokens"),
        ({"heads": []}, EditError, "no heads were given"),
        ({"heads": [[]]}, EditError, "is empty"),
        ({"heads": ["L0H0", "L0H0.z"]}, EditError, "given twice"),
        ({"heads": [["L0H0", "L0H0@1"]]}, EditError, "z holds all"),
        ({"heads": [["L0H0.v", "L0H0@1"]]}, EditError, "only q, k and v go together"),
        ({"heads": "AblateHeads(L0H0)"}, EditError, "which KnockOut can name"),
        ({"parts": "w"}, EditError, "parts must be some of"),
        ({"parts": "diagonal"}, EditError, "go together"),
        ({"parts": "z", "offsets": 1}, EditError, "go together"),
        ({"directions": "both"}, EditError, "directions must be some of"),
        ({"directions": ()}, EditError, "directions must be some of"),
    ):
        with pytest.raises(error, match=said):
            sp.activation_patching(tiny, **{"heads": "L0H0", "pairs": pairs, **wrong})
