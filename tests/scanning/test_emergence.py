import gc
import io
import math
import re
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import slashpatch as sp
from slashpatch.bridge.checkpoints import Checkpoint, checkpoints
from slashpatch.bridge.trained import bridge_of_copy, require_same_logits, undisturbed
from slashpatch.data import display
from slashpatch.data.prompts import repeated_random_tokens
from slashpatch.maths.repeated_tokens import copying_loss
from slashpatch.scanning.emergence_result import columns_of

from ..tiny import llama, tokenizer
from ..zoo import FAMILIES, build

SMALL = {"random_tokens": True, "n_prompts": 2, "max_tokens": 40, "offsets": range(4)}
ALL = ("rank", "cone", "bands", "prefix", "copying")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder of three checkpoints, with a tokenizer in the last one only."""
    folder = tmp_path_factory.mktemp("run")
    for step in (10, 2, 30):
        model = llama(seed=step)
        model.save_pretrained(folder / f"checkpoint-{step}")
        record = (
            f'{{"global_step": {step}, "log_history": [{{"loss": {step / 4}, "step": {step}}}]}}'
        )
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(record)
    (folder / "runs").mkdir()
    return folder


def made(values, offsets=(0, 1), heads=2):
    """An Emergence whose scores [step, head, offset] are given, at steps 0, 10, 20, ..."""
    values = np.asarray(values, dtype=float)
    rows = []
    for index, scores in enumerate(values):
        for head in range(heads):
            rows.append([10 * index, f"step {10 * index}", "f", float("nan"), float("nan"),
                         0, head, f"L0H{head}", *scores[head]])  # fmt: skip
    frame = pd.DataFrame(rows, columns=columns_of(tuple(offsets), ("slash",)))
    provenance = {
        "model": "made", "offsets": list(offsets), "measures": ["slash"],
        "layers_heads_vocabulary": [1, heads, 9],
        "prompts": {"source": "made", "n": 2, "digest": ""}, "n_tokens": 80,
    }  # fmt: skip
    return sp.Emergence(frame, provenance)


def test_a_trainers_folder_is_all_its_checkpoints_by_step(run):
    found = sp.emergence(run, device="cpu", measures=ALL, **SMALL)
    assert found.steps == (2, 10, 30)
    assert found.provenance["model"] == run.name
    assert found.summary()["loss"].tolist() == [0.5, 2.5, 7.5]
    for place, step in enumerate(found.steps):
        bridge = sp.load(llama(seed=step))
        expected = sp.scan(bridge, **SMALL)
        assert torch.equal(found.scores[place], expected.scores)
        rows = found.frame[found.frame["step"] == step].reset_index(drop=True)
        columns = ["r1_q", "r1_k", "cone_q", "cone_k", "cone_x"]
        pd.testing.assert_frame_equal(rows[columns], expected.rank_one[columns])
        assert set(rows["fingerprint"]) == {expected.provenance["fingerprint"]}


def test_prefix_matching_and_copying_loss_are_those_of_measure(run):
    found = sp.emergence(run / "checkpoint-2", device="cpu", measures=ALL, **SMALL)
    bridge = sp.load(llama(seed=2))
    tokens = repeated_random_tokens(bridge, 2, 31, 0)
    logits, cache = bridge.run_with_cache(tokens)
    assert found.frame["copying_loss"].iloc[0] == pytest.approx(
        float(copying_loss(logits.detach(), tokens).mean()), abs=1e-5
    )
    metric = sp.PrefixMatching()
    for layer in range(2):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        expected = metric.read(pattern, tokens).mean(0)
        values = found.frame.query("layer == @layer")["prefix_matching"].to_numpy()
        np.testing.assert_allclose(values, expected.numpy(), atol=1e-6)


def test_band_shares_by_definition(run):
    """Each pair's cosine at the best offset, without its mean over offsets, by band."""
    found = sp.emergence(run / "checkpoint-2", device="cpu", measures=("bands",), **SMALL)
    scan = sp.scan(sp.load(llama(seed=2)), **SMALL)
    best = found.best()
    for row in best.itertuples():
        terms = {"high": 0.0, "medium": 0.0, "low": 0.0}
        total = 0.0
        for cosine in scan.moments.cosines(sp.Head(row.layer, row.head)):
            theta = 2 * math.pi / cosine.wavelength
            at = [cosine.amplitude * math.cos(theta * d + cosine.phase) for d in range(64)]
            peak = at[row.offset] - sum(at) / 64
            terms[cosine.band] += peak
            total += abs(peak)
        for band, value in terms.items():
            measured = found.frame.loc[row.Index, f"band_{band}"]
            assert measured == pytest.approx(value / total, abs=1e-9)


