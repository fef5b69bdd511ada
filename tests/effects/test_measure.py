import json
import re

import numpy as np
import pandas as pd
import pytest
import torch

import slashpatch as sp
from slashpatch.data.files import without_nan
from slashpatch.effects.controls import by_name as controls
from slashpatch.effects.controls.heads import output_norms
from slashpatch.effects.running.conditions import conditions
from slashpatch.effects.running.inputs import Batch
from slashpatch.effects.statistics import beyond_draws, p_value
from slashpatch.errors import ControlError, EditError, MetricError, OutputError, PromptError

from ..planted import induction_model
from ..tiny import random_tokens
from ..zoo import zoo


@pytest.fixture(scope="module")
def planted():
    return induction_model()


def loss(model, tokens, *edits):
    with torch.no_grad(), sp.patch(model, *edits):
        return model(tokens, return_type="loss", loss_per_token=True).double().mean(1)


def test_effects_are_those_of_patch(tiny):
    """Compared with a plain loop, on prompts of several lengths, in batches of any size."""
    prompts = [row[:n] for row, n in zip(random_tokens(6, 14), (14, 9, 14, 6, 9, 11), strict=True)]
    edits = ["KnockOut(L0H1, 1)", ["AblateHeads(L0H2)", "ShiftSlash(L1H0, 1)"]]
    found = sp.measure(tiny, edits, ["loss", "kl", "top1"], prompts)
    by_batch = [
        sp.measure(tiny, edits, ["loss", "kl", "top1"], prompts, batch_size=n) for n in (1, 2)
    ]
    for other in by_batch:
        pd.testing.assert_frame_equal(other.frame, found.frame, atol=1e-5, rtol=1e-4)
        assert other.provenance == found.provenance
    values = found.tables["values"]
    for name, together in (
        ("KnockOut(L0H1, offsets=1)", edits[:1]),
        ("AblateHeads(L0H2) then ShiftSlash(L1H0, by=1)", edits[1]),
    ):
        own = values[(values["edit"] == name) & (values["metric"] == "loss")].sort_values("prompt")
        expected = [float(loss(tiny, row[None], *together)[0]) for row in prompts]
        assert own["value"].tolist() == pytest.approx(expected, abs=1e-5)
    row = found.frame[found.frame["metric"] == "loss"].iloc[0]
    clean = torch.tensor([float(loss(tiny, row[None])[0]) for row in prompts])
    assert row["baseline"] == pytest.approx(float(clean.mean()), abs=1e-5)
    assert row["effect"] == pytest.approx(row["edited"] - row["baseline"])
    assert row["low"] <= row["effect"] <= row["high"]


def test_equal_seeds_give_equal_results(tiny):
    def run(seed):
        return sp.measure(
            tiny,
            "KnockOut(L0H1, 1)",
            ["loss"],
            n_prompts=4,
            max_tokens=12,
            controls=["matched-heads:2"],
            random_tokens=True,
            seed=seed,
        )

    one, again, other = run(1), run(1), run(2)
    pd.testing.assert_frame_equal(one.frame, again.frame)
    pd.testing.assert_frame_equal(one.tables["draws"], again.tables["draws"])
    assert not one.frame["effect"].equals(other.frame["effect"])


def test_clean_means_with_active_patches(tiny):
    tokens = random_tokens(3, 10)
    with sp.patch(tiny, "AblateHeads(L1H1)"):
        found = sp.measure(tiny, "KnockOut(L0H1, 1)", "loss", tokens)
    row = found.frame.iloc[0]
    assert row["baseline"] == pytest.approx(float(loss(tiny, tokens, "AblateHeads(L1H1)").mean()))
    both = loss(tiny, tokens, "AblateHeads(L1H1)", "KnockOut(L0H1, 1)")
    assert row["edited"] == pytest.approx(float(both.mean()))
    assert found.provenance["edits"] == ["AblateHeads(L1H1)"]


def test_the_planted_heads_matter_and_no_others(planted):
    every = [f"AblateHeads(L{layer}H{head})" for layer in (0, 1) for head in range(4)]
    found = sp.measure(planted, every, "copying", n_prompts=12, max_tokens=41)
    rows = found.frame.set_index("edit")
    for name in ("AblateHeads(L0H0)", "AblateHeads(L1H2)"):
        assert rows.loc[name, "effect"] > 2
        assert rows.loc[name, "low"] > 1
        assert rows.loc[name, "q"] < 0.01
    others = rows.drop(["AblateHeads(L0H0)", "AblateHeads(L1H2)"])
    assert others["effect"].abs().max() < 0.01
    assert (others["low"] <= 0).all()
    assert (others["high"] >= 0).all()


