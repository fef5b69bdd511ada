"""Every tool on models whose weights are on disk or kept by accelerate: the same numbers."""

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM

import slashpatch as sp
from slashpatch import bridge as info
from slashpatch.bridge.fingerprint import fingerprint
from slashpatch.bridge.offloaded import offloaded_weights, places
from slashpatch.effects.controls.heads import output_norms
from slashpatch.effects.running.inputs import Batch
from slashpatch.errors import ModelError

from ..tiny import llama, random_tokens, tokenizer
from ..zoo import FAMILIES, build

MAP = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.layers.2": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    llama(seed=0, layers=3).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A model whose unembedding is its embedding."""
    folder = tmp_path_factory.mktemp("models") / "tiny-tied"
    llama(seed=0, layers=3, tie_word_embeddings=True).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(directory):
    return sp.load(directory, device="cpu")


def in_memory(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def cpu_offloaded(directory, folder):
    hf_model = in_memory(directory)
    accelerate.cpu_offload(hf_model, execution_device=CPU)
    return sp.load(hf_model, tokenizer=tokenizer())


def disk_offloaded(directory, folder):
    hf_model = in_memory(directory)
    accelerate.disk_offload(hf_model, str(folder), execution_device=CPU)
    return sp.load(hf_model, tokenizer=tokenizer())


def offloaded_later(directory, folder):
    """accelerate replaces the `forward` of the bridge's own blocks."""
    model = sp.load(directory, device="cpu")
    accelerate.cpu_offload(model.original_model, execution_device=CPU)
    return model


WAYS = {
    "disk": lambda directory, folder: sp.load(directory, device_map="disk"),
    "cpu and disk": lambda directory, folder: sp.load(
        directory, device_map=MAP | ({"lm_head": "cpu"} if "tied" in directory.name else {})
    ),
    "auto": lambda directory, folder: sp.load(
        directory, device_map="auto", max_memory={"cpu": "30KB"}, offload_folder=folder
    ),
    "cpu_offload": cpu_offloaded,
    "disk_offload": disk_offloaded,
    "cpu_offload of the bridge": offloaded_later,
}


@pytest.fixture(scope="module", params=WAYS)
def offloaded(request, directory, tmp_path_factory):
    model = WAYS[request.param](directory, tmp_path_factory.mktemp("offload"))
    assert next(offloaded_weights(model.original_model), None), "nothing is offloaded"
    return model


def equal_frames(ours, expected, exact=True):
    import pandas as pd

    rounding = {} if exact else {"atol": 1e-4, "rtol": 1e-4}
    pd.testing.assert_frame_equal(ours, expected, check_exact=exact, **rounding)


def test_logits_hooks_and_device(offloaded, plain):
    tokens = random_tokens(2, 12)
    assert torch.device(offloaded.cfg.device) == CPU
    with torch.no_grad():
        assert torch.equal(offloaded(tokens), plain(tokens))
        _, ours = offloaded.run_with_cache(tokens)
        _, expected = plain.run_with_cache(tokens)
    assert set(ours) == set(expected)
    for name in expected:
        assert torch.equal(ours[name], expected[name]), name


@pytest.mark.parametrize("engine", ["fused", "bridge"])
def test_scan(offloaded, plain, engine):
    tokens = random_tokens(3, 20)
    ours, expected = (sp.scan(model, tokens, "all", engine) for model in (offloaded, plain))
    assert torch.equal(ours.sums, expected.sums)
    equal_frames(ours.rank_one, expected.rank_one)
    assert ours.provenance["engine_of_layers"] == expected.provenance["engine_of_layers"]
    assert ours.provenance["fingerprint"] == expected.provenance["fingerprint"]
    assert (ours + expected).n_tokens == 120


EDITS = (
    sp.KnockOut("L0H1", 1),
    sp.ShiftSlash("L1H0", 1),
    sp.FreezeBand("L1H2", "high"),  # per-head keys
    sp.RankOne("L2H3", "q"),
    sp.AblateHeads("L2H0", mode="mean"),
)


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_edits_leave_no_trace(offloaded, plain, edit):
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        clean = plain(tokens)
        with sp.patch(plain, edit):
            expected = plain(tokens)
        for context in (torch.no_grad, lambda: sp.fused(offloaded)):
            with context(), sp.patch(offloaded, edit):
                torch.testing.assert_close(offloaded(tokens), expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(offloaded(tokens), clean)


def test_generation_under_edits_and_a_monitor(offloaded, plain):
    found = []
    for model in (offloaded, plain):
        with (
            sp.patch(model, sp.KnockOut("L0H1", 1), sp.SwapBands("L1H2", "high", "low")),
            sp.SlashMonitor(model, offsets=range(4)) as monitor,
        ):
            text = model.generate(
                random_tokens(2, 8), max_new_tokens=6, do_sample=False, verbose=False,
                stop_at_eos=False, return_type="tokens",
            )  # fmt: skip
        found.append((text, monitor.scores))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    "tool",
    [
        lambda model: sp.sweep(model, "KnockOut({head}, 1)", metric="copying", n_prompts=3),
        lambda model: sp.measure(
            model, "KnockOut(L0H1, 1)", ["loss", "kl"], n_prompts=3, max_tokens=20,
            controls=["random-heads:2", "matched-heads:3"],
        ),
        lambda model: sp.flow(model, random_tokens(2, 12), "KnockOut(L1H1, 1)", [1, 2]),
        lambda model: sp.copying(model, "KnockOut(L1H1, 1)", n_prompts=3, n_tokens=8),
        lambda model: sp.paths(model, "KnockOut(L0H1, 1)", "L2H0-1", n_prompts=3, max_tokens=17),
        lambda model: sp.screen(model, n_prompts=6, max_tokens=17, verify=3, audit=3),
        lambda model: sp.activation_patching(
            model, ["L0H1.k", "L1H1@1", "L1H0.v"], n_prompts=3, n_tokens=8
        ),
        lambda model: sp.direct_effect(
            model, "KnockOut(L0H1, 1)", "copying", n_prompts=3, max_tokens=17
        ),
    ],
    ids=["sweep", "measure", "flow", "copying", "paths", "screen", "pairs", "direct"],
)  # fmt: skip
def test_effects(offloaded, plain, tool):
    ours, expected = tool(offloaded), tool(plain)
    # Logits of one position alone are rounded as their weights lie in memory.
    equal_frames(ours.frame, expected.frame, exact=ours.kind != "pairs")
    forwards = {id(block): block.__dict__.get("forward") for block in offloaded.blocks}
    tool(offloaded)
    assert forwards == {id(block): block.__dict__.get("forward") for block in offloaded.blocks}


def test_explain(offloaded, plain):
    ours, expected = (
        sp.explain(model, "L1H1", random_tokens(2, 24), offset=1) for model in (offloaded, plain)
    )
    assert ours.to_row() == expected.to_row()


def test_check(offloaded):
    assert sp.check(offloaded).ok


def test_gradients(offloaded, plain):
    """Of hooked values: the weights that a pass used are kept until its backward."""
    found = []
    for model in (offloaded, plain):
        kept = {}

        def keep(z, hook, kept=kept):
            kept[hook.layer()] = z.requires_grad_()
            z.retain_grad()
            return z

        hooks = [(f"blocks.{layer}.attn.hook_z", keep) for layer in range(3)]
        loss = model.run_with_hooks(random_tokens(2, 9), fwd_hooks=hooks, return_type="loss")
        loss.backward()
        found.append([kept[layer].grad for layer in range(3)])
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)