def test_models_in_memory_are_copied_and_bridges_run_as_they_are():
    model = llama(seed=1, attn_implementation="sdpa").train()
    bridge = sp.load(llama(seed=1))
    with sp.patch(bridge, sp.KeepOnly("L0H0", 2)):
        found = sp.emergence([(5, model), (7, bridge)], **SMALL)
    assert found.steps == (5, 7)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    frame = found.frame.set_index(["step", "name"])
    assert frame.loc[(5, "L1H3"), "score_1"] != frame.loc[(7, "L1H3"), "score_1"]
    assert frame.loc[(7, "L0H0"), "score_2"] == pytest.approx(1, abs=0.05)
    assert len(set(found.frame["fingerprint"])) == 1
    assert sp.emergence(model, **SMALL).steps == (0,)


def test_a_generator_makes_each_model_when_the_one_before_is_gone():
    alive = []

    def models():
        for seed in range(3):
            gc.collect()
            assert not any(reference() is not None for reference in alive)
            model = llama(seed=seed)
            alive.append(weakref.ref(model))
            yield model
            del model

    found = sp.emergence(models(), **SMALL)
    assert found.steps == (0, 1, 2)
    assert found.frame["fingerprint"].nunique() == 3


def test_a_run_that_stopped_is_continued(run, tmp_path, monkeypatch):
    path = tmp_path / "run.parquet"
    loaded = []
    load = Checkpoint.load

    def counted(self, *arguments):
        loaded.append(self.step)
        if len(loaded) == 3:
            raise KeyboardInterrupt
        return load(self, *arguments)

    monkeypatch.setattr(Checkpoint, "load", counted)
    with pytest.raises(KeyboardInterrupt):
        sp.emergence(run, device="cpu", path=path, **SMALL)
    assert sp.Emergence.load(path).steps == (2, 10)
    with pytest.raises(sp.SlashpatchError, match="holds a run already; resume it"):
        sp.emergence(run, device="cpu", path=path, **SMALL)
    found = sp.emergence(run, device="cpu", path=path, resume=True, **SMALL)
    assert loaded == [2, 10, 30, 30]
    monkeypatch.undo()
    whole = sp.emergence(run, device="cpu", **SMALL)
    pd.testing.assert_frame_equal(found.frame, whole.frame)
    pd.testing.assert_frame_equal(sp.Emergence.load(path).frame, whole.frame)
    # Nothing is left to measure, but other prompts are noticed all the same.
    again = sp.emergence(run, device="cpu", path=path, resume=True, **SMALL)
    pd.testing.assert_frame_equal(again.frame, whole.frame)
    with pytest.raises(sp.SlashpatchError, match="is of another run: its prompts"):
        sp.emergence(run, device="cpu", path=path, resume=True, **{**SMALL, "seed": 1})
    weights = run / "checkpoint-10" / "model.safetensors"
    kept = weights.read_bytes()
    llama(seed=99).save_pretrained(run / "checkpoint-10")
    with pytest.raises(sp.SlashpatchError, match="another checkpoint of step 10"):
        sp.emergence(run, device="cpu", path=path, resume=True, **SMALL)
    weights.write_bytes(kept)


def test_what_may_be_added_to_a_file(run, tmp_path):
    """Later checkpoints to the file of a SlashCallback, which names no files; no other dtype."""
    from slashpatch.scanning.probe import probe_of
    from slashpatch.scanning.record import Record

    path = tmp_path / "run.parquet"
    bridge = sp.load(llama(seed=1))
    Record(probe_of(bridge, **SMALL), bridge, path).add(0, "step 0", bridge)
    options = {"device": "cpu", "path": path, "resume": True, **SMALL}
    with pytest.raises(sp.SlashpatchError, match="its dtype is 'float32', here it is 'float64'"):
        sp.emergence(run, dtype="float64", **options)
    assert sp.Emergence.load(path).steps == (0,)
    assert sp.emergence(run, **options).steps == (0, 2, 10, 30)
    with pytest.raises(sp.SlashpatchError, match="its dtype is 'float32', here it is 'float64'"):
        sp.emergence(run, dtype="float64", **options)


def test_what_checkpoints_are_called(run, tmp_path):
    assert [found.step for found in checkpoints(run)] == [2, 10, 30]
    (one,) = checkpoints(run / "checkpoint-10")
    assert (one.step, one.run, one.loss()) == (10, run.name, 2.5)
    (hub,) = checkpoints("EleutherAI/pythia-160m@step1000")
    assert (hub.step, hub.revision) == (1000, ("EleutherAI/pythia-160m", "step1000"))
    assert hub.run == "EleutherAI/pythia-160m"
    assert checkpoints("gpt2@main")[0].step is None
    plain = tmp_path / "model"
    llama().save_pretrained(plain)
    assert checkpoints(plain)[0].step is None
    (plain / "trainer_state.json").write_text("{broken")
    assert checkpoints(plain)[0].step is None
    for text, message in (
        (tmp_path, "has neither a config.json nor folders checkpoint-N"),
        ("nowhere", "no checkpoint 'nowhere'; expected"),
        ("a b@step1", "no checkpoint 'a b@step1'"),
        ("id@", "no checkpoint 'id@'"),
    ):
        with pytest.raises(sp.SlashpatchError, match=message):
            checkpoints(text)
    with pytest.raises(sp.SlashpatchError, match="cannot fetch EleutherAI/pythia-160m@step1000"):
        sp.emergence("EleutherAI/pythia-160m@step1000", **SMALL)