def test_controls_of_a_planted_head(planted):
    found = sp.measure(
        planted,
        "KnockOut(L0H0, 1)",
        "copying",
        n_prompts=10,
        max_tokens=41,
        controls=["random-heads:3", "matched-heads:3", "other-offsets:5"],
    )
    rows = found.frame.set_index("against")
    assert list(rows.index) == ["clean", "random-heads:3", "matched-heads:3", "other-offsets:5"]
    assert (rows["effect"] > 2).all()
    assert rows.loc["random-heads:3", "as_large"] == 0
    assert rows.loc["other-offsets:5", "as_large"] == 0
    draws = found.tables["draws"]
    assert set(draws[draws["control"] == "random-heads"]["drawn"]) == {
        f"KnockOut(L0H{head}, offsets=1)" for head in (1, 2, 3)
    }
    offsets = draws[draws["control"] == "other-offsets"]["drawn"]
    assert offsets.nunique() == 5
    assert not any(drawn == "KnockOut(L0H0, offsets=1)" for drawn in offsets)


def drawn(model, control, edit, n_pos=20):
    batch = Batch(torch.arange(2), random_tokens(2, n_pos), 2)
    condition = conditions([edit])[0]
    return [str(one) for one in controls.as_control(control).draw(model, condition, [batch], 0)]


def test_what_controls_draw(tiny):
    heads = drawn(tiny, "random-heads:3", "KnockOut((L0H0, L0H2, L1H1), 1)")
    assert set(heads) == {f"KnockOut((L0H1, L0H3, L1H{h}), offsets=1)" for h in (0, 2, 3)}
    pairs = drawn(tiny, "random-pairs:4", "DropBand(L0H1, high)")
    assert len(set(pairs)) == 4
    assert all(one.startswith("DropBand(L0H1, band='pairs ") for one in pairs)
    # Of 4 pairs, two of 2 and two of 1: the band itself, in whatever words, is no control.
    pairs = drawn(tiny, "random-pairs:5", "DropBand(L0H1, 'pairs 0-1')")
    assert len(set(pairs)) == 5
    assert not any("pairs 0-0+pairs 1-1" in one for one in pairs)
    with pytest.raises(ControlError, match="found 0 different"):
        drawn(tiny, "random-pairs:1", "DropBand(L0H1, 'pairs 0-3')")
    bands = drawn(tiny, "random-pairs:5", "SwapBands(L0H1, 'pairs 0-0', 'pairs 3-3')")
    exchanged = {frozenset(re.findall("pairs ([0-9])", one)) for one in bands}
    assert len(exchanged) == 5
    assert frozenset("03") not in exchanged
    joint = drawn(tiny, "random-heads:2", ["KnockOut(L0H0, 1)", "ShiftSlash(L0H0, 2)"])
    for one in joint:
        first, second = one.split(" then ")
        assert first[len("KnockOut(") :][:4] == second[len("ShiftSlash(") :][:4] != "L0H0"
    assert drawn(tiny, "random-heads:2", "KnockOut(L1H0, 1)") == drawn(
        tiny, "random-heads:2", "KnockOut(L1H0, 1)"
    )


def test_output_norms_by_definition(tiny):
    """Matched heads are matched by the norm of z W_O."""
    tokens = random_tokens(2, 9)
    norms = output_norms(tiny, [Batch(torch.arange(2), tokens, 2)])
    _, cache = tiny.run_with_cache(tokens)
    for layer, head in ((0, 0), (1, 3)):
        z = cache["z", layer][:, :, head]
        weight = tiny.original_model.model.layers[layer].self_attn.o_proj.original_component.weight
        written = z @ weight[:, head * 8 : head * 8 + 8].T
        expected = float(written.detach().norm(dim=-1).mean())
        assert float(norms[layer, head]) == pytest.approx(expected, rel=1e-5)  # float32 sums


@pytest.mark.parametrize(
    ("control", "edit", "said"),
    [
        ("random-heads:4", "KnockOut(L0H0, 1)", "only 3 other sets of.*at most random-heads:3"),
        ("random-heads", "AblateHeads('L0H0, L0H1, L0H2')", "leaves 1; edit fewer"),
        ("matched-heads:8", "KnockOut(L0H0, 1)", "only 7 unedited heads"),
        ("other-offsets", "AblateHeads(L0H0)", "have no offsets"),
        (
            "other-offsets:99",
            "KnockOut(L0H0, 1)",
            "only 15 of the offsets 1 to 16 are not edited, to replace 1",
        ),
        ("random-pairs", "KnockOut(L0H0, 1)", "have no band"),
        ("random-pairs:99", "DropBand(L0H0, 'pairs 0-0')", "found 3 different variants"),
    ],
)
def test_controls_that_cannot_be_drawn(tiny, control, edit, said):
    with pytest.raises(ControlError, match=said):
        drawn(tiny, control, edit)


