"""Every tool on a model whose layers are on two devices, imitated: see `tests/devices.py`."""

from dataclasses import dataclass

import pandas as pd
import pytest
import torch

import slashpatch as sp
from slashpatch.maths.attention.mask import Mask

from ..devices import Devices, spread
from ..tiny import llama, padded, random_tokens, tokenizer

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture(scope="module")
def plain():
    return sp.load(llama(seed=0, layers=4), tokenizer=tokenizer())


@pytest.fixture
def two():
    """A model on two devices, as long as the test runs."""
    with Devices() as devices:
        model = sp.load(spread(devices, llama(seed=0, layers=4)), tokenizer=tokenizer())
        yield model
    assert {FIRST, SECOND} <= devices.seen


@pytest.mark.filterwarnings("ignore:flash attention of torch")
class TestTwoDevices:
    def test_the_imitation(self, two):
        assert torch.device(two.cfg.device) == FIRST
        here = torch.arange(3, device="cuda:0")
        there = here.to("cuda:1")
        assert (here.device, there.device, (there + 1)[:2].device) == (FIRST, SECOND, SECOND)
        with pytest.raises(RuntimeError, match="got tensors on .*cuda:0.*cuda:1"):
            here + there
        with pytest.raises(RuntimeError, match="got tensors on .*cpu.*cuda:1"):
            there + torch.arange(3)
        _, cache = two.run_with_cache(random_tokens(1, 6))
        devices = [cache["z", layer].device for layer in range(4)]
        assert devices == [FIRST, FIRST, SECOND, SECOND]

    @pytest.mark.parametrize("engine", ["fused", "bridge"])
    @pytest.mark.parametrize("lengths", [(12, 12), (5, 20, 11)])
    def test_scan(self, two, plain, engine, lengths):
        prompts = [random_tokens(1, n, seed=n)[0] for n in lengths]
        ours, expected = (
            sp.scan(model, prompts, range(4), engine, batch_size=4) for model in (two, plain)
        )
        torch.testing.assert_close(ours.scores, expected.scores, atol=1e-6, rtol=0)
        pd.testing.assert_frame_equal(ours.rank_one, expected.rank_one, rtol=1e-4)
        assert ours.provenance["weights_on"] == ["cuda:0", "cuda:1"]

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("side", [None, "left", "right"])
    def test_edits(self, two, plain, fused, side):
        rows = [random_tokens(1, n, seed=n)[0] for n in (12, 12 if side is None else 7)]
        tokens, mask = padded(rows, side or "right")
        edits = (
            sp.KnockOut("L0H1, L3H1", 1),
            sp.ScaleOffsets("L2H2", 2, 3.0, renormalize=False),
            sp.ShiftSlash("L1H0, L2H0", 1),
            sp.FreezeBand("L1H2, L3H2", "high"),  # per-head keys
            sp.RankOne("L2H3", "q"),
            sp.AblateHeads("L3H0", mode="resample"),
        )
        found = []
        for model in (two, plain):
            with torch.no_grad(), sp.patch(model, *edits):
                kwargs = {} if side is None else {"attention_mask": mask.to(model.cfg.device)}
                if fused:
                    with sp.fused(model):
                        logits = model(tokens.to(model.cfg.device), **kwargs)
                else:
                    logits = model(tokens.to(model.cfg.device), **kwargs)
                found.append(logits.cpu()[mask.bool()])
        torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)

    def test_an_edit_that_needs_the_matrix_while_the_model_runs_fused(self, two, plain):
        @dataclass(frozen=True, repr=False)
        class Halve(sp.Edit):
            def on_pattern(self, ctx, pattern):
                return pattern / 2

        found = []
        for model in (two, plain):
            with torch.no_grad(), sp.fused(model), sp.patch(model, Halve("L0H1, L3H1")):
                found.append(model(random_tokens(2, 12)).cpu())
        torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)

    def test_a_mask_whose_rule_holds_a_tensor(self, two):
        padding = torch.arange(4, device="cuda:0")
        mask = Mask(
            lambda prompt, query, key: (key <= query) & (key >= padding[prompt]),
            4, 6, 6, 0, True, None, False, None, FIRST,
        )  # fmt: skip
        index = torch.arange(6, device="cuda:1")
        allowed = mask.at(index[None, None, :, None], index[None, None, None])
        assert allowed.device == SECOND
        assert allowed.sum((1, 2, 3)).tolist() == [21, 15, 10, 6]

    @pytest.mark.parametrize("fused", [False, True])
    def test_generation(self, two, plain, fused):
        found = []
        for model in (two, plain):
            with (
                sp.patch(model, sp.KnockOut("L3H1", 1), sp.SwapBands("L2H2", "high", "low")),
                sp.SlashMonitor(model, offsets=range(4)) as monitor,
            ):
                cache, tokens, steps = None, random_tokens(2, 8), []
                for _ in range(4):
                    with torch.no_grad():
                        if fused:
                            with sp.fused(model):
                                out = model.original_model(
                                    tokens.to(model.cfg.device), past_key_values=cache
                                )
                        else:
                            out = model.original_model(
                                tokens.to(model.cfg.device), past_key_values=cache
                            )
                    cache, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1).cpu()
                    steps.append(tokens)
            found.append((torch.cat(steps, 1), monitor.scores))
        assert torch.equal(found[0][0], found[1][0])
        torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=0)

    @pytest.mark.parametrize(
        "tool",
        [
            lambda model: sp.sweep(
                model, "KnockOut({head}, 1)", "L0H1, L3H0-2", "copying", n_prompts=3
            ),
            lambda model: sp.measure(
                model,
                "KnockOut(L3H1, 1)",
                ["loss", "kl", "top1", sp.SlashScores(), sp.LogitDifference(5, 6)],
                n_prompts=3,
                max_tokens=20,
                controls=["random-heads:2", "matched-heads:3", "other-offsets:2"],
            ),
            lambda model: sp.measure(
                model, "DropBand(L2H1, high)", sp.PrefixMatching(), n_prompts=3
            ),
            lambda model: sp.flow(model, random_tokens(2, 12), "KnockOut(L3H1, 1)", [1, 2]),
            lambda model: sp.copying(model, "KnockOut(L3H1, 1)", n_prompts=3, n_tokens=8),
            lambda model: sp.paths(
                model, "KnockOut(L0H1, 1)", "L2H0-1", n_prompts=3, max_tokens=17
            ),
            lambda model: sp.screen(model, n_prompts=6, max_tokens=17, verify=3, audit=3),
        ],
        ids=["sweep", "measure", "attention metric", "flow", "copying", "paths", "screen"],
    )
    def test_effects(self, two, plain, tool):
        ours, expected = tool(two).frame, tool(plain).frame
        pd.testing.assert_frame_equal(ours, expected, rtol=1e-3, atol=1e-4)

    def test_explain_and_the_rest(self, two, plain):
        tokens = random_tokens(2, 24)
        ours, expected = (sp.explain(m, "L3H1", tokens, offset=1).to_row() for m in (two, plain))
        assert ours.keys() == expected.keys()
        for key, value in expected.items():
            if isinstance(value, float):
                assert ours[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
            else:
                assert ours[key] == value, key
        basis = [sp.fit_rank_one(model, "L1H1, L3H1", tokens) for model in (two, plain)]
        torch.testing.assert_close(basis[0].q.abs(), basis[1].q.abs(), atol=1e-4, rtol=0)
        top = [sp.top_keys(model, tokens[0], "L3H1") for model in (two, plain)]
        assert torch.equal(top[0].keys, top[1].keys)

    def test_check(self, two):
        report = sp.check(two)
        assert report.ok, str(report)
