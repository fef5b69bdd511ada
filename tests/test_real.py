"""The product on the default model: what the issue says must be seen."""

import json
import subprocess
import sys

import pytest
import torch

import slashpatch as sp
from slashpatch.maths.slash_scores import slash_scores

pytestmark = pytest.mark.real


def test_the_demo():
    """What `slashpatch demo --json` prints: one test, because it runs for long."""
    command = [sys.executable, "-m", "slashpatch.cli", "demo", "--json", "--device", "cpu"]
    demo = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    # It finds the previous-token head.
    top = {(row["head"], row["offset"]): row["score"] for row in demo["slash_heads"][:3]}
    assert 0.6 <= top["L16H0", 1] <= 0.95
    assert (demo["strongest"]["head"], demo["strongest"]["offset"]) == ("L16H0", 1)

    # Without it, or its diagonal alone, nothing is copied; other heads are not missed.
    losses = demo["copying"]
    control = losses.pop("random heads ablated, one at a time")
    clean, ablated, removed = losses.values()
    assert clean["loss"] < 3.5
    assert removed["loss"] > 8
    assert ablated["loss"] > 8
    assert control["highest"] < 5
    assert clean["low"] < clean["loss"] < clean["high"] < removed["low"]

    # The text differs.
    _, plain, edited = demo["generation"].values()
    assert "blue-tiger-seven" in plain
    assert plain != edited

    # High frequencies carry it, and a shifted slash moves what is copied.
    assert demo["bands_dropped"]["high"] < 0.05
    assert demo["bands_dropped"]["low"] > 0.7
    assert demo["shift"]["peak"] == 2
    unshifted, shifted = demo["shift"]["copied_lags"].values()
    assert unshifted[0] > 0.5
    assert shifted[0] < 0.05
    assert shifted[1] > 0.1


@pytest.fixture(scope="module")
def prompt(real):
    from slashpatch.data.prompts import prompt_set

    return prompt_set(real, n_prompts=1, max_tokens=256).tokens[0]