def test_controls_in_models_whose_layers_differ():
    gemma = zoo("Gemma 3")
    with pytest.raises(ControlError, match="other pairs in other layers"):
        drawn(gemma, "random-pairs:1", "DropBand((L0H0, L1H0), 'wavelength 8-64')")
    without = zoo("SmolLM3")
    for one in drawn(without, "matched-heads:3", "ShiftSlash(L0H0, 1)"):
        assert one.startswith("ShiftSlash(L0")
    tokens = random_tokens(2, 9)
    fitted = sp.RankOne("L0H1", basis=sp.fit_rank_one(without, "L0H1", prompts=tokens))
    with pytest.raises(ControlError, match="does not fit the model"):
        drawn(without, "random-heads:1", fitted)


def test_functions_of_frequencies_draw_the_same_in_each_process(tiny):
    twice, thrice = (lambda theta: theta * 2), (lambda theta: theta * 3)
    thrice.__qualname__ = twice.__qualname__
    first = drawn(tiny, "matched-heads:3", sp.SetFrequencies("L0H1", twice))
    assert first == drawn(tiny, "matched-heads:3", sp.SetFrequencies("L0H1", thrice))
    assert all(" at 0x" not in one for one in first)


@pytest.mark.parametrize("spec", ["random-head", "random-heads:0", "random-heads:-1", "", 3, None])
@pytest.mark.usefixtures("unchecked")
def test_what_is_no_control(spec):
    with pytest.raises(ControlError):
        controls.as_control(spec)


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (lambda logits: logits.mean(), "one number per prompt, \\[3\\], or .*Do not average"),
        (lambda logits: logits, "one number per prompt"),
        (lambda logits: 1.0, "got float"),
        (lambda logits: logits[:, 0, :0], "one number per prompt"),
        (lambda logits: logits.mul_(0).sum((1, 2)), "changes the logits in place"),
        (lambda logits: logits[:, 0, 0] * torch.nan, "gave nan for prompt 0 under clean"),
        (lambda logits, index: 1 / (index - 1.0), "gave inf for prompt 1 under clean"),
    ],
)
def test_metrics_that_give_something_else(tiny, metric, said):
    with pytest.raises(MetricError, match=said):
        sp.measure(tiny, "KnockOut(L0H1, 1)", metric, random_tokens(3, 8))


def test_nan_under_an_edit_names_the_edit(tiny):
    def broken(logits, clean_logits):
        return (
            (logits - clean_logits).abs().amax((1, 2)) / 0
            if not logits.equal(clean_logits)
            else logits[:, 0, 0]
        )

    with pytest.raises(MetricError, match=r"under KnockOut\(L0H1, offsets=1\)"):
        sp.measure(tiny, "KnockOut(L0H1, 1)", broken, random_tokens(3, 8))


@pytest.mark.usefixtures("unchecked")
def test_bad_input(tiny):
    tokens = random_tokens(3, 8)
    for wrong, error, said in (
        ({"edits": []}, EditError, "expected an edit such as"),
        ({"edits": [[]]}, EditError, "a condition has no edits"),
        ({"edits": ["KnockOut(L0H1, 1)"] * 2}, EditError, "is given twice"),
        ({"edits": "KnockOut(L9H1, 1)"}, sp.SlashpatchError, "L9H1 does not exist"),
        ({"edits": 3}, EditError, "expected an edit"),
        ({"metrics": []}, MetricError, "no metric was given"),
        ({"metrics": ["loss", "loss"]}, MetricError, "two metrics are called 'loss'"),
        ({"prompts": [torch.tensor([4])]}, PromptError, "one token only"),
        ({"metrics": "copying"}, PromptError, "same tokens twice over"),
        ({"confidence": 1}, MetricError, "confidence must be between 0 and 1"),
        ({"seed": "a"}, MetricError, "seed must be an integer"),
        ({"n_prompts": 0, "metrics": "copying", "prompts": None}, PromptError, "n_prompts must"),
        ({"batch_size": 1.5}, PromptError, "batch_size must be an integer of at least 1"),
        ({"batch_size": 0}, PromptError, "batch_size must be an integer of at least 1"),
        (
            {"metrics": "loss-by-position", "prompts": [tokens[0], tokens[1, :5]]},
            MetricError,
            "4 numbers for one prompt and 7 for another",
        ),
    ):
        with pytest.raises(error, match=said):
            sp.measure(tiny, **{"edits": "KnockOut(L0H1, 1)", "prompts": tokens, **wrong})
    assert not any(point._forward_hooks for point in tiny.hook_points())


