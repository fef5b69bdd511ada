"""The theory's claims on a small model, checkpoints, and measurements.

The thresholds are those that the default settings must meet, with three seeds each.
"""

import functools
import io
import json
import math

import pandas as pd
import pytest
import torch

import slashpatch as sp
from slashpatch import theory
from slashpatch.errors import SweepError, TheoryError

#: A third of the work of the defaults.
SMALL = {"vocabulary": 32, "length": 40, "segment": 12, "n_pairs": 12, "batch_size": 16}
SEEDS = (0, 1, 2)


@functools.cache
def run(seed=0, **knobs):
    return theory.train(**{**SMALL, "seed": seed, "progress": False, **knobs})


@pytest.mark.parametrize("seed", SEEDS)
def test_a_slash_emerges(seed):
    found = run(seed)
    assert found.score > 0.5
    assert found.history.filter(like="score_").iloc[-1].drop("score_1").max() < 0.3
    assert found.history["r1_q"].iloc[-1] > 0.95
    assert found.history["margin"].iloc[-1] > 0
    assert found.profile().argmax() == 1
    assert found.history["loss"].iloc[-1] < 0.5 * found.history["loss"].iloc[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_slash_forms_before_layer_2_matches(seed):
    found = run(seed)
    assert found.time_to(0.5) < found.time_to(0.3, "matching") < math.inf


@pytest.mark.parametrize("seed", SEEDS)
def test_the_slash_generalises_out_of_distribution(seed):
    assert abs(run(seed).out_of_distribution() - run(seed).score) < 0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_without_a_common_direction_a_slash_takes_five_times_as_long(seed):
    soon = run(seed).time_to(0.3)
    assert soon < 100
    assert run(seed, cone=0.0).time_to(0.3) >= 5 * soon


@pytest.mark.parametrize("seed", SEEDS)
def test_low_frequencies_make_no_slash(seed):
    found = run(seed, frequencies="low")
    assert max(row["score_1"] for row in found.rows) < 0.2
    assert found.history["margin"].iloc[-1] < 0.1


@pytest.mark.parametrize("offset", [2, 3])
def test_the_slash_stands_where_the_task_rewards_it(offset):
    found = run(offset=offset)
    scores = found.history.filter(like="score_").iloc[-1]
    assert scores.idxmax() == f"score_{offset}"
    assert found.score > 0.5


def test_the_other_task():
    found = run(task="regression", length=48, steps=500)
    assert found.score > 0.5
    assert found.history["loss"].iloc[-1] < 0.2


def test_adam_reaches_the_same_end():
    found = run(optimizer="adam")
    assert found.score > 0.5
    assert found.history["matching"].iloc[-1] > 0.5


def test_full_batch():
    found = run(n_sequences=64, steps=200)
    assert found.score > 0.5
    losses = found.history["loss"]
    assert losses.iloc[-1] < losses.iloc[0]


def test_equal_seeds_give_equal_runs():
    again = theory.train(**SMALL, steps=30, progress=False)
    assert again.rows == theory.train(**SMALL, steps=30, progress=False).rows
    assert again.rows != theory.train(**SMALL, steps=30, seed=1, progress=False).rows
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
    theory.train(**SMALL, steps=0, progress=False)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("optimizer", ["gd", "adam"])
def test_resumed_bit_for_bit(optimizer, tmp_path):
    path = tmp_path / "run.safetensors"
    knobs = {**SMALL, "optimizer": optimizer, "progress": False}
    whole = theory.train(**knobs, steps=60)
    theory.train(**knobs, steps=37, checkpoint=path)
    pieces = theory.train(**knobs, steps=60, checkpoint=path, resume=True)
    for name, one in whole.model.weights.items():
        assert torch.equal(one, pieces.model.weights[name])
    assert pieces.rows == whole.rows
    loaded = theory.Run.load(path)
    assert loaded.settings == whole.settings
    assert loaded.rows == whole.rows
    assert torch.equal(loaded.profile(), whole.profile())
    assert all(torch.equal(one, whole.state[name]) for name, one in loaded.state.items())


def test_a_killed_run_resumes_from_the_last_doubling(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    knobs = {**SMALL, "progress": False, "steps": 60, "frequencies": [1.0, 0.5, 0.2]}
    whole = theory.train(**knobs)
    forward, calls = theory.ShallowTransformer.forward, []

    def dies(self, *arguments):
        calls.append(1)
        if len(calls) == 90:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(theory.ShallowTransformer, "forward", dies)
        with pytest.raises(KeyboardInterrupt):
            theory.train(**knobs, checkpoint=path)
    assert theory.Run.load(path).step == 32
    again = theory.train(**knobs, checkpoint=path, resume=True)
    assert again.rows == whole.rows
    assert torch.equal(again.model.w_q, whole.model.w_q)


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    knobs = {**SMALL, "progress": False}
    theory.train(**knobs, steps=8, checkpoint=path)
    for changed, message in (
        ({"cone": 0.5}, "another configuration: its cone is 1.0, here it is 0.5"),
        ({"seed": 1}, "its seed is 0, here it is 1"),
        ({"steps": 7}, "already has 8 steps"),
    ):
        with pytest.raises(TheoryError, match=message):
            theory.train(**{**knobs, "steps": 8, **changed}, checkpoint=path, resume=True)
    (tmp_path / "other.safetensors").write_bytes(b"hello")
    for wrong, message in (
        (tmp_path / "other.safetensors", "is no file of the format"),
        (tmp_path / "none.txt", "ends in .safetensors"),
        (None, "resume needs a checkpoint"),
    ):
        with pytest.raises(TheoryError, match=message):
            theory.train(**knobs, steps=8, checkpoint=wrong, resume=True)


def test_a_loss_that_is_not_finite_says_so(monkeypatch):
    forward = theory.ShallowTransformer.forward

    def broken(self, *arguments):
        found = forward(self, *arguments)
        found.loss = found.loss * torch.nan
        return found

    monkeypatch.setattr(theory.ShallowTransformer, "forward", broken)
    with pytest.raises(TheoryError, match="the loss is nan at step 0.*lower learning_rate than 20"):
        theory.train(**SMALL, steps=5, progress=False)


def test_damaged_checkpoints_are_refused(tmp_path):
    """A tensor missing, changed, or of another type; a header that was edited."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    path, other = tmp_path / "run.safetensors", tmp_path / "other.safetensors"
    theory.train(**SMALL, steps=8, optimizer="adam", checkpoint=path, progress=False)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["slashpatch"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert len(tensors) == 3 + 1 + 3 * 3

    def write(tensors=tensors, **changed):
        save_file(tensors, other, metadata={"slashpatch": json.dumps({**header, **changed})})

    write()
    assert theory.Run.load(other).step == 8
    flipped = tensors["w_q"].clone()
    flipped[0, 0] += 1e-6
    for wrong in (
        {"tensors": {k: v for k, v in tensors.items() if k != "generator"}},
        {"tensors": {k: v for k, v in tensors.items() if k != "w_k.exp_avg"}},
        {"tensors": {**tensors, "w_q": flipped}},
        {"tensors": {**tensors, "w_m": tensors["w_m"].bfloat16()}},
        {"tensors": {**tensors, "more": flipped}},
        {"step": 4},
        {"rows": []},
        {"settings": {**header["settings"], "cone": 0.5}},
    ):
        write(**wrong)
        with pytest.raises(TheoryError, match="is damaged"):
            theory.Run.load(other)


def test_training_where_no_gradients_are_kept():
    expected = theory.train(**SMALL, steps=3, progress=False).rows
    for guard in (torch.no_grad(), torch.inference_mode()):
        with guard:
            assert theory.train(**SMALL, steps=3, progress=False).rows == expected


def test_invalid_arguments_of_measurements():
    found = run()
    for call, message in (
        (lambda: found.time_to(float("nan")), "kappa is a number from 0 to 1"),
        (lambda: found.time_to(0.3, "nope"), "no column 'nope'; expected one of step, loss"),
        (lambda: found.profile(-1), "n_offsets is an integer from 1"),
        (lambda: found.read(0), "length is an integer from 4"),
    ):
        with pytest.raises(TheoryError, match=message):
            call()


def test_settings_by_name_or_whole():
    with pytest.raises(TheoryError, match="no setting cones; expected some of task, offset"):
        theory.train(cones=1)
    with pytest.raises(TheoryError, match="not both"):
        theory.train(theory.Settings(), cone=1.0)
    assert sp.theory is theory


def test_phase_diagram(tmp_path, monkeypatch):
    knobs = {
        "rows": ("cone", (0.0, 1.0)),
        "columns": ("frequencies", ("low", "all", (1.0, 0.5))),
        "seeds": (0, 1),
        "progress": False,
    }
    base = theory.Settings(**SMALL, steps=150)
    frame = theory.phase_diagram(base, **knobs)
    assert len(frame) == 2 * 3 * 2
    assert set(frame["frequencies"]) == {"low", "all", "1.0, 0.5"}
    good = frame[(frame["cone"] == 1) & (frame["frequencies"] == "all")]
    assert (good["final_score"] > 0.5).all()
    assert good["time_to_slash"].max() < 150
    without = frame[(frame["cone"] == 0) | (frame["frequencies"] == "low")]
    assert without["time_to_slash"].tolist() == [math.inf] * 8
    path = tmp_path / "phase.parquet"
    import slashpatch.theory.many_runs as module

    train, calls = module.train, []

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    monkeypatch.setattr(module, "train", dies)
    with pytest.raises(KeyboardInterrupt):
        theory.phase_diagram(base, **knobs, path=path)
    with pytest.raises(SweepError, match="unfinished"):
        theory.phase_diagram(base, **knobs, path=path)
    with pytest.raises(SweepError, match="is of another run: its kappa"):
        theory.phase_diagram(base, **knobs, path=path, resume=True, kappa=0.2)
    again = theory.phase_diagram(base, **knobs, path=path, resume=True)
    assert len(calls) == 5 + 12 - 4
    pd.testing.assert_frame_equal(again, frame)
    pd.testing.assert_frame_equal(pd.read_parquet(path), frame)
    assert [file.name for file in tmp_path.iterdir()] == ["phase.parquet"]


def test_settings_named_as_measurements_and_settings_that_are_none():
    base = theory.Settings(**SMALL, steps=2)
    from rich.console import Console

    from slashpatch.reporting.theory import phase_figure, phase_report

    for rows, columns, expected in (
        (("matching", (0.5, 2.0)), ("offset", (1, 2)), [0.5, 0.5, 2.0, 2.0]),
        (("n_sequences", (None, 4)), ("offset", (1, 2)), ["default", "default", 4, 4]),
        (
            ("frequencies", ((1.0, 0.5), (1.0, 0.50000001))),
            ("steps", (1, 2)),
            ["1.0, 0.5"] * 2 + ["1.0, 0.50000001"] * 2,
        ),
    ):
        frame = theory.phase_diagram(base, rows=rows, columns=columns, seeds=[0], progress=False)
        assert frame[rows[0]].tolist() == expected
        assert frame[columns[0]].tolist() == list(columns[1]) * 2
        phase_figure(frame, 0.3)
        console = Console(width=150, record=True, file=io.StringIO())
        console.print(phase_report(frame, 0.3))
        assert console.export_text().count("in 0 of 1 seeds") == 4


@pytest.mark.usefixtures("unchecked")
def test_invalid_arguments_of_phase_diagrams():
    for wrong, message in (
        ({"rows": ("cones", (0, 1))}, "need one of the settings task, offset"),
        ({"rows": ("seed", (0, 1))}, "need one of the settings"),
        ({"rows": ("cone", ())}, "and its values"),
        ({"rows": ("frequencies", ("all",))}, "need different settings"),
        ({"rows": ("cone",)}, "need one of the settings"),
        ({"rows": ("cone", 3)}, "need one of the settings"),
        ({"rows": ("cone", (0, 0.0))}, "same settings and seed"),
        ({"seeds": (1, 1)}, "same settings and seed"),
        ({"seeds": (0.5,)}, "seed is an integer"),
        ({"kappa": float("nan")}, "kappa is a number from 0 to 1"),
        ({"resume": True}, "resume needs a path"),
        ({"seeds": ()}, "no seeds were given"),
        ({"rows": ("cone", (-1.0,))}, "cone is a number from 0"),
    ):
        with pytest.raises(TheoryError, match=message):
            theory.phase_diagram(**wrong)


def test_the_frequency_condition_of_a_real_head(tiny):
    """The same function, on the predicted profile that `explain` shows."""
    from slashpatch.maths.spectrum import margin

    from ..planted import planted_model

    one = sp.explain(planted_model([2, None]), "L0H0", offset=2, n_prompts=2, max_tokens=24)
    assert one.margin == margin(one.profile.predicted, 2)
    assert one.margin > 0
    other = sp.explain(planted_model([2, None]), "L0H0", offset=5, n_prompts=2, max_tokens=24)
    assert other.margin < 0
    assert "predicted logit of the offset over all others: +" in str(one)
    assert one.to_dict()["profile"]["margin"] == one.to_row()["margin"] == one.margin


def test_the_margin_where_an_edit_removes_an_offset():
    """A profile lacks offsets whose diagonal was removed, so an offset is not its own index."""
    from slashpatch.maths.spectrum import margin

    from ..planted import planted_model

    model, prompts = planted_model([2, None]), torch.randint(4, 80, (2, 24))
    with sp.patch(model, sp.KnockOut("L0H0", 1)):
        one = sp.explain(model, "L0H0", prompts, offset=2)
        gone = sp.explain(model, "L0H0", prompts, offset=1)
    assert one.profile.offsets[:3].tolist() == [0, 2, 3]
    assert one.margin == margin(one.profile.predicted, 1) > 0
    assert gone.margin is None
    assert "not in the profile" in str(gone)


def test_no_model_library_is_needed():
    import subprocess
    import sys

    code = (
        "import sys, slashpatch as sp\n"
        "sp.theory.train(steps=2, progress=False).history\n"
        "assert not {'transformer_lens', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
