import itertools
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

import slashpatch as sp
from slashpatch.bridge.prefix_cache import PrefixCache
from slashpatch.data.journal import Journal, row
from slashpatch.effects.metrics.by_name import as_metric
from slashpatch.effects.running.conditions import conditions
from slashpatch.effects.running.evaluate import evaluate
from slashpatch.effects.running.evaluation import MetricRunner
from slashpatch.effects.running.inputs import prompts_for
from slashpatch.errors import (
    EditError,
    HeadError,
    MetricError,
    ModelError,
    OutputError,
    PromptError,
    SweepError,
)

from ..planted import induction_model
from ..tiny import random_tokens, tiny_model
from ..zoo import FAMILIES, zoo

SMALL = {"n_prompts": 3, "max_tokens": 13}


def naive(model, edits, metric="copying", prompts=None):
    """Mean effect of each edit, by patching and running the whole model."""
    runner = MetricRunner(model, [as_metric(metric)])
    chosen = prompts_for(model, runner.metrics, prompts, n_prompts=3, max_tokens=13, seed=0)
    clean, *values = evaluate(model, runner, chosen, conditions(edits))
    return [float((edited[0] - clean[0]).mean()) for edited in values]


@pytest.mark.parametrize("edit", ["KnockOut({head}, 1)", "FreezeBand({head}, high)"])
@pytest.mark.parametrize("ahead", [0, 2**30])
def test_a_sweep_is_the_naive_loop_bit_for_bit(edit, ahead, monkeypatch):
    """Also where the residual stream is not cached in the clean run but computed when needed."""
    monkeypatch.setattr("slashpatch.effects.every_head.run._AHEAD_BYTES", ahead)
    model = tiny_model(seed=1, layers=3)
    found = sp.sweep(model, edit, **SMALL).frame.sort_values(["layer", "head"])
    expected = naive(model, list(found["edit"]))
    assert found["effect"].tolist() == expected
    assert found["effect"].nunique() == 12
    shared = sp.sweep(model, edit, per_pass=3, **SMALL).frame.sort_values(["layer", "head"])
    assert shared["effect"].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", [name for name, f in FAMILIES.items() if not f.refused])
def test_a_prefix_cache_changes_nothing(name):
    """In every family, passes that skip earlier layers give the same logits, bit for bit."""
    model = zoo(name)
    tokens = random_tokens(2, 11)
    prefix = PrefixCache(model, tokens)
    kept = PrefixCache(model, tokens)
    with torch.no_grad():
        with kept.keeping(range(model.cfg.n_layers)):
            whole = model(tokens)
        for layer in range(model.cfg.n_layers):
            prefix.advance(layer)
            kept.advance(layer)
            with kept.skipped():
                assert torch.equal(model(tokens), whole)
            with prefix.skipped():
                assert torch.equal(model(tokens), whole)
            with prefix.skipped(2):
                twice = model(tokens.repeat(2, 1))
            torch.testing.assert_close(twice, whole.repeat(2, 1, 1), atol=1e-4, rtol=1e-4)
        assert torch.equal(model(tokens), whole)
    if model.cfg.n_layers > 1:
        with pytest.raises(ModelError, match="does not go back"):
            prefix.advance(0)


def test_offsets_and_functions_and_comparing_metrics(tiny):
    found = sp.sweep(
        tiny, "KnockOut({head}, {offset})", "L0H1, L1H0", "kl", offsets=[1, 2], **SMALL
    )
    assert sorted(found.frame["edit"]) == [
        f"KnockOut({head}, offsets={offset})" for head in ("L0H1", "L1H0") for offset in (1, 2)
    ]
    made = sp.sweep(
        tiny,
        lambda head, offset: sp.KnockOut(head, offset),
        "L0H1, L1H0",
        "kl",
        offsets=[1, 2],
        **SMALL,
    )
    pd.testing.assert_frame_equal(found.frame, made.frame)
    shared = sp.sweep(
        tiny,
        "KnockOut({head}, {offset})",
        "L0H1, L1H0",
        "kl",
        offsets=[1, 2],
        per_pass=4,
        batch_size=2,
        **SMALL,
    )
    pd.testing.assert_frame_equal(
        *(one.frame.sort_values("edit", ignore_index=True) for one in (found, shared)),
        atol=1e-5,
        rtol=1e-3,
    )
    assert (found.frame["baseline"] == 0).all()