def test_runs_that_are_refused(run, tmp_path):
    plain = tmp_path / "model"
    llama().save_pretrained(plain)
    larger = tmp_path / "checkpoint-50"
    llama(layers=3).save_pretrained(larger)
    for models, message, options in (
        ([run, run / "checkpoint-10"], "has the step 10, as another one has", {}),
        ([run, plain], "has no step, unlike those before it", {}),
        ([plain, run], "has a step, unlike those before it", {}),
        ([(3, run)], "holds 3 checkpoints, which cannot all have the step 3", {}),
        ([(-1, plain)], "expected \\(step, model\\) with a step from 0", {}),
        ([], "no models were given", {}),
        ([run / "checkpoint-2", larger], "expected 2 layers of 4 heads .* got 3 layers", {}),
        (run, "unknown measure 'r1'; expected one of", {"measures": "r1"}),
        (run, "resume needs a path", {"resume": True}),
        (run, "saved as a .parquet file", {"path": tmp_path / "a.json"}),
        (run, "offset 64 does not fit", {"offsets": [64]}),
        (run, "the model has no tokenizer", {"random_tokens": False}),
        (["nowhere"], "no checkpoint 'nowhere'", {}),
    ):
        with pytest.raises(sp.SlashpatchError, match=message):
            sp.emergence(models, **{"device": "cpu", **SMALL, **options})


def test_a_checkpoint_without_a_tokenizer_takes_one(run):
    found = sp.emergence(
        run / "checkpoint-2", device="cpu", tokenizer=tokenizer(), n_prompts=2, max_tokens=40
    )
    assert found.provenance["prompts"]["source"] == "natural text, seed 0"


SUPPORTED = [name for name, family in FAMILIES.items() if family.wrapped and not family.refused]


@pytest.mark.parametrize("name", SUPPORTED)
def test_a_copy_of_every_family_computes_what_the_model_does(name):
    model = build(FAMILIES[name]).train()
    modes = [module.training for module in model.modules()]
    implementation = model.config._attn_implementation
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)  # after it was built, as training does
    state = torch.get_rng_state()
    with undisturbed(model):
        copied = bridge_of_copy(model)
        require_same_logits(model, copied)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == implementation
    tokens = list(torch.randint(4, 80, (2, 20), generator=torch.Generator().manual_seed(0)))
    options = {"offsets": range(4), "moments": False, "engine": "bridge"}
    expected = sp.scan(sp.load(model), tokens, **options)
    assert torch.equal(sp.scan(copied, tokens, **options).scores, expected.scores)


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.5, 0.9]), st.just(0.1)), min_size=2,
                 max_size=2),
        min_size=1, max_size=6,
    )
)  # fmt: skip
def test_first_steps_by_definition(values):
    found = made(values)
    table = found.first_steps(0.4)
    scores = np.asarray(values)[:, :, 0]
    expected = {}
    for head in range(2):
        above = scores[:, head] >= 0.4
        if above.any():
            first = min(index for index, up in enumerate(above) if up)
            stays = [index for index in range(len(above)) if above[index:].all()]
            expected[f"L0H{head}"] = (
                10 * first, 10 * (first - 1) if first else -1, 10 * stays[0] if stays else -1,
                scores[:, head].max(), scores[-1, head],
            )  # fmt: skip
    columns = ["first", "before", "since", "highest", "last"]
    rows = {row["name"]: tuple(row[c] for c in columns) for _, row in table.iterrows()}
    assert rows == expected
    assert table["first"].is_monotonic_increasing
    assert (table["offset"] == 0).all()
    summary = found.summary(0.4)
    assert summary["slash_heads"].tolist() == (scores >= 0.4).sum(1).tolist()


