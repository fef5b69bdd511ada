"""Predictions against the model that they are of, and against training."""

import dataclasses
import functools
import math

import pandas as pd
import pytest
import torch

from slashpatch import theory
from slashpatch.data.files import write_table
from slashpatch.errors import SweepError, TheoryError
from slashpatch.maths.spectrum import predicted_profile
from slashpatch.theory.data import sample, seeded
from slashpatch.theory.prediction import _Flow
from slashpatch.theory.reduced import ReducedLoss, pattern
from slashpatch.theory.run import read_slash

SMALL = {"vocabulary": 32, "length": 32, "segment": 8, "n_pairs": 6, "batch_size": 16,
         "learning_rate": 8.0}  # fmt: skip


def alike(settings, size=30.0):
    """A model whose queries and keys are the same for all tokens."""
    model = theory.ShallowTransformer.initial(settings)
    for weight in (model.w_q, model.w_k):
        weight[:-1] = 0
        weight *= size
    q, k = (settings.cone * weight[-1].double() for weight in (model.w_q, model.w_k))
    profile = predicted_profile(q, k, torch.arange(settings.length), settings.rotary())
    return model, profile


@pytest.mark.parametrize("matching", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("offset", [1, 3])
def test_the_reduced_loss_is_the_models_if_all_tokens_are_alike(matching, offset):
    settings = theory.Settings(offset=offset, seed=offset, cone=0.7, **SMALL)
    model, profile = alike(settings)
    model.w_m *= matching
    examples = sample(settings, 3000, seeded(0, "test"))
    found = model.forward(settings, examples)
    torch.testing.assert_close(found.slash[0].double(), pattern(profile), atol=1e-5, rtol=1e-3)
    reduced = ReducedLoss(settings)
    expected = float(reduced(profile, torch.tensor(matching, dtype=torch.float64)))
    assert float(found.loss) == pytest.approx(expected, abs=0.02)


def test_the_reduced_gradient_is_the_models():
    """By the common direction of W_Q and W_K, and by the diagonal of w_m."""
    settings = theory.Settings(offset=2, cone=0.7, **SMALL)
    model, profile = alike(settings)
    weights = [weight.requires_grad_(True) for weight in model.weights.values()]
    loss = model.forward(settings, sample(settings, 3000, seeded(0, "test"))).loss
    by_q, by_k, by_m = torch.autograd.grad(loss, weights)
    flow = _Flow(settings)
    q, k = (
        torch.complex(*(settings.cone * weight[-1].detach().double()).chunk(2))
        for weight in (model.w_q, model.w_k)
    )
    force, pull = flow._force(profile, 1.0)
    for by, expected in ((by_q, force * k), (by_k, force.conj() * q)):
        found = -torch.complex(*by[-1].double().chunk(2)) / settings.cone
        assert float((found - expected).abs().max() / expected.abs().max()) < 0.1
    assert -float(by_m.diagonal().sum()) == pytest.approx(pull, rel=0.1)
    # What a diagonal entry gains, the others of its row lose.
    assert float(by_m.sum(1).abs().max()) < 1e-6
    seen, diagonal = settings.seen, float(by_m.diagonal().sum())
    others = float(by_m[:seen, :seen].sum()) - diagonal
    difference = settings.slower_rate * (diagonal / seen - others / (seen * (seen - 1)))
    assert difference == pytest.approx(flow.matching_rate * diagonal, rel=1e-3)
    # Means over tokens of training move with cone² + 1/seen.
    moved = by_q[: settings.seen].mean(0) + settings.cone * by_q[-1]
    found = -torch.complex(*moved.double().chunk(2)) * settings.rate
    expected = flow.rate * force * k
    assert float((found - expected).abs().max() / expected.abs().max()) < 0.1


@functools.cache
def predicted(**knobs):
    return theory.predict(theory.Settings(**{**SMALL, "steps": 200, **knobs}))


def test_early_growth_is_the_closed_form():
    settings = theory.Settings(**SMALL, steps=10)
    flow = _Flow(settings)
    for closed, whole in zip(flow.closed_form(), flow.integrate(0.0), strict=True):
        for column in ("score_0", "score_1", "score_5"):
            assert closed[column] == pytest.approx(whole[column], rel=0.01)
    pairs = theory.predict(settings).rates
    assert len(pairs) == 6
    assert min(pairs) > 0
    # Growth along the rising direction, in one step.
    force, _ = flow._force(flow._profile(flow.q, flow.k), 1.0)
    turn = torch.exp(1j * force.angle())
    before = (flow.q + turn * flow.k).abs()
    q, k = flow.q + flow.rate * force * flow.k, flow.k + flow.rate * force.conj() * flow.q
    torch.testing.assert_close((q + turn * k).abs() / before, 1 + torch.tensor(pairs).double())


def test_64_pairs_of_start_positions_stand_for_all(monkeypatch):
    for settings in (theory.Settings(), theory.Settings(length=60, segment=6, offset=2)):
        few = _Flow(settings).rates()
        with monkeypatch.context() as patch:
            patch.setattr("slashpatch.theory.reduced._N_STARTS", 4096)
            many = _Flow(settings).rates()
        assert float((few - many).abs().max() / many.max()) < 0.02


def test_forces_that_are_kept_while_logits_hardly_move_change_nothing():
    flow = _Flow(theory.Settings(**SMALL, steps=100))
    column = "score_1"
    fast, slow = (flow.integrate(tolerance) for tolerance in (0.02, 0.0))
    assert max(abs(a[column] - b[column]) for a, b in zip(fast, slow, strict=True)) < 0.05
    assert fast[-1][column] > 0.9


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"offset": 3, "seed": 1},
        {"frequencies": "high", "learning_rate": 5.0},
        {"frequencies": (2.0, 1.1, 0.7, 0.3), "cone": 0.8},
    ],
)
def test_the_step_and_the_offset_are_those_of_training(knobs):
    found = predicted(**knobs)
    run = theory.train(found.settings, progress=False)
    assert found.step == pytest.approx(run.time_to(0.5), rel=0.15)
    assert found.step < 150
    assert found.offset == found.settings.offset
    assert [row["step"] for row in found.rows] == [row["step"] for row in run.rows]
    assert set(found.rows[0]) - {"matching_strength"} <= set(run.rows[0])
    assert found.step <= found.closed_form.step < math.inf
    assert found.closed_form.offset == found.offset