def test_the_planted_heads_come_first():
    frame = sp.sweep(induction_model(), "AblateHeads({head})", n_prompts=8, max_tokens=41).frame
    assert set(frame["name"][:2]) == {"L0H0", "L1H2"}
    assert frame["effect"][1] > 2
    assert frame["effect"][2:].abs().max() < 0.01


def test_resuming(tmp_path, monkeypatch):
    model = tiny_model(seed=1)
    path = tmp_path / "sweep.parquet"
    whole = sp.sweep(model, path=tmp_path / "whole.parquet", **SMALL)
    run, done = MetricRunner.run, []

    def dies(self, batch, clean, label, hooks=(), from_layer=0):
        done.append(str(label))
        if len(done) == 5:
            raise KeyboardInterrupt
        return run(self, batch, clean, label, hooks, from_layer)

    monkeypatch.setattr(MetricRunner, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        sp.sweep(model, path=path, **SMALL)
    assert not any(point._forward_hooks for point in model.hook_points())
    unfinished = tmp_path / "sweep.parquet.unfinished"
    assert len(unfinished.read_text().splitlines()) == 1 + 4
    with pytest.raises(SweepError, match=r"unfinished run; resume it \(--resume"):
        sp.sweep(model, path=path, **SMALL)
    with open(unfinished, "a") as file:
        file.write('{"index": 7, "val')  # killed while it wrote
    again = sp.sweep(model, path=path, resume=True, **SMALL)
    done.remove("clean")  # once in each process, for what others are compared with
    assert done.count(done[3]) == 2  # the one that died
    assert sorted(done[:3] + done[4:]) == sorted({*done})
    assert len(done) == 1 + 9
    pd.testing.assert_frame_equal(again.frame, whole.frame)
    pd.testing.assert_frame_equal(sp.Result.load(path).frame, whole.frame)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["sweep.parquet", "whole.parquet"]
    done.clear()
    finished = sp.sweep(model, path=path, resume=True, **SMALL)
    assert done == []  # not even the clean run
    pd.testing.assert_frame_equal(finished.frame, whole.frame)


test_resuming = pytest.mark.filterwarnings("ignore")(test_resuming)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 1}, "its (prompts|seed) is"),
        ({"n_prompts": 4}, "its prompts is"),
        ({"metric": "copying-top1"}, "its metric is copying, here it is copying-top1"),
        ({"heads": "L0H1"}, "its swept is 8 edits"),
        ({"make_edit": "AblateHeads({head})"}, "its swept is 8 edits"),
        ({"model": tiny_model(seed=2)}, "its fingerprint is"),
    ],
    ids=["seed", "prompts", "metric", "heads", "edit", "model"],
)
@pytest.mark.parametrize("finished", [False, True])
def test_a_file_of_another_sweep_is_refused(tmp_path, changed, said, finished):
    path = tmp_path / "sweep.json"
    same = dict(model=tiny_model(seed=1), path=path, **SMALL)
    sp.sweep(**same)
    if not finished:
        record = sp.Result.load(path).provenance
        header = {"format": "slashpatch-sweep-1", **record}
        (tmp_path / "sweep.json.unfinished").write_text(json.dumps(header) + "\n")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(SweepError, match=said):
        sp.sweep(**{**same, **changed, "resume": True})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_files_that_are_no_sweep(tiny, tmp_path):
    (tmp_path / "sweep.json.unfinished").write_text("hello\n")
    with pytest.raises(SweepError, match="is no unfinished run"):
        sp.sweep(tiny, path=tmp_path / "sweep.json", resume=True, **SMALL)
    with pytest.raises(OutputError, match=r"ends in .parquet, .json"):
        sp.sweep(tiny, path=tmp_path / "sweep.csv", **SMALL)
    from filelock import FileLock

    inner = Journal(tmp_path / "other.json.unfinished", {}, False, [0], 1)
    with inner, pytest.raises(SweepError, match="another process is writing"):
        sp.sweep(tiny, path=tmp_path / "other.json", **SMALL)
    assert list(tmp_path.glob("other*")) == []
    assert FileLock(inner._lock.lock_file).acquire(timeout=0)


