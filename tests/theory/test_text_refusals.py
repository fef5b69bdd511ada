"""Runs on text that cannot be: refused by name, early, and without half a model."""

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slashpatch.errors import HeadError, ModelError, OffsetError, OutputError, TheoryError
from slashpatch.theory import TextSettings, train_text
from slashpatch.theory.text import training
from slashpatch.theory.text.changes import change_point
from slashpatch.theory.text.corpus import chosen, python_text
from slashpatch.theory.text.folder import alone, require_folder
from slashpatch.theory.text.model import CentredEmbeddings

TINY = {
    "layers": 2, "heads": 2, "d_model": 32, "d_mlp": 32, "vocabulary": 300, "length": 32,
    "batch_size": 4, "steps": 8, "every": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({"edits": ("KnockOut(L5H0, 1)",)}, HeadError, "L5H0 does not exist: the model has 2"),
        ({"edits": ("KnockOut(L0H1, 500)",)}, OffsetError, "offset 500 does not fit"),
        ({"edits": ("PlantSlash(L1H0, offset=1, strength=4.0)",), "positions": "learned"},
         ModelError, "layer 1 has no RoPE"),
        ({"threads": 0}, TheoryError, "threads is an integer"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_the_folder_is_made(knobs, error, message, tmp_path):
    with pytest.raises(error, match=message):
        train_text(tmp_path / "x", **{**TINY, **knobs})
    assert not (tmp_path / "x").exists()


def test_a_file_is_no_folder(tmp_path):
    path = tmp_path / "run"
    path.write_text("mine")
    with pytest.raises(OutputError, match="is a file; expected the name of a folder"):
        train_text(path, **TINY)
    assert path.read_text() == "mine"


def test_two_processes_do_not_train_in_one_folder(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    require_folder(tmp_path / "a", TextSettings(**TINY), resume=False)
    monkeypatch.setattr(training, "_train", lambda *_: pytest.fail("trains beside another process"))
    other = os.open(tmp_path / "a", os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(TheoryError, match="another process is training"):
            train_text(tmp_path / "a", resume=True, **TINY)
    finally:
        os.close(other)
    with alone(tmp_path / "a"):
        pass


def test_more_tokens_than_the_text_has_are_refused(tmp_path):
    settings = TextSettings(vocabulary=400)
    with pytest.raises(TheoryError, match=r"no more than 2\d\d tokens; got vocabulary=400"):
        training._tokenizer(tmp_path, ["a few words, a few words"], settings)
    assert list(tmp_path.iterdir()) == []


def test_too_few_held_out_sequences_are_refused():
    rows = torch.arange(80).reshape(40, 2)
    assert len(chosen(rows, 40).unique()) == 80
    assert chosen(rows, 5).equal(chosen(rows, 5))
    with pytest.raises(TheoryError, match="40 sequences of 2 tokens; expected 72 or more"):
        chosen(rows, 72)


def test_weights_that_are_not_finite_end_the_run(tmp_path, monkeypatch):
    """The Trainer alone would log the mean of earlier losses, and save the model."""

    class Spoiled(CentredEmbeddings):
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 2:  # the number of the step that ends next is 3
                kwargs["model"].get_input_embeddings().weight.data[7, 0] = math.nan

    texts = dict(list(python_text().items())[:60])
    monkeypatch.setattr(training, "python_text", lambda: texts)
    monkeypatch.setattr(training, "CentredEmbeddings", Spoiled)
    with pytest.raises(TheoryError, match=r"not finite at step 4; use a lower learning_rate"):
        train_text(tmp_path / "x", progress=False, centred=True, **TINY)
    assert not (tmp_path / "x" / "model").exists()
    assert not list((tmp_path / "x").glob("checkpoints/checkpoint-*"))


# Change points of odd curves


def test_gaps_in_a_curve_do_not_hide_its_change():
    nan = math.nan
    found = change_point(range(0, 80, 10), [0, 0, nan, 0, 1, nan, 1, nan], 0.2)
    assert (found.before, found.step, found.after) == (0, 35, 1)
    for values in ([nan, nan, nan], [1.0, nan, nan]):
        with pytest.raises(TheoryError, match="two or more measurements"):
            change_point(range(3), values, 0.2)


def test_a_dip_at_the_very_end_is_no_rise():
    rises = [0.3] * 20 + [1.0] * 20
    whole = change_point(range(40), rises, 0.2)
    dips = change_point(range(40), rises[:-1] + [0.0], 0.2)
    assert whole.step == 19.5
    assert 19 < dips.early < dips.step < dips.late < 20
    assert (dips.before, dips.after) == (0.3, 0.75)
    assert change_point([0, 10], [0.0, 1.0], 0.2).step == 5


@given(st.lists(st.floats(0, 1) | st.just(math.nan), min_size=2, max_size=60))
def test_change_points_agree_with_their_definition(values):
    known = [(step, value) for step, value in enumerate(values) if value == value]
    if len(known) < 2:
        return
    found = change_point(range(len(values)), values, 0.2)
    n_last = max(1, len(known) // 10)
    before = min(value for _, value in known[:-n_last])
    after = sum(value for _, value in known[-n_last:]) / n_last
    assert (found.before, found.after) == pytest.approx((before, after))
    if math.isnan(found.step):
        assert after - before < 0.2 + 1e-9
        return
    assert found.early <= found.step <= found.late
    while known[-1][1] < before + 0.75 * (after - before):
        known.pop()
    steps, levels = zip(*known, strict=True)
    middle = (before + after) / 2
    assert np.interp(found.step, steps, levels) == pytest.approx(middle, abs=1e-6)
    assert all(value >= middle - 1e-9 for step, value in known if step > found.step)
