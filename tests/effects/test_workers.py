"""Sweep, measure and flow in workers: the numbers of one process, whatever is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slashpatch as sp
from slashpatch.effects.running.evaluate import _units
from slashpatch.errors import WorkerError

from ..tiny import random_tokens, tiny_model

ROOT = Path(__file__).parents[2]
SMALL = {"n_prompts": 3, "max_tokens": 13}


@pytest.fixture(scope="module")
def model():
    return tiny_model(seed=1, layers=4)


def last_logit(logits, tokens):
    """A metric of the user's own."""
    return logits[:, -1, 5]


def test_a_sweep_is_that_of_one_process(cluster, model):
    """Bit for bit, under patches that nest, and with passes that variants share."""
    alone = sp.sweep(model, "FreezeBand({head}, high)", None, last_logit, per_pass=3, **SMALL)
    shared = sp.sweep(
        model, "FreezeBand({head}, high)", None, last_logit, per_pass=3, workers=2, **SMALL
    )
    pd.testing.assert_frame_equal(shared.frame, alone.frame, check_exact=True)
    assert shared.provenance == {**alone.provenance, "workers": 2, "threads": 1}
    outer = [sp.SetFrequencies("L0H1", lambda theta: theta / 2), sp.FreezeBand("L0H1", "high")]
    inner = sp.AblateHeads("L1H0", "mean", ("the of a and", "is to in"))  # its mean is under outer
    with sp.patch(model, *outer), sp.patch(model, inner):
        patched = sp.sweep(model, metric="kl", **SMALL)
        in_workers = sp.sweep(model, metric="kl", workers=2, **SMALL)
    pd.testing.assert_frame_equal(in_workers.frame, patched.frame, check_exact=True)
    assert in_workers.provenance["edits"] == patched.provenance["edits"]


def test_a_screen_is_that_of_one_process(cluster, model):
    """Estimates and runs, in one pool of workers, also where batches are spread over them."""
    arguments = (model, "KnockOut({head}, {offset})", "L1-3", "loss", random_tokens(6, 13))
    options = {"offsets": [1, 2], "verify": 3, "audit": 2, "batch_size": 1}
    alone = sp.screen(*arguments, **options)
    shared = sp.screen(*arguments, workers=2, **options)
    pd.testing.assert_frame_equal(shared.frame, alone.frame, check_exact=True)
    assert shared.remarks == alone.remarks
    assert shared.provenance == {**alone.provenance, "workers": 2, "threads": 1}


def test_measure_is_that_of_one_process(cluster, model):
    """Also the draws of controls, and the values of each prompt."""
    metrics = ["loss", "kl", "slash", last_logit]
    edits = ["KnockOut(L0H1, 1)", "DropBand(L1H1, high)"]
    arguments = (model, edits, metrics, random_tokens(7, 13), "random-heads:2")
    alone = sp.measure(*arguments, batch_size=2)
    shared = sp.measure(*arguments, batch_size=2, workers=2)
    pd.testing.assert_frame_equal(shared.frame, alone.frame, check_exact=True)
    for name, table in alone.tables.items():
        pd.testing.assert_frame_equal(shared.tables[name], table, check_exact=True)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 30),
    st.booleans(),
    st.none() | st.integers(1, 40),
)
def test_the_units_of_a_measurement(sizes, n_runs, compares, at_least):
    """Each batch in each run once, no unit over two chunks, and enough units where that can be."""
    chunks, start = [], 0
    for size in sizes:
        chunks.append(range(start, start + size))
        start += size
    units = list(_units(chunks, n_runs, compares, at_least))
    passes = [(batch, run) for unit in units for batch in unit.batches for run in unit.runs]
    assert sorted(passes) == [(batch, run) for batch in range(start) for run in range(n_runs)]
    assert all(any(set(unit.batches) <= set(chunk) for chunk in chunks) for unit in units)
    if at_least is None:
        assert len(units) == len(chunks) * n_runs
    elif not compares:
        assert len(units) >= min(at_least, n_runs)


def test_flow_is_that_of_one_process(cluster, model):
    prompts = [row[:n] for row, n in zip(random_tokens(5, 20), (20, 11, 17, 20, 9), strict=True)]
    arguments = (model, prompts, ["KnockOut(L0H1, 1)"], range(1, 5))
    alone = sp.flow(*arguments, batch_size=3)
    shared = sp.flow(*arguments, batch_size=3, workers=2)
    pd.testing.assert_frame_equal(shared.frame, alone.frame, check_exact=True)
    assert shared.remarks == alone.remarks


class Killer:
    """The last logit; at a chosen row, one worker ends itself or its node, once or always.

    Attributes:
        folder: Where calls are counted, and where it is noted that a node was killed.
        row: The call of this process at which it kills; the first is the clean run's.
        kills: "worker", "node", or "each worker".
        node: The id of the node to kill; workers of others wait until it is killed.
    """

    __name__ = "killer"

    def __init__(self, folder, row, kills, node=None):
        self.folder, self.row, self.kills, self.node = Path(folder), row, kills, node

    def __call__(self, logits, tokens):
        with open(self.folder / "calls", "ab") as calls:
            calls.write(b".")
        with open(self.folder / f"calls-{os.getpid()}", "ab") as calls:
            calls.write(b".")
            mine = calls.tell()
        if self.node is not None and not (self.folder / "killed").exists():
            import ray

            if ray.get_runtime_context().get_node_id() != self.node:
                while not (self.folder / "killed").exists():
                    time.sleep(0.05)
                return last_logit(logits, tokens)
        if mine >= self.row:
            if self.kills != "each worker":
                try:
                    (self.folder / "killed").touch(exist_ok=False)
                except FileExistsError:
                    return last_logit(logits, tokens)
            # The parent of a worker is its node's raylet.
            os.kill(os.getppid() if self.kills == "node" else os.getpid(), signal.SIGKILL)
            time.sleep(600)  # until this process follows its node
        return last_logit(logits, tokens)


