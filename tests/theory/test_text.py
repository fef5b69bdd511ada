"""Training on text: settings, the corpus, change points, and runs that are killed and go on."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slashpatch as sp
from slashpatch import bridge
from slashpatch.errors import SlashpatchError, TheoryError
from slashpatch.theory import TextRun, TextSettings, train_text
from slashpatch.theory.text.changes import change_point, changes
from slashpatch.theory.text.corpus import Sequences, python_text, split, windows, with_repeat
from slashpatch.theory.text.model import new_model

#: A run of a few seconds.
TINY = {
    "layers": 2, "heads": 2, "d_model": 32, "d_mlp": 32, "vocabulary": 300, "length": 32,
    "batch_size": 4, "steps": 8, "every": 2,
}  # fmt: skip
ALL = tuple(f"L{layer}H{head}" for layer in range(2) for head in range(2))


@pytest.fixture(scope="module")
def small_text():
    """The tests train on a part of the text, which tokenises in no time."""
    from slashpatch.theory.text import training

    patch = pytest.MonkeyPatch()
    texts = dict(list(python_text().items())[:60])
    patch.setattr(training, "python_text", lambda: texts)
    yield texts
    patch.undo()


@pytest.fixture(scope="module")
def run(small_text, tmp_path_factory):
    return train_text(tmp_path_factory.mktemp("run") / "a", progress=False, **TINY)


def test_a_run_leaves_all_it_promises(run):
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "model", "patterns", "random.parquet", "settings.json", "text.parquet", "tokenizer",
    ]  # fmt: skip
    assert run.text.steps == run.random.steps == (0, 2, 4, 6, 8) == tuple(run.patterns())
    assert run.text.measures == ("slash", "rank", "cone", "bands", "prefix", "copying")
    assert run.text.frame["eval_loss"].notna().all()
    first, last = run.text.frame["eval_loss"].iloc[[0, -1]]
    assert last < first
    patterns = run.patterns()[8]
    assert patterns.shape == (2, 2, 31, 31)
    assert patterns.sum(-1) == pytest.approx(torch.ones(2, 2, 31), abs=31 / 255)
    assert patterns.triu(1).abs().max() == 0


def test_the_model_of_a_run_is_the_trained_one(run):
    model = run.model()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        loss = model(ids, return_type="loss")
    assert float(loss) < math.log(300) + 0.5
    scan = sp.scan(model, n_prompts=2, max_tokens=32, random_tokens=True)
    expected = run.random.scores[-1]
    again = sp.emergence(
        [run.model()], random_tokens=True, n_prompts=8, max_tokens=32, measures=()
    ).scores[-1]
    assert again == pytest.approx(expected, abs=1e-6)
    assert scan.scores.shape == (2, 2, 16)


def test_equal_settings_give_equal_weights(run, tmp_path):
    again = train_text(tmp_path / "b", progress=False, **TINY)
    assert weights(again) == weights(run)
    other = train_text(tmp_path / "c", progress=False, **{**TINY, "seed": 1})
    assert weights(other) != weights(run)


def weights(run):
    return (run.folder / "model" / "model.safetensors").read_bytes()


KILLED_AT_STEP_10 = """
import json, os, signal, sys
from slashpatch.theory.text import patterns, training
texts = dict(list(training.python_text().items())[:60])
training.python_text = lambda: texts
write = patterns.PatternCallback._write
def write_and_die(self, model, step):
    write(self, model, step)
    if step == 10:
        os.kill(os.getpid(), signal.SIGKILL)
