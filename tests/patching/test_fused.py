"""The fused engine against TransformerLens' own attention."""

import contextlib
import dataclasses
import importlib
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import slashpatch as sp
from slashpatch.bridge import read
from slashpatch.errors import FusedError, ModelError
from slashpatch.patching.fused import engine_of_layers, why_not
from slashpatch.patching.mask_and_keys import MaskArgument
from slashpatch.patching.stand_ins import Scores

from ..tiny import bridge, llama, padded, random_tokens, tiny_model
from ..zoo import FAMILIES, zoo
from .test_patch import models, some_edits

pytestmark = pytest.mark.filterwarnings("ignore:run_with_hooks. skipped")
each_family = pytest.mark.parametrize(
    "name", [name for name in FAMILIES if not FAMILIES[name].refused]
)


def run(model, tokens, engine, *edits, **kwargs):
    """Logits, and every hooked tensor but scores and pattern, by name."""
    found = {}

    def keep(tensor, hook):
        found[hook.name] = tensor.detach().clone()

    def wanted(name):
        return not name.endswith(("hook_attn_scores", "hook_pattern"))

    inside = sp.fused(model) if engine == "fused" else contextlib.nullcontext()
    with torch.no_grad(), sp.patch(model, *edits), inside:
        logits = model.run_with_hooks(tokens, fwd_hooks=[(wanted, keep)], **kwargs)
        return logits, found, engine_of_layers(model)


def assert_same(ours, theirs, real=None):
    """Assert that every hooked tensor is equal within float32 rounding, at real tokens.

    A logit's terms are of order 100 here, so its rounding error is about 100 · eps · √d_head, or
    5e-5, which is the relative error of a weight. Two layers add up to about four times that.
    """
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        one, other = ours[name], tensor
        assert (one.shape, one.dtype) == (other.shape, other.dtype), name
        if real is not None:
            if one.shape[:2] != real.shape:  # [batch, head, pos, ...]
                one, other = (x.transpose(1, 2) if x.ndim > 2 else x for x in (one, other))
            if one.shape[:2] != real.shape:
                continue  # tables of cos and sin
            one, other = one[real], other[real]
        scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
        torch.testing.assert_close(one, other, atol=2e-4 * scale, rtol=0, msg=name)


@each_family
def test_every_hook_fires_with_equal_values(name):
    model = zoo(name)
    tokens = random_tokens(2, 20)
    theirs, expected, _ = run(model, tokens, "bridge")
    ours, found, engines = run(model, tokens, "fused")
    assert_same(found, expected)
    torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=0)
    assert " ".join(engines) == FAMILIES[name].computed_by


@each_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(name, side):
    model = zoo(name)
    rows = [random_tokens(1, n, n)[0] for n in (20, 13, 20, 4)]
    tokens, mask = padded(rows, side)
    theirs, expected, _ = run(model, tokens, "bridge", attention_mask=mask)
    ours, found, _ = run(model, tokens, "fused", attention_mask=mask)
    real = mask.bool()
    assert_same(found, expected, real)
    scale = float(theirs.abs().max())
    torch.testing.assert_close(ours[real], theirs[real], atol=1e-4 * scale, rtol=0)
    assert ours.isfinite().all()


@each_family
def test_prefill_then_cached_tokens(name):
    """Includes several new tokens at once after cached ones, and prompts beyond the window."""
    model = zoo(name)
    tokens = random_tokens(2, 24)
    found = {}
    for engine in ("bridge", "fused"):
        inside = sp.fused(model) if engine == "fused" else contextlib.nullcontext()
        parts, cache = [], None
        with torch.no_grad(), inside:
            for start, stop in ((0, 12), (12, 13), (13, 20), (20, 21), (21, 22)):
                out = model.original_model(
                    tokens[:, start:stop], past_key_values=cache, use_cache=True
                )
                cache = out.past_key_values
                parts.append(out.logits)
        found[engine] = torch.cat(parts, dim=1)
    scale = float(found["bridge"].abs().max())
    torch.testing.assert_close(found["fused"], found["bridge"], atol=1e-4 * scale, rtol=0)