def test_output_norms(offloaded, plain):
    """They read W_O outside a pass, where it has no values."""
    batch = Batch(torch.arange(2), random_tokens(2, 9), 2)
    assert torch.equal(output_norms(offloaded, [batch]), output_norms(plain, [batch]))


def test_provenance_says_where_weights_are(plain, directory, tmp_path):
    def weights_on(model):
        return sp.scan(model, random_tokens(1, 6), 1).provenance.get("weights_on")

    assert weights_on(plain) is None
    assert weights_on(sp.load(directory, device_map="disk")) == ["disk"]
    assert weights_on(sp.load(directory, device_map=MAP)) == ["cpu", "disk"]
    assert weights_on(cpu_offloaded(directory, tmp_path)) is None


@pytest.mark.parametrize("way", WAYS)
def test_the_fingerprint_is_that_of_the_weights(way, directory, tied, tmp_path):
    """Also where weights are tied: accelerate has them twice."""
    for folder in (directory, tied):
        model = WAYS[way](folder, tmp_path / folder.name)
        assert fingerprint(model) == fingerprint(sp.load(folder, device="cpu"))


def test_the_fingerprint_follows_a_changed_file(tmp_path):
    hf_model = llama(seed=0)
    accelerate.disk_offload(hf_model, str(tmp_path), execution_device=CPU)
    model = sp.load(hf_model)
    before = fingerprint(model)
    assert fingerprint(model) == before
    file = tmp_path / "model.layers.1.mlp.up_proj.weight.dat"
    bits = bytearray(file.read_bytes())
    bits[0] ^= 1
    file.write_bytes(bits)
    assert fingerprint(model) != before