def rows_of(path):
    """The indexes in a journal, in the order of its lines."""
    _, *lines = path.read_text().splitlines()
    return [json.loads(line)["index"] for line in lines]


_long = pytest.mark.exhaustive


@pytest.mark.parametrize(
    ("kills", "row"),
    [
        ("worker", 6),
        ("node", 4),
        *(pytest.param("worker", row, marks=_long) for row in (1, 2, 11)),
        *(pytest.param("node", row, marks=_long) for row in (1, 2, 7)),
    ],
)
def test_a_worker_or_a_node_that_is_killed_costs_what_it_had_not_returned(
    cluster, model, tmp_path, kills, row, monkeypatch, capsys
):
    from slashpatch.data.journal import Journal

    written = []
    write = Journal.write
    monkeypatch.setattr(
        Journal, "write", lambda self, rows: (written.extend(rows), write(self, rows))[1]
    )
    node = cluster.second.node_id if kills == "node" else None
    metric = Killer(tmp_path, row, kills, node)
    path = tmp_path / "sweep.parquet"
    try:
        found = sp.sweep(model, metric=metric, path=path, workers=2, **SMALL)
    finally:
        if kills == "node":
            cluster.mend()
    expected = sp.sweep(model, metric=last_logit, **SMALL).frame
    pd.testing.assert_frame_equal(
        found.frame.drop(columns="metric"), expected.drop(columns="metric"), check_exact=True
    )
    assert (tmp_path / "killed").exists()
    assert capsys.readouterr().out == ""  # commands print results there
    assert sorted(written) == list(range(-1, 16))  # none lost, none twice
    processes = len(list(tmp_path.glob("calls-*")))
    # The rows, a clean run for each process, and what the killed one was at or had before it.
    assert (tmp_path / "calls").stat().st_size <= 16 + processes + 2


def test_workers_that_all_die_leave_a_journal(cluster, model, tmp_path, monkeypatch):
    monkeypatch.setattr("slashpatch.bridge.workers.pool._DEATHS", 2)
    path = tmp_path / "sweep.json"
    arguments = {"heads": "L0H0-3", "path": path, **SMALL}
    metric = Killer(tmp_path, 2, "each worker")
    with pytest.raises(
        WorkerError, match=r"unit 0 of this work has ended 2 workers, worker 1 \(pro"
    ):
        sp.sweep(model, metric=metric, workers=1, **arguments)
    assert rows_of(tmp_path / "sweep.json.unfinished") == [-1]
    monkeypatch.setattr(Killer, "__call__", lambda self, logits, tokens: last_logit(logits, tokens))
    found = sp.sweep(model, metric=metric, resume=True, **arguments).frame
    expected = sp.sweep(model, heads="L0H0-3", metric=last_logit, **SMALL).frame
    assert found["effect"].tolist() == expected["effect"].tolist()


_DRIVER = """
import os, signal, sys
import torch
torch.set_num_threads(1)
import slashpatch as sp
from slashpatch.data.journal import Journal
from tests.tiny import tiny_model
path, n_rows, workers, sent = sys.argv[1:]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
write, left = Journal.write, [int(n_rows)]

def dies(self, rows):
    if left[0] == 0:
        os.kill(os.getpid(), int(sent))
    left[0] -= 1
    write(self, rows)

Journal.write = dies
model = tiny_model(seed=1, layers=4)
sp.sweep(model, path=path, resume=True, workers=workers, n_prompts=3, max_tokens=13)
"""


def test_a_driver_that_is_killed_goes_on_with_any_number_of_workers(cluster, model, tmp_path):
    """By SIGKILL with two workers, then Ctrl-C with one, then without workers to its end."""
    path = tmp_path / "sweep.parquet"
    n_rows = 0
    for rows, workers, sent in ((5, "2", signal.SIGKILL), (4, "1", signal.SIGINT)):
        arguments = [str(path), str(rows), workers, str(int(sent))]
        done = subprocess.run(
            [sys.executable, "-c", _DRIVER, *arguments], cwd=ROOT, capture_output=True, text=True,
            check=False, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == -int(sent), done.stderr
        n_rows += rows
        found = rows_of(tmp_path / "sweep.parquet.unfinished")
        assert len(found) == len(set(found)) == n_rows
    found = sp.sweep(model, path=path, resume=True, **SMALL)
    expected = sp.sweep(model, **SMALL)
    pd.testing.assert_frame_equal(found.frame, expected.frame, check_exact=True)
    again = sp.sweep(model, path=path, resume=True, workers=2, **SMALL)  # no worker starts for it
    pd.testing.assert_frame_equal(again.frame, expected.frame, check_exact=True)


def test_an_error_in_a_worker_is_the_error_of_one_process(cluster, model):
    from slashpatch.errors import MetricError

    arguments = (model, "KnockOut({head}, 1)", "L0H0", lambda logits: logits.sum() / 0)
    with pytest.raises(MetricError) as alone:
        sp.sweep(*arguments, **SMALL)
    with pytest.raises(MetricError) as shared:
        sp.sweep(*arguments, workers=1, **SMALL)
    assert str(shared.value) == str(alone.value)
    assert torch.is_grad_enabled()