@each_family
def test_scans_agree(name):
    model = zoo(name)
    prompts = [random_tokens(1, n, n)[0] for n in (20, 9, 20)]
    if "LongRoPE" in name:  # no profile of prompts that rotate differently
        prompts = prompts[::2]
    found = [sp.scan(model, prompts, "all", engine) for engine in ("bridge", "fused")]
    torch.testing.assert_close(found[0].scores, found[1].scores, atol=1e-5, rtol=0)
    assert found[0].provenance["engine_of_layers"] == ["bridge"] * 2
    assert " ".join(found[1].provenance["engine_of_layers"]) == FAMILIES[name].computed_by
    assert sp.scan(model, prompts, 1).provenance["engine"] == "fused"
    if found[0].moments is not None:
        for part, tensor in found[0].moments.tensors().items():
            torch.testing.assert_close(
                found[1].moments.tensors()[part], tensor, atol=1e-3, rtol=1e-4, equal_nan=True
            )


@given(models, some_edits, st.integers(0, 99), st.sampled_from(["left", "right"]))
@settings(max_examples=25)
def test_edits_together_with_padding_in_a_scan(model, edits, seed, side):
    rows = [random_tokens(1, n, seed + n)[0] for n in (9, 14)]
    tokens, mask = padded(rows, side)
    theirs, expected, _ = run(model, tokens, "bridge", *edits, attention_mask=mask)
    ours, found, _ = run(model, tokens, "fused", *edits, attention_mask=mask)
    assert_same(found, expected, mask.bool())
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], atol=3e-4, rtol=1e-4)
    with sp.patch(model, *edits):
        scans = [sp.scan(model, rows, range(9), engine) for engine in ("bridge", "fused")]
    # Factors above 1 on the pattern amplify rounding errors.
    torch.testing.assert_close(scans[0].scores, scans[1].scores, atol=5e-5, rtol=0)


@given(models, some_edits, st.integers(0, 99))
@settings(max_examples=10)
def test_generation_under_edits(model, edits, seed):
    prompt = random_tokens(2, 7, seed)

    def written():
        return model.generate(
            prompt, max_new_tokens=6, do_sample=False, verbose=False, stop_at_eos=False
        )

    with sp.patch(model, *edits), sp.SlashMonitor(model, [0, 1]) as theirs:
        expected = written()
    with sp.fused(model), sp.patch(model, *edits), sp.SlashMonitor(model, [0, 1]) as ours:
        found = written()
    assert torch.equal(found, expected)
    torch.testing.assert_close(ours.scores, theirs.scores, atol=5e-5, rtol=0)
    assert torch.equal(ours.n_rows, theirs.n_rows)


def test_nesting_in_any_order(tiny):
    tokens = random_tokens(1, 12)
    edit = sp.KnockOut("L0H1", 1)
    with torch.no_grad():
        with sp.patch(tiny, edit):
            expected = tiny(tokens)
        found = []
        with sp.patch(tiny, edit), sp.fused(tiny):
            found.append(tiny(tokens))
        with sp.fused(tiny), sp.patch(tiny, edit), sp.fused(tiny):
            found.append(tiny(tokens))
        with sp.fused(tiny):
            found.append(tiny.run_with_hooks(tokens, fwd_hooks=sp.hooks(tiny, edit)))
        inner, outer = contextlib.ExitStack(), contextlib.ExitStack()
        outer.enter_context(sp.fused(tiny))
        inner.enter_context(sp.patch(tiny, edit))
        outer.close()  # first in, first out
        assert torch.equal(tiny(tokens), expected)
        inner.close()
    for logits in found:
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def state_of(model):
    """Return the state of a model that `fused` changes."""
    configs = {
        str(module.config._attn_implementation)
        for module in model.original_model.modules()
        if hasattr(getattr(module, "config", None), "_attn_implementation")
    }
    return (
        configs,
        [set(block.attn.__dict__) for block in model.blocks],
        len(model.original_model._forward_pre_hooks),
        len(model.original_model._forward_hooks),
    )