def test_scores_best_and_slash_heads():
    found = made([[[0.1, 0.3], [0.0, 0.2]], [[0.9, 0.3], [0.1, 0.6]]])
    assert found.scores.shape == (2, 1, 2, 2)
    assert found.best().query("step == 10")["offset"].tolist() == [0, 1]
    assert found.best(1).query("step == 10")["score"].tolist() == [0.3, 0.6]
    reached = found.slash_heads(0.3)
    assert reached[["step", "name", "offset"]].to_numpy().tolist() == [
        [0, "L0H0", 1], [10, "L0H0", 0], [10, "L0H1", 1]
    ]  # fmt: skip
    with pytest.raises(sp.SlashpatchError, match="no measured offset is 2 or more"):
        found.best(2)
    with pytest.raises(sp.SlashpatchError, match="no column 'r1_q' was measured; expected one of"):
        found.first_steps(0.3, "r1_q")
    with pytest.raises(sp.SlashpatchError, match="kappa must be a score"):
        found.slash_heads(2.0)
    assert found.first_steps(0.5, "score_1")["name"].tolist() == ["L0H1"]


def test_a_step_whose_logits_overflowed_is_shown_without_a_loss():
    found = made([[[0.2, 0.1], [0.1, 0.3]], [[0.2, 0.4], [0.1, 0.3]]])
    found.frame["prefix_matching"] = [float("nan"), float("nan"), 0.25, 0.5]
    found.frame["copying_loss"] = [float("nan")] * 2 + [2.0] * 2
    found.provenance["measures"] = ["slash", "prefix", "copying"]
    summary = found.summary()
    assert summary["copying_loss"].isna().tolist() == [True, False]
    assert summary["prefix_matching"].iloc[1] == 0.5
    assert summary["prefix_head"].tolist() == ["L0H0", "L0H1"]
    assert "–" in found.table()
    assert "<table" in found._repr_html_()


def test_files(tmp_path):
    found = made([[[0.1, 0.3], [0.0, 0.2]], [[0.9, 0.3], [0.1, 0.6]]])
    path = tmp_path / "run.parquet"
    found.save(path)
    again = sp.Emergence.load(path)
    pd.testing.assert_frame_equal(again.frame, found.frame)
    assert again.provenance == found.provenance
    pd.testing.assert_frame_equal(pd.read_parquet(path), found.frame)
    whole = path.read_bytes()
    for damaged, message in (
        (whole[: len(whole) // 2], "is no file of the format"),
        (b"", "is no file of the format"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(sp.SlashpatchError, match=message):
            sp.Emergence.load(path)
    with pytest.raises(sp.SlashpatchError, match="no file .*; expected a file of the format"):
        sp.Emergence.load(tmp_path / "absent.parquet")
    sp.Emergence(found.frame.iloc[:-1], found.provenance).save(path)
    with pytest.raises(sp.SlashpatchError, match="do not agree with its header"):
        sp.Emergence.load(path)
    with pytest.raises(sp.SlashpatchError, match="saved as a .parquet file"):
        found.save(tmp_path / "run.csv")


def test_how_it_looks():
    found = made([[[0.1, 0.3], [0.0, 0.2]], [[0.9, 0.3], [0.1, 0.6]]])
    table = found.table(0.5)
    assert "2 steps of made, 2 prompts of 40 tokens" in table
    assert re.search(r"10 │ +2 │ L0H0 Δ0 0.900", table)
    assert "no head reaches κ = 0.95" in found.table(0.95)
    assert str(found).startswith("2 steps of made")
    assert repr(found) == "<Emergence of made: 2 steps, 1 × 2 heads, slash>"
    figure = found.plot(kappa=0.5, log_steps=True)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["L0H0 Δ=0", "L0H1 Δ=1"]
    chart = found.plot("altair", kappa=0.5).to_dict()
    assert "training step" in str(chart)
    assert "<svg" in found._repr_html_()


def test_checkpoints_without_steps_are_named():
    found = made([[[0.1, 0.3], [0.0, 0.2]], [[0.9, 0.3], [0.1, 0.6]]])
    assert "checkpoint" not in found.table()
    frame = found.frame.assign(checkpoint=["[bold]a", "[bold]a", "b\n", "b\n"])
    table = sp.Emergence(frame, found.provenance).table()
    assert "[bold]a" in table
    assert "b\\n" in table


def test_the_live_view_shows_the_newest_step():
    found = made([[[0.1, 0.3], [0.0, 0.2]], [[0.9, 0.3], [0.1, 0.6]]])
    console = Console(file=io.StringIO(), force_terminal=True, width=80, legacy_windows=False)
    view = display.live(found, total=40, kappa=0.5, console=console)
    view.start()
    view.update(found, 12, 3.25)
    view.stop()
    shown = console.file.getvalue()
    assert "step 12 of 40, loss 3.250: 2 slash heads (κ = 0.5) at step 10" in shown
    assert re.search(r"L0H0 +0 +0.900", shown)


def test_a_copy_is_a_model_of_its_own():
    model = llama(seed=3)
    with undisturbed(model):
        copied = bridge_of_copy(model)
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight.mul_(0)
        assert float(copied.original_model.model.layers[0].self_attn.q_proj.weight.abs().sum()) > 0