def test_default_prompts_follow_the_metric(tiny):
    natural = sp.measure(tiny, "KnockOut(L0H1, 1)", "loss", n_prompts=2, max_tokens=9)
    repeated = sp.measure(tiny, "KnockOut(L0H1, 1)", "copying", n_prompts=2, max_tokens=9)
    assert natural.provenance["prompts"]["source"] == "natural text, seed 0"
    assert repeated.provenance["prompts"]["source"] == "random tokens twice over, seed 0"
    with pytest.raises(PromptError, match="2 to 31 tokens so that two copies fit"):
        sp.measure(tiny, "KnockOut(L0H1, 1)", "copying", n_prompts=2, max_tokens=4)


def test_metrics_of_one_kind_stand_beside_one_another(tiny):
    metrics = [sp.SlashScores("L1H0"), sp.SlashScores("L1H0", 2), sp.SlashScores()]
    found = sp.measure(tiny, "KnockOut(L0H1, 1)", metrics, random_tokens(2, 9))
    names = [
        "SlashScores(heads=(L1H0,), offset=1)",
        "SlashScores(heads=(L1H0,), offset=2)",
        "slash",
    ]
    assert found.provenance["metrics"] == list(dict.fromkeys(found.frame["metric"])) == names


def test_prompts_of_the_user_are_taken_whole(tiny, tmp_path):
    text = "the of a and is " * 6
    (tmp_path / "a.txt").write_text(text)
    for given, n in (
        (text, 30),
        ([text], 30),
        (random_tokens(1, 30), 29),
        (tmp_path / "a.txt", 10),
    ):
        found = sp.measure(tiny, "KnockOut(L0H1, 1)", "loss-by-position", given, max_tokens=11)
        assert len(found.frame) == n


def test_one_prompt_has_no_interval(tiny):
    row = sp.measure(tiny, "KnockOut(L0H1, 1)", "loss", random_tokens(1, 8)).frame.iloc[0]
    assert row[["low", "high", "p", "q"]].isna().all()
    assert row["effect"] == row["effect"]


def test_saved_and_loaded(tiny, tmp_path):
    found = sp.measure(
        tiny, "KnockOut(L0H1, 1)", ["loss", "kl"], random_tokens(3, 8), controls="random-heads:2"
    )
    for name in ("effects.parquet", "effects.json"):
        found.save(tmp_path / name)
        again = sp.Result.load(tmp_path / name)
        assert again.provenance == found.provenance
        pd.testing.assert_frame_equal(again.frame, found.frame)
    assert set(again.tables) == {"values", "draws"}
    assert json.loads((tmp_path / "effects.json").read_text())["kind"] == "measure"
    assert "KnockOut" in found._repr_html_()
    with pytest.raises(OutputError, match="which keep the provenance"):
        found.save(tmp_path / "effects.csv")
    (tmp_path / "other.json").write_text("[]")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    for name in ("other.json", "other.parquet"):
        with pytest.raises(OutputError, match="is not a result that slashpatch saved"):
            sp.Result.load(tmp_path / name)
    with pytest.raises(OutputError, match="no file"):
        sp.Result.load(tmp_path / "none.json")