@pytest.mark.parametrize("fails", [False, True])
def test_leaving_restores_bit_for_bit(fails):
    model = tiny_model(seed=3)
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        before = model(tokens)
    state = state_of(model)

    def fail(tensor, hook):
        raise ZeroDivisionError

    name = "blocks.1.attn.hook_rot_k"
    with contextlib.suppress(ZeroDivisionError), sp.fused(model), torch.no_grad():
        assert not torch.equal(model(tokens), before)  # the engines round differently
        if fails:
            model.run_with_hooks(tokens, fwd_hooks=[(name, fail)])
    assert state_of(model) == state
    with torch.no_grad():
        assert torch.equal(model(tokens), before)
    with sp.fused(model), torch.no_grad():  # works a second time
        model(tokens)


@pytest.mark.parametrize("name", ["hook_pattern", "hook_attn_scores"])
def test_other_hooks_on_scores_or_pattern_are_refused(tiny, name):
    tokens, name = random_tokens(1, 8), f"blocks.1.attn.{name}"
    alternatives = "run outside slashpatch.fused.*slashpatch.scan or SlashMonitor"
    with pytest.raises(FusedError, match=f"{name}.*{alternatives}"), sp.fused(tiny):
        tiny.run_with_hooks(tokens, fwd_hooks=[(name, lambda tensor, hook: None)])
    with pytest.raises(FusedError, match=alternatives), sp.fused(tiny):
        tiny.run_with_cache(tokens)
    with sp.fused(tiny):
        tiny.run_with_cache(tokens, names_filter="blocks.0.attn.hook_z")
    tiny.add_hook(name, lambda tensor, hook: None)
    try:
        with pytest.raises(FusedError, match=alternatives), sp.fused(tiny):
            pytest.fail("entered")
        with pytest.raises(FusedError, match=alternatives):
            sp.scan(tiny, tokens, 1, "fused")
        assert sp.scan(tiny, tokens, 1).provenance["engine"] == "bridge"
        assert name in why_not(tiny)
    finally:
        tiny.reset_hooks()
    assert state_of(tiny)[0] == {"eager"}


@pytest.mark.parametrize(
    "point", ["hook_rot_q", "hook_rot_k", "v.hook_out", "q.hook_out", "hook_in"]
)
def test_hooks_of_others_have_the_same_effect(tiny, point):
    tokens = random_tokens(1, 12)
    hooks = [(f"blocks.0.attn.{point}", lambda tensor, hook: 0.5 * tensor)]
    with torch.no_grad():
        expected = tiny.run_with_hooks(tokens, fwd_hooks=hooks)
        assert not torch.allclose(expected, tiny(tokens))
        with sp.fused(tiny):
            found = tiny.run_with_hooks(tokens, fwd_hooks=hooks)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_scan_with_the_bridge_engine_inside_fused(tiny):
    tokens = random_tokens(1, 12)
    expected = sp.scan(tiny, tokens, [0, 1], "bridge")
    with sp.fused(tiny):
        found = sp.scan(tiny, tokens, [0, 1], "bridge")
        assert found.provenance["engine_of_layers"] == ["bridge", "bridge"]
    assert torch.equal(found.scores, expected.scores)


@dataclasses.dataclass(frozen=True, repr=False)
class Flatten(sp.Edit):
    """A user's own edit, which needs the whole matrix."""

    def on_scores(self, context, scores):
        return scores / 2

    def on_pattern(self, context, pattern):
        return pattern**2


def test_a_users_own_edit_gets_the_matrix(tiny):
    tokens = random_tokens(2, 12)
    edits = [sp.KnockOut(["L0H1", "L1H0"], 1), Flatten(["L1H0", "L1H2"])]
    theirs, expected, _ = run(tiny, tokens, "bridge", *edits)
    ours, found, engines = run(tiny, tokens, "fused", *edits)
    assert engines == ["flash", "bridge"]
    assert_same(found, expected)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@dataclasses.dataclass(frozen=True, repr=False)
class HalfAndOut(sp.KnockOut):
    """A built-in edit that a user has changed."""

    def on_scores(self, context, scores):
        return super().on_scores(context, scores / 2)