patterns.PatternCallback._write = write_and_die
training.train_text(sys.argv[1], progress=False, threads=1, **json.loads(sys.argv[2]))
"""


@pytest.mark.parametrize("edited", [False, True], ids=["plain", "edited"])
def test_a_killed_run_goes_on_bit_for_bit(small_text, tmp_path, edited):
    """SIGKILL after the first checkpoint, at step 8 of 16, and half a checkpoint left behind."""
    settings = {**TINY, "steps": 16, "centred": not edited}
    if edited:
        settings["edits"] = (f"KnockOut(({', '.join(ALL)}), offsets=1)",)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_text(whole, progress=False, threads=1, **settings)
    command = [sys.executable, "-c", KILLED_AT_STEP_10, str(killed), json.dumps(settings)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (killed / "model").exists()
    left = sorted((killed / "checkpoints").iterdir())
    assert left
    partial = killed / "checkpoints" / "checkpoint-14"
    partial.mkdir(exist_ok=True)
    (partial / "trainer_state.json").write_text("{")
    with pytest.raises(TheoryError, match="is not finished"):
        TextRun.load(killed)
    train_text(killed, progress=False, threads=1, resume=True, **settings)
    first, second = TextRun.load(whole), TextRun.load(killed)
    assert weights(first) == weights(second)
    for name in ("text", "random"):
        a, b = getattr(first, name).frame, getattr(second, name).frame
        assert a.equals(b), name


def test_a_folder_belongs_to_one_run(run, tmp_path):
    with pytest.raises(TheoryError, match="holds this run already"):
        train_text(run.folder, **TINY)
    assert train_text(run.folder, resume=True, **TINY).text.frame.equals(run.text.frame)
    with pytest.raises(TheoryError, match="whose d_mlp is 32, here it is 48"):
        train_text(run.folder, resume=True, **{**TINY, "d_mlp": 48})
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(TheoryError, match="something else"):
        train_text(tmp_path, **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"positions": "alibi"}, "positions is one of rope, learned"),
        ({"frequencies": "medium"}, "frequencies is one of all, high, low"),
        ({"positions": "learned", "frequencies": "low"}, "no RoPE"),
        ({"d_model": 100, "heads": 8}, "multiple of twice"),
        ({"centred": 1}, "centred is True or False"),
        ({"edits": "KnockOut(L0H0, 1)"}, "edits is a list"),
        ({"edits": ("KnockOut(L0H0 1)",)}, "expected an edit such as"),
        ({"steps": 0}, "steps is an integer"),
        ({"laters": 2}, "no setting laters"),
    ],
)
def test_settings_are_refused_by_name(knobs, message, tmp_path, unchecked):
    with pytest.raises(SlashpatchError, match=message):
        train_text(tmp_path / "x", **knobs)
    assert not (tmp_path / "x").exists()


def test_edits_print_as_they_parse():
    settings = TextSettings(edits=(sp.KnockOut(("L0H0", "L1H1"), 1),))
    assert settings.edits == ("KnockOut((L0H0, L1H1), offsets=1)",)
    assert TextSettings(**settings.to_dict()) == settings


@pytest.mark.parametrize(("frequencies", "highest", "lowest"), [
    ("all", 1.0, 1e-4), ("high", 1.0, 10 ** (-4 / 3)), ("low", 10 ** (-8 / 3), 1e-4),
])  # fmt: skip
def test_frequencies_are_those_of_the_named_third(frequencies, highest, lowest):
    model = sp.load(new_model(TextSettings(**{**TINY, "frequencies": frequencies})))
    theta = bridge.read(model).qk[0].rotary.inv_freq
    n = len(theta)
    assert float(theta[0]) == pytest.approx(highest, rel=1e-4)
    step = (lowest / highest) ** (1 / n)
    assert float(theta[-1]) == pytest.approx(highest * step ** (n - 1), rel=1e-3)


def test_centred_embeddings_have_no_mean(small_text, tmp_path):
    run = train_text(tmp_path / "c", progress=False, centred=True, **{**TINY, "steps": 2})
    _, plain = run, train_text(tmp_path / "p", progress=False, **{**TINY, "steps": 2})
    tokens = torch.tensor(Sequences_ids(small_text, run))
    share = torch.bincount(tokens, minlength=300).float() / len(tokens)
    for found, least, most in ((run, 0.0, 1e-5), (plain, 1e-4, 9.0)):
        embedding = found.model().embed.weight
        assert least <= float((share @ embedding).norm()) < most


def Sequences_ids(texts, run):
    from transformers import PreTrainedTokenizerFast

    from slashpatch.theory.text.corpus import token_ids

    tokenizer = PreTrainedTokenizerFast.from_pretrained(run.folder / "tokenizer")
    return token_ids(tokenizer, split(texts)[0]).tolist()


def test_learned_positions_have_no_bands(small_text, tmp_path):
    knobs = {**TINY, "steps": 2, "positions": "learned"}
    run = train_text(tmp_path / "g", progress=False, **knobs)
    assert run.text.measures == ("slash", "rank", "cone", "prefix", "copying")
    assert type(run.model().original_model).__name__ == "GPT2LMHeadModel"


def test_the_text_is_split_by_name_and_windowed(small_text):
    training, held_out = split(small_text)
    assert len(training) + len(held_out) == len(small_text)
    assert not set(training) & set(held_out)
    rows = windows(torch.arange(1, 101), 11)
    assert rows.shape == (10, 11)
    assert rows[:, 0].eq(0).all()
    assert rows[:, 1:].flatten().equal(torch.arange(1, 101))


@given(length=st.integers(32, 200), seed=st.integers(0, 1000))
def test_a_passage_comes_twice(length, seed):
    row = torch.arange(length)
    found = with_repeat(row, torch.Generator().manual_seed(seed))
    changed = (found != row).nonzero().flatten()
    first, last = int(changed[0]), int(changed[-1])
    size = last - first + 1
    assert length // 8 <= size <= (length - 1) // 2
    source = int(found[first])
    assert 1 <= source <= first - size
    assert found[first : last + 1].equal(row[source : source + size])


def test_sequences_depend_on_seed_and_number_only(small_text):
    rows = torch.randint(0, 300, (7, 32))
    settings = TextSettings(**{**TINY, "repeats": 0.5})
    data = Sequences(rows, settings)
    assert len(data) == 32
    again = Sequences(rows, settings)
    backwards = [again[i]["input_ids"] for i in reversed(range(32))][::-1]
    assert all(data[i]["input_ids"].equal(backwards[i]) for i in range(32))
    never = Sequences(rows, TextSettings(**{**TINY, "repeats": 0.0}))
    assert sum(not data[i]["input_ids"].equal(never[i]["input_ids"]) for i in range(32)) > 4


# Change points


def test_a_change_point_is_half_way():
    steps = range(0, 100, 10)
    found = change_point(steps, [0, 0, 0, 0, 0.5, 1, 1, 1, 1, 1], 0.2)
    assert (found.before, found.after) == (0, 1)
    assert (found.early, found.step, found.late) == (35, 40, 45)
    falling = change_point(steps, [7, 8, 9, 9, 7, 5, 5, 5, 5, 5], 1.0, falls=True)
    assert (falling.before, falling.after, falling.step) == (9, 5, 40)


def test_too_small_a_change_is_none():
    found = change_point([0, 1, 2, 3], [0.1, 0.2, 0.15, 0.2], 0.2)
    assert math.isnan(found.step)
    assert (found.before, found.after) == (0.1, 0.2)
    with pytest.raises(TheoryError, match="two or more"):
        change_point([0], [1.0], 0.1)


@given(st.integers(0, 2**31), st.floats(0.05, 0.95), st.floats(0.002, 0.2))
def test_change_points_of_sigmoids(seed, middle, width):
    steps = np.arange(0, 1001, 10)
    noise = np.random.default_rng(seed).normal(0, 0.005, len(steps))
    values = 1 / (1 + np.exp(-(steps / 1000 - middle) / width)) + noise
    found = change_point(steps.tolist(), values.tolist(), 0.2)
    if math.isnan(found.step):
        assert values[-10:].mean() - values.min() < 0.2
        return
    level = (found.before + found.after) / 2
    true = 1000 * (middle - width * math.log(1 / level - 1))
    assert abs(found.step - true) < 15 + 40 * width * 20
    assert found.early <= found.step <= found.late


def test_changes_say_which_head_feeds_the_induction_head(run):
    """Planted: L0H1 at Δ = 2 rises at step 3, L1H0 finds copies at 5, the loss falls at 7."""
    text, random = run.text, run.random
    frame, other = text.frame.copy(), random.frame.copy()
    late = {2: frame["step"] > 3, 5: frame["step"] > 5, 7: frame["step"] > 7}
    for table in (frame, other):
        for offset in range(16):
            table[f"score_{offset}"] = 0.05
        table.loc[(table["name"] == "L0H1") & late[2], "score_2"] = 0.9
        table.loc[(table["name"] == "L1H1") & (table["step"] > 1), "score_1"] = 0.95
    frame["prefix_matching"] = 0.01
    frame.loc[(frame["name"] == "L1H0") & late[5], "prefix_matching"] = 0.8
    frame["copying_loss"] = np.where(late[7], 2.0, 6.0)
    made = changes(sp.Emergence(frame, text.provenance), sp.Emergence(other, random.provenance))
    rows = made.set_index("quantity")
    assert rows.loc["strongest slash", ["head", "offset", "step"]].tolist() == ["L1H1", 1, 1]
    assert rows.loc["slash below induction", ["head", "offset", "step"]].tolist() == ["L0H1", 2, 3]
    assert rows.loc["the same on random tokens", "step"] == 3
    assert rows.loc["induction", ["head", "step"]].tolist() == ["L1H0", 5]
    assert rows.loc["copying loss", "step"] == 7
    assert Path(run.folder).exists()