def test_no_slash():
    found = predicted(frequencies=(0.001,))
    assert (found.step, found.offset) == (math.inf, None)
    assert predicted(cone=0.0).step == math.inf
    assert predicted(steps=0).step == math.inf


def test_what_the_prediction_depends_on():
    base = predicted()
    assert predicted(batch_size=4, n_sequences=8).rows == base.rows
    assert predicted(seed=5).rows != base.rows
    assert predicted(seed=5).rates == pytest.approx(base.rates, rel=0.01)
    twice = predicted(learning_rate=16.0)
    assert twice.rates == pytest.approx([2 * rate for rate in base.rates])
    assert twice.step < base.step < predicted(cone=0.5).step
    assert theory.predict(**SMALL, steps=200, kappa=0.3).step <= base.step


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"task": "regression"}, "derived for task='copying'; got 'regression'"),
        ({"optimizer": "adam"}, "derived for optimizer='gd'; got 'adam'"),
        ({"kappa": 2}, "kappa is a number from 0 to 1"),
        ({"cones": 1}, "no setting cones"),
        ({"settings": theory.Settings(), "cone": 1.0}, "not both"),
    ],
)
def test_refusals(knobs, said):
    with pytest.raises(TheoryError, match=said):
        theory.predict(**knobs)


def test_a_gradient_that_is_not_finite_is_refused(monkeypatch):
    monkeypatch.setattr(ReducedLoss, "gradient", lambda self, profile, m: (profile * math.nan, 0.0))
    with pytest.raises(TheoryError, match="not finite. Use a lower learning_rate than 8"):
        predicted(seed=9)


def test_logits_that_are_no_numbers_are_refused(monkeypatch):
    flow = _Flow(theory.Settings(**SMALL, steps=3))
    profile, calls = flow._profile, []

    def breaks(q, k):
        calls.append(1)
        return profile(q, k) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(flow, "_profile", breaks)
    with pytest.raises(TheoryError, match="not finite"):
        flow.integrate(1e9)