def test_a_method_that_a_subclass_overrides_is_called(tiny):
    tokens = random_tokens(2, 12)
    edit = HalfAndOut("L0H1", 1)
    theirs, _, _ = run(tiny, tokens, "bridge", edit)
    ours, _, engines = run(tiny, tokens, "fused", edit)
    assert engines == ["bridge", "flash"]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_threads_do_not_mix():
    model = tiny_model(seed=5)
    batches = [random_tokens(1, 64, seed) for seed in range(4)]
    with torch.no_grad():
        expected = [model(tokens) for tokens in batches]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def work(index):
        with torch.no_grad():
            return max(
                float((model(batches[index]) - expected[index]).abs().max()) for _ in range(15)
            )

    try:
        with sp.fused(model), ThreadPoolExecutor(4) as pool:
            off = list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert max(off) < 1e-3


def test_models_that_share_a_configuration():
    first = llama(seed=6)
    second = type(first)(first.config).eval()
    models = [bridge(first), bridge(second)]
    config = models[1].original_model.config
    assert config is models[0].original_model.config
    tokens = random_tokens(1, 12)
    with torch.no_grad():
        expected = models[1](tokens)
        contexts = [sp.fused(model) for model in models]
        for context in contexts:
            context.__enter__()
        contexts[0].__exit__(None, None, None)
        torch.testing.assert_close(models[1](tokens), expected, atol=1e-4, rtol=1e-4)
        contexts[1].__exit__(None, None, None)
        assert torch.equal(models[1](tokens), expected)
    assert config._attn_implementation == "eager"


def test_a_run_under_autocast_does_not_make_later_runs_refuse():
    model = tiny_model(seed=7)
    tokens = random_tokens(1, 12)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = model(tokens)
        with sp.fused(model):
            found = model(tokens)
    scale = float(expected.abs().max())
    assert float((found - expected).abs().max()) < 16 * torch.finfo(torch.bfloat16).eps * scale
    assert why_not(model) is None


@pytest.mark.parametrize(
    "edits",
    [
        [sp.KnockOut("L0H0", 1)],
        [sp.KnockOut("L0H2", [0, 1])],
        [sp.KeepOnly(["L0H0", "L1H1"], 17)],
        [sp.ScaleOffsets("L1H3", [0, 2], 2.0)],
    ],
    ids=str,
)
def test_profiles_under_edits_of_scores_are_the_same(tiny, edits):
    tokens = random_tokens(2, 20)
    with sp.patch(tiny, *edits):
        found = [sp.scan(tiny, tokens, 1, engine).moments for engine in ("bridge", "fused")]
    assert torch.equal(found[0].logit_rows, found[1].logit_rows)
    torch.testing.assert_close(found[0].logits, found[1].logits, atol=1e-3, rtol=1e-4)
    assert found[0].logits.isfinite().all()


@pytest.mark.parametrize("name", ["GPT-OSS", "Gemma 2", "GPT-NeoX, Pythia"])
def test_scans_of_edited_families(name):
    """Includes sums for profiles, which read the scores before the sinks are added."""
    model = zoo(name)
    tokens = random_tokens(2, 20)
    edits = [sp.KnockOut(["L0H1", "L1H2"], 1), sp.KeepOnly("L1H0", [0, 3])]
    with sp.patch(model, *edits):
        found = [sp.scan(model, tokens, range(4), engine) for engine in ("bridge", "fused")]
    torch.testing.assert_close(found[0].scores, found[1].scores, atol=1e-5, rtol=0)
    _, expected, _ = run(model, tokens, "bridge", *edits)
    _, hooked, _ = run(model, tokens, "fused", *edits)
    assert_same(hooked, expected)