@pytest.mark.usefixtures("unchecked")
def test_bad_input(tiny):
    for wrong, error, said in (
        ({"make_edit": "KnockOut(L0H1, 1)"}, EditError, r"with \{head\}"),
        ({"make_edit": "KnockOut({head}, {offset})"}, EditError, r"without \{offset\}"),
        ({"offsets": [1]}, EditError, r"with \{offset\}"),
        ({"make_edit": 3}, EditError, "expected a text such as"),
        ({"make_edit": lambda head: None}, EditError, "make_edit returned None for L0H0"),
        ({"heads": "L7H0"}, HeadError, "L7H0 does not exist"),
        ({"metric": "loss-by-position"}, MetricError, "a metric with one number per prompt"),
        ({"per_pass": 0}, PromptError, "per_pass must be an integer of at least 1"),
        ({"heads": []}, HeadError, "no heads were given"),
        ({"make_edit": lambda: None}, EditError, "called with a head, but"),
        ({"confidence": 95}, MetricError, "confidence must be between 0 and 1"),
        ({"confidence": float("nan")}, MetricError, "confidence must be between 0 and 1"),
        ({"seed": 1.5}, MetricError, "seed must be an integer"),
    ):
        with pytest.raises(error, match=said):
            sp.sweep(tiny, **{**SMALL, **wrong})


@pytest.mark.parametrize(
    "line",
    [
        '{"index": 2, "values": [NaN, 1, 1]}',
        '{"index": 2, "values": [1, 1]}',
        '{"index": 2, "values": [true, 1, 1]}',
        '{"index": 2, "values": "123"}',
        '{"index": 0.7, "values": [1, 1, 1]}',
        '{"index": 9, "values": [1, 1, 1]}',
        '{"index": -1, "values": [1, 1, 1]}',
        json.dumps({**row(2, [1.0, 2.0, 3.0]), "values": [1.0, 2.0, 4.0]}),
        "[]",
    ],
)
def test_rows_that_are_none(tmp_path, line):
    """Rows after the header and the clean row: of another size, given twice, or no number."""
    path = tmp_path / "sweep.json"
    model = tiny_model(seed=1)
    sp.sweep(model, path=path, **SMALL)
    header = {"format": "slashpatch-sweep-1", **sp.Result.load(path).provenance}
    good = row(-1, [1.0, 2.0, 3.0])
    unfinished = tmp_path / "sweep.json.unfinished"
    unfinished.write_text("".join(f"{one}\n" for one in (*map(json.dumps, (header, good)), line)))
    with pytest.raises(SweepError, match="line 3 of .* is no row of this run"):
        sp.sweep(model, path=path, resume=True, **SMALL)