def test_the_fingerprint_follows_a_changed_weight_in_memory(directory, tmp_path):
    model = cpu_offloaded(directory, tmp_path)
    before = fingerprint(model)
    module, name = next(offloaded_weights(model.original_model))
    with torch.no_grad():
        module._hf_hook.weights_map[name].mul_(2)
    assert fingerprint(model) != before


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family):
    """Joint projections, norms of queries and keys, attention sinks, experts."""
    hf_model = build(FAMILIES[family])
    tokens = random_tokens(2, 14)
    try:
        expected = sp.scan(sp.load(hf_model), tokens, [0, 1, 2])
    except ModelError:
        pytest.skip("refused in memory too")
    hf_model = build(FAMILIES[family])
    accelerate.cpu_offload(hf_model, execution_device=CPU)
    model = sp.load(hf_model)
    ours = sp.scan(model, tokens, [0, 1, 2])
    assert ours.provenance["fingerprint"] == expected.provenance["fingerprint"]
    torch.testing.assert_close(ours.scores, expected.scores, atol=1e-6, rtol=0)
    info.read(model)


def test_weights_without_values_are_refused():
    hf_model = llama(seed=0)
    hf_model.model.layers[1].to("meta")
    assert "meta" in places(hf_model)
    with pytest.raises(ModelError, match="some of its weights are on the meta device"):
        sp.load(hf_model)


def test_offloaded_weights_are_neither_moved_nor_cast(directory):
    for options in ({"device": "cpu"}, {"dtype": "bfloat16"}):
        hf_model = in_memory(directory)
        accelerate.cpu_offload(hf_model, execution_device=CPU)
        with pytest.raises(ModelError, match="can be neither moved nor cast"):
            sp.load(hf_model, **options)


def test_dtype_on_disk(directory):
    ours = sp.load(directory, device_map="disk", dtype="bfloat16")
    expected = sp.load(directory, device="cpu", dtype="bfloat16")
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(ours(tokens), expected(tokens))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cpu", "device_map": "auto"}, "device='cpu' and a device_map both say"),
        ({"max_memory": {"cpu": "1GB"}}, "max_memory needs a device_map"),
        ({"offload_folder": "x"}, "offload_folder needs a device_map"),
        ({"device_map": "everywhere"}, "cannot load"),
    ],
)
def test_contradictions(directory, options, message):
    with pytest.raises(ModelError, match=message):
        sp.load(directory, **options)


def test_a_map_that_splits_a_tied_weight(tied):
    with pytest.raises(ModelError, match="lm_head.weight and model.embed_tokens.weight are one"):
        sp.load(tied, device_map=MAP)


def test_a_map_of_modules_inside_one_another(directory):
    for outer in ("", "model"):
        with pytest.raises(
            ModelError, match=r"puts model\.layers\.1 on disk and .* it lies, on cpu"
        ):
            sp.load(directory, device_map={outer: "cpu", "model.layers.1": "disk"})


def test_a_model_in_memory_takes_no_map(plain):
    for model in (llama(seed=0), plain):
        with pytest.raises(ModelError, match="dispatch_model before"):
            sp.load(model, device_map="auto")