def test_files_that_are_no_result(tiny, tmp_path):
    """Damaged, or of something else: one line each."""
    found = sp.measure(tiny, "KnockOut(L0H1, 1)", "loss", random_tokens(2, 8))
    for name in ("a.json", "a.parquet"):
        found.save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        for n_bytes in (0, 4, len(whole) // 2, len(whole) - 9):
            (tmp_path / f"cut-{n_bytes}-{name}").write_bytes(whole[:n_bytes])
        (tmp_path / name).unlink()
    scan = sp.scan(tiny, random_tokens(1, 9), [1])
    scan.save(tmp_path / "scan.safetensors")
    for suffix in (".json", ".parquet"):
        data = (tmp_path / "scan.safetensors").read_bytes()
        (tmp_path / f"scan{suffix}").write_bytes(data)
        (tmp_path / f"folder{suffix}").mkdir()
    sp.explain(tiny, "L0H1", random_tokens(1, 9)).save(tmp_path / "explanation.json")
    record = json.loads(json.dumps(without_nan(found.to_dict())))
    for number, change in enumerate(
        [{"kind": 5}, {"remarks": "text"}, {"remarks": [1]}, {"provenance": []}, {"effects": 3},
         {"effects": [1, 2]}, {"values": {"a": 1}}, {"effects": None}]
    ):  # fmt: skip
        (tmp_path / f"changed-{number}.json").write_text(json.dumps(record | change))
    (tmp_path / "number.json").write_text("3")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for attrs in ({"slashpatch": 3, "provenance": {}}, {"slashpatch": "measure"},
                  {"slashpatch": "measure", "provenance": 3}):  # fmt: skip
        frame = pd.DataFrame({"a": [1]})
        frame.attrs = attrs
        frame.to_parquet(tmp_path / f"attrs-{len(list(tmp_path.iterdir()))}.parquet")
    for entry in tmp_path.iterdir():
        with pytest.raises(OutputError, match="is not a result that slashpatch saved") as caught:
            sp.Result.load(entry)
        assert len(str(caught.value).splitlines()) == 1, entry.name


def test_in_the_fused_engine(tiny):
    tokens = random_tokens(3, 12)
    plain = sp.measure(tiny, "KnockOut(L0H1, 1)", ["loss", "kl", sp.SlashScores("L1H0")], tokens)
    with sp.fused(tiny):
        fused = sp.measure(
            tiny, "KnockOut(L0H1, 1)", ["loss", "kl", sp.SlashScores("L1H0")], tokens
        )
    pd.testing.assert_frame_equal(plain.frame, fused.frame, atol=1e-5, rtol=1e-3)


def test_rows_against_a_control_speak_of_prompts_and_of_draws(planted):
    found = sp.measure(
        planted,
        ["AblateHeads(L0H1)", "KnockOut(L0H0, 1)"],
        "copying",
        n_prompts=8,
        max_tokens=21,
        controls="matched-heads:6",
    )
    values = found.tables["values"].pivot_table(index="edit", columns="prompt", values="value")
    draws = found.tables["draws"]
    clean = torch.tensor(values.loc["clean"].to_numpy())
    for edit, rows in found.frame.groupby("edit"):
        of_clean, of_control = rows.iloc[0], rows.iloc[1]
        assert np.isnan(of_clean["p_rank"])
        drawn = draws[draws["edit"] == edit]["drawn"]
        effects = torch.tensor(values.loc[edit].to_numpy()) - clean
        of_draws = torch.stack([torch.tensor(values.loc[one].to_numpy()) for one in drawn]) - clean
        by_hand = beyond_draws(effects, of_draws)
        assert of_control["effect"] == pytest.approx(float(by_hand.estimate), abs=1e-6)
        assert of_control["low"] == pytest.approx(float(by_hand.low), abs=1e-5)
        assert of_control["high"] == pytest.approx(float(by_hand.high), abs=1e-5)
        assert of_control["p_rank"] == pytest.approx((1 + 6 * of_control["as_large"]) / 7)
        # p and q take the draws for fixed.
        assert of_control["p"] == pytest.approx(float(p_value(effects - of_draws.mean(0))))
    assert found.frame.iloc[3]["p_rank"] == pytest.approx(1 / 7)
    (remark,) = found.remarks
    assert remark == "matched-heads: 6 draws cannot give a p_rank below 0.14; 0.05 needs 19."


def test_few_prompts_and_few_draws_are_said(tiny):
    found = sp.measure(
        tiny, "KnockOut(L0H1, 1)", "loss", random_tokens(5, 8), controls="random-heads:2"
    )
    assert found.remarks == (
        "5 prompts: too few for intervals and p-values, which need at least 6.",
        "random-heads: 2 draws cannot give a p_rank below 0.33; 0.05 needs 19, and fewer than 6 "
        "have no interval.",
    )
    assert found.frame[["low", "high", "p", "q"]].isna().all(axis=None)
    assert found.frame["p_rank"].isna().tolist() == [True, False]


def test_controls_without_a_number_draw_19_or_as_many_as_there_are(tiny):
    assert len(drawn(tiny, "other-offsets", "KnockOut(L0H0, 1)")) == 15
    assert len(drawn(tiny, "random-heads", "KnockOut(L0H0, 1)")) == 3
    assert len(drawn(tiny, "other-offsets", "KnockOut(L0H0, (1, 2))")) == 19
    found = sp.measure(
        tiny, "KnockOut(L0H1, 1)", "loss", random_tokens(2, 8), controls="random-heads"
    )
    assert found.frame["against"].tolist() == ["clean", "random-heads:3"]
    assert len(found.tables["draws"]) == 3
    with pytest.raises(ControlError, match="which leaves 0"):
        drawn(tiny, "random-heads", "AblateHeads('L0H0, L0H1, L0H2, L0H3')")