def test_gradients_with_sinks():
    model = zoo("GPT-OSS")
    tokens = random_tokens(2, 12)
    found = []
    for inside in (contextlib.nullcontext(), sp.fused(model)):
        model.zero_grad()
        with inside:
            model(tokens).float().logsumexp(-1).sum().backward()
        found.append([block.attn.original_component.sinks.grad.clone() for block in model.blocks])
    assert float(found[0][1].abs().max()) > 0
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "edits", [[], [sp.KnockOut("L0H1", 1), sp.KeepOnly("L1H2", 1)], [sp.ShiftSlash("L0H0", 1)],
              [sp.FreezeBand("L1H1", "high")]], ids=str
)  # fmt: skip
def test_gradients_reach_queries_keys_and_values(edits):
    model = tiny_model(seed=1)
    tokens = random_tokens(2, 12)
    found = []
    for inside in (contextlib.nullcontext(), sp.fused(model)):
        model.zero_grad()
        with inside, sp.patch(model, *edits):
            model(tokens).logsumexp(-1).sum().backward()
        found.append({name: p.grad.clone() for name, p in model.original_model.named_parameters()
                      if p.grad is not None})  # fmt: skip
    assert any("q_proj" in name for name in found[0])
    for name, gradient in found[0].items():
        scale = max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(found[1][name], gradient, atol=1e-4 * scale, rtol=0, msg=name)


@pytest.mark.parametrize("edits", [[], [sp.KnockOut("L0H1", 1)], [sp.FreezeBand("L0H1", "high")]])
def test_bfloat16_is_as_close_to_float32_as_the_bridge_engine(edits):
    exact, low = bridge(llama(seed=2)), bridge(llama(seed=2).bfloat16())
    tokens = random_tokens(4, 30)
    right, _, _ = run(exact, tokens, "bridge", *edits)
    theirs, _, _ = run(low, tokens, "bridge", *edits)
    ours, _, engines = run(low, tokens, "fused", *edits)
    off = [float((one.float() - right).square().mean().sqrt()) for one in (theirs, ours)]
    assert engines == ["flash", "flash"]
    assert off[1] <= 1.25 * off[0]
    scans = [sp.scan(model, tokens, [0, 1], engine) for model, engine in
             ((exact, "bridge"), (low, "bridge"), (low, "fused"))]  # fmt: skip
    off = [float((scan.scores - scans[0].scores).square().mean().sqrt()) for scan in scans[1:]]
    assert off[1] <= 1.25 * off[0]


def test_layers_with_different_masks():
    """Gemma 3 has a sliding window in one layer and none in the other."""
    model = zoo("Gemma 3")
    scores = sp.scan(model, random_tokens(1, 20), "all", "fused").scores
    assert float(scores[0, :, 7:].max()) == 0  # nothing beyond the window
    assert float(scores[1, :, 7:].min()) > 0


def test_explain_is_the_same(tiny, monkeypatch):
    prompts = random_tokens(2, 20)
    ours = sp.explain(tiny, "L0H1", prompts, kappa=0.0).to_row()
    for name in ("patching.fused", "scanning.scan"):
        module = importlib.import_module(f"slashpatch.{name}")
        monkeypatch.setattr(module, "why_not", lambda model: "not now")
    theirs = sp.explain(tiny, "L0H1", prompts, kappa=0.0).to_row()
    for name, value in theirs.items():
        assert ours[name] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value)


def test_compatibility_mode_is_refused():
    model = tiny_model(seed=4)
    model.enable_compatibility_mode(no_processing=True)
    with pytest.raises(ModelError, match="compatibility mode"), sp.fused(model):
        pytest.fail("entered")
    assert sp.scan(model, random_tokens(1, 9), 1).provenance["engine"] == "bridge"


def test_attention_with_an_unknown_operation_is_refused_by_name(monkeypatch):
    """A layer adds a bias to its scores before the softmax."""
    model = tiny_model(seed=4)
    attn = model.blocks[1].attn
    inner = type(attn)._apply_reconstruct_attention_mask

    def biased(self, **kwargs):
        scores = inner(self, **kwargs)
        return scores + torch.zeros(scores.shape)

    monkeypatch.setattr(type(attn), "_apply_reconstruct_attention_mask", biased)
    state = state_of(model)
    message = r"fused: .*scores of layer \d.*the addition of Tensor \[1, 4, 6, 6\]"
    with pytest.raises(ModelError, match=message), sp.fused(model):
        pytest.fail("entered")
    assert state_of(model) == state
    assert sp.scan(model, random_tokens(1, 9), 1).provenance["engine"] == "bridge"