def test_scores_equal_the_direct_mean_over_hook_pattern(real, prompt):
    scan = sp.scan(real, prompt, range(16))
    with torch.no_grad():
        _, cache = real.run_with_cache(
            prompt[None], names_filter=lambda name: name.endswith("hook_pattern")
        )
    for layer in range(30):
        direct = slash_scores(cache["pattern", layer], range(16))[0]
        torch.testing.assert_close(scan.scores[layer], direct, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_tokens", [256, pytest.param(1024, marks=pytest.mark.exhaustive)])
def test_the_fused_engine_is_the_other_one(real, n_tokens):
    """Logits within 1e-4 (they reach 40), scores within 1e-6, edited or not."""
    from slashpatch.data.prompts import prompt_set
    from slashpatch.patching.fused import engine_of_layers

    tokens = prompt_set(real, n_prompts=1, max_tokens=n_tokens).tokens[0][None]
    edits = [(), (sp.KnockOut(["L16H0", "L11H1", "L19H3"], 1), sp.FreezeBand("L1H2", "high"))]
    for edit in edits:
        with torch.no_grad(), sp.patch(real, *edit):
            expected = real(tokens)
            with sp.fused(real):
                logits = real(tokens)
                assert engine_of_layers(real) == ["flash"] * 30
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    found = [
        sp.scan(real, tokens, range(64), engine, moments=False) for engine in ("bridge", "fused")
    ]
    torch.testing.assert_close(found[0].scores, found[1].scores, atol=1e-6, rtol=0)


def test_scores_agree_with_transformer_lens_previous_token_head(real):
    from transformer_lens.head_detector import detect_head

    text = (
        "The committee met on Tuesday to discuss the budget. After two hours, the chair asked "
        "for a vote, and nobody objected to the plan that the treasurer had written."
    )
    length = real.to_tokens(text).shape[1]
    theirs = detect_head(real, text, "previous_token_head").double() * length / (length - 1)
    ours = sp.scan(real, text, [1]).scores[:, :, 0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_padded_batches_equal_single_prompts(real, prompt):
    prompts = [prompt[:40], prompt[40:200], prompt[10:110]]
    batch = sp.scan(real, prompts, range(8), batch_size=3)
    single = sp.scan(real, prompts, range(8), batch_size=1)
    torch.testing.assert_close(batch.scores, single.scores, atol=1e-5, rtol=0)


def test_heads_that_lead_on_random_tokens_too(real):
    natural = sp.scan(real, n_prompts=4, max_tokens=256)
    random = sp.scan(real, n_prompts=4, max_tokens=256, random_tokens=True)
    leading = {entry.head for entry in random.slash_heads(min_offset=1)[:5]}
    assert set(sp.heads("L16H0", "L11H1", "L19H3")) <= leading
    pair = torch.stack([natural.scores[..., 1].flatten(), random.scores[..., 1].flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.8


def test_rank_one_leaves_the_slash(real):
    with sp.patch(real, sp.RankOne("L16H0")):
        scan = sp.scan(real, n_prompts=4, max_tokens=256, batch_size=1)
    assert float(scan.scores[16, 0, 1]) > 0.7


def test_the_slash_goes_with_the_axis_of_the_inputs_and_not_with_its_controls(real):
    axis = sp.fit_axis(real, "L16H0", n_prompts=4, max_tokens=128, seed=1)
    scores = {}
    for control in ("", "same_size", "random", "principal"):
        with sp.patch(real, sp.DropDirection("L16H0", direction=axis, control=control)):
            scan = sp.scan(real, offsets=[1], n_prompts=2, max_tokens=128, moments=False)
        scores[control] = float(scan.scores[16, 0, 0])
    assert scores.pop("") < 0.1
    assert min(scores.values()) > 0.4


def test_profiles_are_predicted(real):
    scan = sp.scan(real, n_prompts=8, max_tokens=256)
    heads = {entry.head for entry in scan.slash_heads(min_offset=1)}
    profiles = [scan.profile(head) for head in heads]
    assert len(heads) > 40
    fits = sum(profile.correlation > 0.99 for profile in profiles)
    assert fits >= 0.9 * len(heads)
    ranks = scan.rank_one.set_index("name")
    assert ranks.loc["L16H0", "r1_q"] == pytest.approx(0.97, abs=0.02)
    assert ranks.loc["L16H0", "r1_k"] == pytest.approx(0.86, abs=0.02)


def test_explain_l16h0(real):
    one = sp.explain(real, "L16H0", n_prompts=1, max_tokens=128)
    assert one.verdict == "RoPE-made slash"
    assert one.dropped["high"] < 0.05
    assert one.rank_one["qk"] > 0.7


@pytest.mark.parametrize(
    "edit",
    [
        sp.FreezeBand("L16H0", "high"),
        sp.KnockOut(["L16H0", "L11H1"], 1),
        *(
            pytest.param(edit, marks=pytest.mark.exhaustive)
            for edit in (
                sp.ShiftSlash(["L16H0", "L11H1"], 1),
                sp.PlantSlash("L3H4", 4, 60.0),
                sp.KeepOnly("L16H0", 1),
                sp.ScaleOffsets("L16H0", [0, 1], 0.5, renormalize=False),
                sp.AblateHeads(["L16H0", "L2H1"], mode="resample"),
            )
        ),
    ],
    ids=str,
)
def test_cached_generation_equals_recomputation(real, edit):
    with torch.no_grad(), sp.patch(real, edit):
        out = real.generate(
            "The secret code is blue-tiger-seven. I repeat, the secret code is",
            max_new_tokens=12,
            do_sample=False,
            stop_at_eos=False,
            return_type="tokens",
            output_logits=True,
            verbose=False,
        )
        whole = real(out.sequences)[0, -13:-1]
    cached = torch.cat(list(out.logits))
    torch.testing.assert_close(cached, whole, atol=2e-3, rtol=1e-3)
    assert torch.equal(cached.argmax(-1), out.sequences[0, -12:])


def test_monitor_leaves_the_text_alone(real):
    prompt = "Once upon a time"
    arguments = {"max_new_tokens": 24, "do_sample": False, "verbose": False}
    plain = real.generate(prompt, **arguments)
    found = []
    with sp.SlashMonitor(real, kappa=0.5, on_detect=lambda *args: found.append(args)):
        assert real.generate(prompt, **arguments) == plain
    assert sp.Head(16, 0) in [head for head, *_ in found]


FIVE = "(L16H0, L11H1, L1H2, L19H3, L2H1)"


@pytest.mark.exhaustive
def test_a_sweep_is_the_naive_loop_bit_for_bit(real):
    from slashpatch.effects.metrics.by_name import as_metric
    from slashpatch.effects.running.conditions import conditions
    from slashpatch.effects.running.evaluate import evaluate
    from slashpatch.effects.running.evaluation import MetricRunner
    from slashpatch.effects.running.inputs import prompts_for

    size = {"n_prompts": 4, "max_tokens": 41}
    names = ["L2H1", "L11H1", "L16H0", "L19H8", "L26H4"]
    swept = sp.sweep(real, heads=names, **size).frame.set_index("name")["effect"]
    assert swept.index[0] == "L16H0"
    runner = MetricRunner(real, [as_metric("copying")])
    prompts = prompts_for(real, runner.metrics, None, **size, seed=0)
    edits = conditions([sp.KnockOut(name, 1) for name in names])
    clean, *values = evaluate(real, runner, prompts, edits)
    assert swept[names].tolist() == [float((one[0] - clean[0]).mean()) for one in values]


def test_the_copied_lag_and_the_induction_heads_move(real):
    found = sp.copying(real, f"ShiftSlash({FIVE}, 1)", n_prompts=4, n_tokens=40)
    top1 = found.frame.set_index(["edit", "lag"])["top1"]
    shifted = next(edit for edit, _ in top1.index if edit != "clean")
    assert top1["clean", 1] > 0.4 > 0.05 > top1["clean", 2]
    assert top1[shifted, 2] > 0.15 > 0.05 > top1[shifted, 1]
    lags = found.tables["heads"].set_index(["edit", "head"])["matches_lag"]
    for head in ("L18H6", "L17H3", "L17H4"):
        assert (lags["clean", head], lags[shifted, head]) == (1, 2)


@pytest.mark.exhaustive
def test_flow_falls_at_the_offset_that_is_removed(real):
    size = {"n_prompts": 6, "max_tokens": 24, "n_replaced": 6}
    found = sp.flow(real, edits=f"KnockOut({FIVE}, 1)", offsets=range(1, 6), **size).frame
    rows = found[found["edit"] != "clean"].set_index("offset")
    assert rows.loc[1, "high"] < -0.1
    assert rows["effect"].idxmin() == 1


@pytest.mark.exhaustive
def test_induction_heads_read_the_slash_head_by_their_keys(real):
    found = sp.paths(real, "KnockOut(L16H0, 1)", "L17H3, L18H6", n_prompts=4, max_tokens=41).frame
    rows = found.set_index(["reader", "input"])["effect"]
    for head in ("L17H3", "L18H6"):
        assert rows[head, "k"] > 0.01
        assert rows[head, "k"] > 5 * max(abs(rows[head, "q"]), abs(rows[head, "v"]))


@pytest.fixture(scope="module", params=["disk", "cpu and disk"])
def offloaded(request):
    """The default model with its weights on disk, or half of them there."""
    if request.param == "disk":
        return sp.load(device_map="disk")
    beside = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
    places = {f"model.layers.{layer}": "cpu" if layer < 15 else "disk" for layer in range(30)}
    return sp.load(device_map={**dict.fromkeys(beside, "cpu"), **places})


def test_offloaded_weights_change_nothing(real, offloaded, prompt):
    """Logits, scores, ranks and the fingerprint are equal, edited or not."""
    from slashpatch.bridge.offloaded import offloaded_weights

    assert next(offloaded_weights(offloaded.original_model), None)
    tokens = prompt[None, :32]
    with torch.no_grad():
        assert torch.equal(offloaded(tokens), real(tokens))
        for edits in ((sp.KnockOut("L16H0", 1),), (sp.FreezeBand("L19H3", "high"),)):
            with sp.patch(real, *edits):
                expected = real(tokens)
            with sp.patch(offloaded, *edits):
                assert torch.equal(offloaded(tokens), expected)
    ours, expected = (sp.scan(model, tokens, range(16)) for model in (offloaded, real))
    assert torch.equal(ours.scores, expected.scores)
    assert ours.rank_one.equals(expected.rank_one)
    assert ours.provenance["fingerprint"] == expected.provenance["fingerprint"]


def test_what_the_default_model_needs(real):
    needed = sp.memory_needed()
    weights = {id(x): x for x in real.original_model.parameters()}.values()
    assert needed.weights == pytest.approx(sum(x.nbytes for x in weights), rel=0.01)
    assert needed.mapped == needed.weights


def test_one_diagonal_carries_copying_from_prompt_to_prompt(real):
    """The slash of L16H0 is sufficient and necessary for most of it, and its neighbour is not."""
    items = ["L16H0@1", "L16H0@2"]
    found = sp.activation_patching(real, items, n_prompts=8).frame
    share = found.set_index(["patched", "direction"])["normalized"]
    for direction in ("denoising", "noising"):
        assert share["L16H0@1", direction] > 0.5
        assert abs(share["L16H0@2", direction]) < 0.05


def test_the_slash_acts_through_later_layers(real):
    found = sp.direct_effect(real, "KnockOut(L16H0, 1)", "copying", n_prompts=4, max_tokens=41)
    effect = found.frame.set_index("part")["effect"]
    assert abs(effect["direct"]) < 0.2
    assert effect["total"] > 3