def test_when_and_where_recorded_scores_show_a_slash():
    def rows(*scores):
        return [{"step": 2 * at, "score_0": a, "score_1": b, "x": 9.0}
                for at, (a, b) in enumerate(scores)]  # fmt: skip

    inf = math.inf
    passes_twice = rows((0.1, 0.1), (0.2, 0.6), (0.7, 0.1), (0.1, 0.5), (0.0, 0.9))
    assert read_slash(passes_twice, 1, 0.5) == (6, 2, 1, 1)
    moves_on = rows((0.1, 0.1), (0.2, 0.6), (0.7, 0.1))
    assert read_slash(moves_on, 1, 0.5) == (inf, 2, 1, 0)
    assert read_slash(moves_on, 0, 0.5) == (4, 4, 1, 0)
    assert read_slash(rows((0.1, 0.4)), 1, 0.5) == (inf, inf, None, None)


def test_drawn_settings():
    drawn = theory.draw_settings(60, 3)
    assert drawn == theory.draw_settings(70, 3)[:60]
    assert drawn != theory.draw_settings(60, 4)
    assert len(set(drawn)) == 60
    assert {one.offset for one in drawn} == {1, 2, 3, 4}
    named = [one.frequencies for one in drawn if isinstance(one.frequencies, str)]
    assert set(named) == {"all", "high", "medium", "low"}
    assert 15 < len(named) < 45
    assert max(one.cone for one in drawn) > 1.8
    assert min(one.cone for one in drawn) < 0.2
    with pytest.raises(TheoryError, match="n is an integer"):
        theory.draw_settings(0, 1)


def test_a_comparison_resumes(tmp_path, monkeypatch):
    settings = [theory.Settings(**SMALL, steps=60, frequencies=band) for band in ("all", "low")]
    knobs = {"seeds": (0, 1), "progress": False}
    frame = theory.compare(settings, **knobs)
    assert frame["setting"].tolist() == [0, 0, 1, 1]
    assert frame["seed"].tolist() == [0, 1] * 2
    for row in frame.itertuples():
        setting = dataclasses.replace(settings[row.setting], seed=row.seed)
        assert row.measured_step == theory.train(setting, progress=False).time_to(0.5)
        found = theory.predict(setting)
        assert (row.predicted_step, row.fastest_rate) == (found.step, max(found.rates))
        assert row.closed_form_step == found.closed_form.step
        assert row.measured_first_step <= row.measured_step
    assert frame["measured_offset"].tolist()[:2] == [1, 1]
    assert frame["measured_offset"].isna().tolist()[2:] == [True, True]
    path = tmp_path / "compared.parquet"
    import slashpatch.theory.many_runs as module

    train, calls = module.train, []

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    monkeypatch.setattr(module, "train", dies)
    with pytest.raises(KeyboardInterrupt):
        theory.compare(settings, **knobs, path=path)
    with pytest.raises(SweepError, match="is of another run: its kappa"):
        theory.compare(settings, **knobs, path=path, resume=True, kappa=0.2)
    with pytest.raises(SweepError, match="is of another run: its runs"):
        theory.compare(settings[::-1], **knobs, path=path, resume=True)
    unfinished = tmp_path / "compared.parquet.unfinished"
    lines = unfinished.read_text()
    unfinished.write_text(lines.replace('"index": 1', '"index": 3'))
    with pytest.raises(SweepError, match="line 3 of .* is no row of this run"):
        theory.compare(settings, **knobs, path=path, resume=True)
    unfinished.write_text(lines + '{"ind')  # killed while it wrote a line
    again = theory.compare(settings, **knobs, path=path, resume=True)
    assert len(calls) == 3 + 2
    pd.testing.assert_frame_equal(again, frame)
    pd.testing.assert_frame_equal(pd.read_parquet(path), frame)


@pytest.mark.parametrize(
    ("settings", "seeds", "said"),
    [
        ([], (0,), "needs a list of Settings"),
        ([theory.Settings()], (), "at least one seed"),
        ([theory.Settings(optimizer="adam")], (0,), "derived for optimizer='gd'"),
        ([theory.Settings(steps=0)], (1, 1), "the same settings and seed"),
    ],
)
def test_refused_comparisons(settings, seeds, said):
    with pytest.raises(TheoryError, match=said):
        theory.compare(settings, seeds=seeds)