def test_a_refused_run_leaves_no_file(tiny, tmp_path):
    with pytest.raises(MetricError):
        sp.sweep(tiny, metric="loss-by-position", path=tmp_path / "a.json", **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_metrics_of_attention_below_and_above_the_edit():
    model = tiny_model(seed=1, layers=3)
    tokens = random_tokens(3, 12)
    for head in ("L0H1", "L1H1", "L2H3"):
        metric = sp.SlashScores(head, 2)
        for per_pass in (1, 3):
            found = sp.sweep(model, "KnockOut({head}, 1)", None, metric, tokens, per_pass=per_pass)
            rows = found.frame.set_index("edit")["effect"]
            expected = sp.measure(model, list(rows.index), metric, tokens).frame
            expected = expected.set_index("edit")["effect"][rows.index]
            assert rows.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert found.provenance["metric"] == "SlashScores(heads=(L2H3,), offset=2)"


def test_another_metric_of_the_same_kind_is_refused(tiny, tmp_path):
    tokens = random_tokens(3, 12)
    path = tmp_path / "a.json"
    sp.sweep(tiny, heads="L0H0", metric=sp.LogitDifference(5, 6), prompts=tokens, path=path)
    with pytest.raises(SweepError, match="its metric is LogitDifference"):
        sp.sweep(
            tiny,
            heads="L0H0",
            metric=sp.LogitDifference(7, 8),
            prompts=tokens,
            path=path,
            resume=True,
        )


def test_layers_that_cannot_take_the_edit_are_found_before_the_work(tmp_path):
    with pytest.raises(ModelError, match="layer 1 has no RoPE"):
        sp.sweep(zoo("SmolLM3"), "ShiftSlash({head}, 1)", path=tmp_path / "a.json", **SMALL)
    assert list(tmp_path.iterdir()) == []


_SERVER = """
import os, signal, sys
import torch
torch.set_num_threads(1)  # before anything runs: a fork keeps no other threads
import slashpatch as sp
from slashpatch.data.journal import Journal
from tests.tiny import tiny_model
model = tiny_model(seed=1, layers=6)
write = Journal.write

def killed_after(n_rows, in_a_line):
    left = [n_rows]
    def dies(self, rows):
        if left[0] == 0:
            if in_a_line and self._file is not None:
                self._file.write(b'{"index": 7, "val')
                self._file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        write(self, rows)
    return dies

for line in sys.stdin:
    path, n_rows, in_a_line = line.split()
    child = os.fork()
    if child == 0:
        Journal.write = killed_after(int(n_rows), in_a_line == "True")
        size = {"n_prompts": 2, "max_tokens": 13}
        sp.sweep(model, path=path, resume=True, progress=False, **size)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""
_ROWS = 1 + 6 * 4  # the clean run's, and one a head


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork, to start many runs at once")
@pytest.mark.parametrize(
    "n_kills", [8, pytest.param(200, marks=pytest.mark.exhaustive)], ids=lambda n: f"{n} kills"
)
def test_a_sweep_that_is_killed_goes_on(tmp_path, n_kills):
    """SIGKILL after chosen numbers of written rows, also in the middle of a line, until the file is
    there; then again. Each file is that of a run that nobody killed.
    """
    choices = random.Random(0)
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    ) as server:

        def run(path, n_rows, in_a_line=False):
            server.stdin.write(f"{path} {n_rows} {in_a_line}\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        whole = tmp_path / "whole.parquet"
        assert run(whole, 10**6) == 0
        expected = sp.Result.load(whole)
        kills = 0
        for attempt in itertools.count():
            path = tmp_path / f"{attempt}.parquet"
            unfinished = Path(f"{path}.unfinished")
            n_written = 0
            while kills < n_kills and n_written < _ROWS - 1:
                n_rows = choices.randint(0, _ROWS - 1 - n_written)
                in_a_line = choices.random() < 0.3
                assert run(path, n_rows, in_a_line) == int(signal.SIGKILL)
                kills += 1
                n_written += n_rows
                assert not path.exists()
                if n_written:
                    _, *lines = unfinished.read_text().splitlines(keepends=True)
                    indexes = [json.loads(one)["index"] for one in lines if one.endswith("\n")]
                    assert len(set(indexes)) == len(indexes) == n_written  # none lost, none twice
            assert run(path, 10**6) == 0
            found = sp.Result.load(path)
            pd.testing.assert_frame_equal(found.frame, expected.frame)
            assert found.provenance == expected.provenance
            if kills == n_kills:
                break
        server.stdin.close()