def test_attention_with_a_different_result_is_refused_by_name(monkeypatch):
    """The stand-in for the scores applies a wrong scale."""
    model = tiny_model(seed=4)
    monkeypatch.setattr(
        Scores, "__truediv__", lambda self, by: self * (2 / by)
    )  # without effect: Llama has no soft cap
    original = Scores.__mul__
    monkeypatch.setattr(Scores, "__mul__", lambda self, by: original(self, 1.5 * by))
    with pytest.raises(ModelError, match="z of layer 0 differs by"), sp.fused(model):
        pytest.fail("entered")


def test_a_users_own_mask_is_refused(tiny):
    tokens = random_tokens(1, 6)
    mask = torch.zeros(1, 1, 6, 6)
    with pytest.raises(FusedError, match="an attention mask of your own making"), sp.fused(tiny):
        tiny(tokens, attention_mask=mask)


def test_a_mask_with_gaps_is_computed_in_blocks(tiny):
    tokens, mask = random_tokens(1, 8), torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1]])
    theirs, _, _ = run(tiny, tokens, "bridge", attention_mask=mask)
    ours, _, engines = run(tiny, tokens, "fused", attention_mask=mask)
    assert engines == ["blocks", "blocks"]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_packed_prompts_are_computed_in_blocks(tiny):
    """Position ids restart at 0: Transformers masks the two prompts from each other."""
    tokens = random_tokens(1, 12)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    kwargs = {"position_ids": positions, "use_cache": False}
    theirs, _, _ = run(tiny, tokens, "bridge", **kwargs)
    ours, _, engines = run(tiny, tokens, "fused", **kwargs)
    assert engines == ["blocks", "blocks"]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_mask_as_a_matrix_is_the_eager_one(tiny):
    from transformers.masking_utils import eager_mask

    from slashpatch.patching.engine import make_mask_argument

    common = {"batch_size": 2, "q_length": 3, "kv_length": 7, "q_offset": 4, "kv_offset": 0}
    from transformers.masking_utils import sliding_window_causal_mask_function

    rule = sliding_window_causal_mask_function(3)
    padding = torch.ones(2, 7, dtype=torch.bool)
    padding[0, :5] = False
    expected = eager_mask(**common, mask_function=rule, attention_mask=padding)
    ours = make_mask_argument(**common, mask_function=rule, attention_mask=padding, local_size=3)
    assert isinstance(ours, MaskArgument)
    assert torch.equal(ours.matrix(expected), expected)
    assert (ours.shape, ours.ndim) == (expected.shape, expected.ndim)


def test_static_caches_are_refused(tiny):
    from transformers import StaticCache

    cache = StaticCache(config=tiny.original_model.config, max_cache_len=20)
    with pytest.raises(FusedError, match="static cache"), sp.fused(tiny), torch.no_grad():
        tiny.original_model(random_tokens(1, 5), past_key_values=cache)


def test_a_stand_in_refuses_other_operations(tiny):
    seen = []

    def look(pattern, hook):
        seen.append(pattern)

    look.reads_diagonals = True
    name = read(tiny).hook(0, "pattern")
    with sp.fused(tiny), torch.no_grad():
        tiny.run_with_hooks(random_tokens(1, 6), fwd_hooks=[(name, look)])
    pattern = seen[0]
    assert pattern.shape == (1, 4, 6, 6)
    for operation in (
        lambda: pattern.sum(),
        lambda: pattern[0],
        lambda: pattern * 2,
        lambda: 1 - pattern,
        lambda: torch.exp(pattern),
        lambda: torch.stack([pattern, pattern]),
        lambda: pattern.slash_rows(torch.tensor([1])),  # after the forward pass
    ):
        with pytest.raises(FusedError, match="does not form the pattern of layer 0"):
            operation()
    assert math.prod(pattern.shape) == 144


def test_a_pass_that_failed_once_is_no_refusal_for_ever(monkeypatch):
    """Out of memory, say: it is not remembered of the model."""
    from slashpatch.patching import fused as module

    model = tiny_model(seed=3)

    def fails(*args, **kwargs):
        raise ModelError("a short forward pass failed") from RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(module, "run_probe", fails)
        assert "a short forward pass failed" in why_not(model)
    assert why_not(model) is None