def compared(rows):
    """A table with the columns that agreement reads."""
    names = ["setting", "offset", "predicted_step", "measured_step", "predicted_offset",
             "measured_offset"]  # fmt: skip
    frame = pd.DataFrame(rows, columns=names)
    for by in ("measured", "predicted"):
        frame[f"{by}_first_step"] = frame[f"{by}_step"] / 2
        frame[f"{by}_final_offset"] = frame["measured_offset"]
    for name in ("step", "first_step", "offset", "final_offset"):
        frame[f"closed_form_{name}"] = frame[f"measured_{name}"]
    return frame


def test_agreement():
    inf, nan = math.inf, math.nan
    frame = compared(
        [
            (0, 1, 10.0, 10.0, 1.0, 1.0),
            (0, 1, 20.0, 40.0, 1.0, 1.0),
            (1, 2, 100.0, 100.0, 2.0, 3.0),
            (2, 1, 50.0, inf, 1.0, nan),
            (3, 1, inf, 30.0, nan, 1.0),
            (4, 1, inf, inf, nan, nan),
        ]
    )
    found = theory.agreement(frame, n_resamples=200).set_index("measure")
    value = found["value"]
    logs = [math.log(step) for step in (10, 40, 100)]
    mean = sum(logs) / 3
    total = sum((log - mean) ** 2 for log in logs)
    assert value["r2"] == pytest.approx(1 - math.log(2) ** 2 / total)
    assert value["median_error"] == 0
    assert (value["slash_right"], found["n"]["slash_right"]) == (pytest.approx(4 / 6), 6)
    assert (value["offset_right"], found["n"]["offset_right"]) == (pytest.approx(2 / 5), 5)
    assert value["offset_right_where_measured"] == pytest.approx(2 / 4)
    assert (value["task_offset"], found["n"]["task_offset"]) == (pytest.approx(3 / 4), 4)
    assert value["final_offset_right"] == 1
    assert value["r2_first"] == pytest.approx(value["r2"])
    cases = ("both", "predicted_only", "measured_only", "neither")
    assert [value[name] for name in cases] == [3, 1, 1, 1]
    assert found["low"]["slash_right"] < value["slash_right"] < found["high"]["slash_right"]
    closed = theory.agreement(frame, "closed_form", 10).set_index("measure")["value"]
    assert (closed["r2"], closed["offset_right"]) == (1, 1)
    nothing = theory.agreement(frame[5:], n_resamples=10).set_index("measure")["value"]
    assert math.isnan(nothing["r2"])
    assert math.isnan(nothing["offset_right"])
    with pytest.raises(TheoryError, match="by is 'predicted' or"):
        theory.agreement(frame, "other")
    with pytest.raises(TheoryError, match="no runs"):
        theory.agreement(frame[:0])
    with pytest.raises(TheoryError, match="it lacks measured_step, offset"):
        theory.agreement(frame.drop(columns=["offset", "measured_step"]))
    with pytest.raises(TheoryError, match="n_resamples is an integer"):
        theory.agreement(frame, n_resamples=0)
    one = theory.agreement(frame[1:2], n_resamples=2).set_index("measure")["value"]
    assert math.isnan(one["r2"])  # a single step has no variance
    assert one["median_error"] == 0.5


def test_wrong_predictions_have_bad_agreement():
    steps = [10.0, 30.0, 100.0, 300.0, 900.0]
    turned = [(at, 1, said, seen, 2.0, 1.0)
              for at, (said, seen) in enumerate(zip(steps[::-1], steps, strict=True))]  # fmt: skip
    value = theory.agreement(compared(turned), n_resamples=20).set_index("measure")["value"]
    assert value["r2"] < -2
    assert value["median_error"] > 0.8
    assert value["offset_right"] == 0


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_agreement_of_a_table_read_back_is_the_same(tmp_path, suffix):
    rows = [(0, 1, 10.0, 12.0, 1.0, 1.0), (1, 1, 20.0, math.inf, 1.0, math.nan),
            (2, 2, math.inf, math.inf, math.nan, math.nan),
            (3, 2, 90.0, 60.0, 2.0, 2.0)]  # fmt: skip
    frame, path = compared(rows), tmp_path / f"compared.{suffix}"
    write_table(frame, path)
    again = getattr(pd, f"read_{suffix}")(path)
    found, expected = (theory.agreement(one, n_resamples=20) for one in (again, frame))
    pd.testing.assert_frame_equal(found, expected)
    assert expected.set_index("measure")["value"]["predicted_only"] == 1
