import contextlib
import io
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import slashpatch as sp
from slashpatch.bridge.sources import source_of
from slashpatch.bridge.workers.identity import (
    difference,
    difference_of_probes,
    identity,
    probe,
)
from slashpatch.bridge.workers.member import Member
from slashpatch.bridge.workers.options import Workers, as_workers
from slashpatch.bridge.workers.pool import WorkerPool
from slashpatch.bridge.workers.session import ray_session
from slashpatch.bridge.workers.shipping import ship
from slashpatch.bridge.workers.units import Units
from slashpatch.errors import ExtraError, WorkerError
from slashpatch.patching.worker_pool import worker_pool

from ..tiny import llama, random_tokens, tiny_model, tokenizer
from ..zoo import FAMILIES, zoo


def test_what_workers_may_be():
    assert as_workers(None) is None
    assert as_workers(3) == as_workers("3") == Workers(3, threads=1)
    assert as_workers(" 8x4") == Workers(8, threads=4)
    assert as_workers(Workers(2, gpus=0.5)).gpus == 0.5


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [0, -1, True, 1.5, "", "two", "0", "2x", "2x0", [2]])
def test_what_they_may_not_be(wrong):
    with pytest.raises(WorkerError, match=r"from 1; got|expected a number of workers"):
        as_workers(wrong)


@pytest.mark.usefixtures("unchecked")
def test_workers_with_wrong_options():
    for options, said in (({"threads": 0}, "threads of workers"), ({"gpus": -1}, "gpus of a")):
        with pytest.raises(WorkerError, match=said):
            Workers(2, **options)


def test_without_ray_the_extra_is_named(tiny, monkeypatch):
    monkeypatch.setattr("slashpatch.bridge.workers.options.find_spec", lambda name: None)
    for run in (sp.scan, sp.flow, sp.sweep, lambda m, **w: sp.measure(m, "KnockOut(L0H0, 1)", **w)):
        with pytest.raises(ExtraError, match=r"pip install 'slashpatch\[ray\]'"):
            run(tiny, workers=2)


def test_without_workers_ray_is_not_imported():
    code = (
        "import sys; from tests.tiny import tiny_model; import slashpatch as sp\n"
        "model = tiny_model(); sp.sweep(model, n_prompts=2, max_tokens=9); sp.scan(model)\n"
        "assert 'ray' not in sys.modules"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


@given(st.data())
def test_units_are_handed_out_in_order_and_finished_once(data):
    """Whatever is taken back, and whatever comes twice or late."""
    indexes = data.draw(st.lists(st.integers(-1, 30), unique=True, min_size=1))
    ahead = data.draw(st.none() | st.integers(0, 5))
    units, out, finished = Units(indexes, ahead), [], []
    while not units.finished:
        given_out = units.next()
        if given_out is not None:
            first = next(index for index in indexes if index not in finished)
            assert ahead is None or indexes.index(given_out) - indexes.index(first) <= ahead
            out.append(given_out)
        elif not out:
            raise AssertionError("nothing is out, and nothing is given out")
        if out and data.draw(st.booleans()):  # a worker dies
            units.take_back(out)
            out = []
        elif out and (given_out is None or data.draw(st.booleans())):
            done = out.pop(data.draw(st.integers(0, len(out) - 1)))
            assert units.finish(done)
            assert not units.finish(done)
            finished.append(done)
    assert sorted(finished) == sorted(indexes)
    assert units.next() is None


def test_what_is_taken_back_goes_first():
    units = Units([5, 3, 8, 1], None)
    assert [units.next(), units.next(), units.next()] == [5, 3, 8]
    units.finish(3)
    units.take_back([8, 3, 5])
    assert [units.next(), units.next(), units.next()] == [5, 8, 1]


@pytest.mark.parametrize("name", [name for name, f in FAMILIES.items() if not f.refused])
def test_an_object_that_was_sent_is_the_same_model(name):
    """In every family, also while it is patched: the same logits bit for bit, and no hooks."""
    pytest.importorskip("ray", reason="the extra ray is not installed")
    model, tokens = zoo(name), random_tokens(2, 11)
    with torch.no_grad():
        expected = model(tokens)
        with sp.patch(model, "AblateHeads(L0H0)"):
            model(tokens)
            sent = ship(model)
            here = identity(model)
    assert sent.source is None
    received = sent.unpack()
    with torch.no_grad():
        assert torch.equal(received(tokens), expected)
    assert difference(identity(model), identity(received)) == ""
    assert difference(here, identity(received)).startswith("its edits is none, expected AblateH")
    with sp.patch(received, "AblateHeads(L0H0)"):
        assert difference(here, identity(received)) == ""
        probe(received)
    pointers = {weight.data_ptr() for weight in model.original_model.parameters()}
    assert pointers.isdisjoint(w.data_ptr() for w in received.original_model.parameters())


@pytest.fixture
def saved(tmp_path):
    """A folder with a tiny Llama and its tokenizer."""
    llama(seed=3).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_loaded_model_is_loaded_again_from_its_source(saved, monkeypatch):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.chdir(saved.parent)
    model = sp.load("model", device="cpu", dtype="float64")
    sent = ship(model)
    assert (sent.pickled, sent.weights) == (b"", [])
    assert sent.source == {
        "model": str(saved),
        "dtype": "float64",
        "tokenizer": None,
        "trust_remote_code": False,
    }
    assert difference(identity(model), identity(sent.unpack())) == ""
    with torch.no_grad():
        next(model.original_model.parameters())[0] += 1
    assert source_of(model) is None  # the files do not have these weights
    assert difference(identity(model), identity(ship(model).unpack())) == ""


def test_a_model_object_has_no_source():
    assert source_of(tiny_model()) is None
    assert source_of(sp.load(llama(), tokenizer=tokenizer())) is None


def test_what_cannot_be_sent_is_refused(tiny):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    for inside, said in (
        (
            lambda: tiny.hooks([("blocks.1.hook_resid_pre", lambda x, hook: x)]),
            "is on blocks.1.hook_in",
        ),
        (lambda: torch.autocast("cpu", torch.bfloat16), "autocast is on"),
    ):
        with inside(), pytest.raises(WorkerError, match=said):
            ship(tiny)
    handle = tiny.blocks[1].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(WorkerError, match=r"a torch hook is on blocks\.1"):
        ship(tiny)
    handle.remove()
    ship(tiny)
    with sp.SlashMonitor(tiny), pytest.raises(WorkerError, match="a SlashMonitor is on the model"):
        worker_pool(tiny, Workers(2))
    with sp.fused(tiny), pytest.raises(WorkerError, match="leave sp.fused before"):
        worker_pool(tiny, Workers(2))


@pytest.mark.parametrize("fails", [False, True])
def test_a_session_of_ones_own_leaves_nothing(tmp_path, monkeypatch, fails):
    """Its log files stay only where something failed."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    folder = tmp_path / "session"
    folder.mkdir()
    ended = []
    monkeypatch.setattr(
        ray, "init", lambda **_: SimpleNamespace(address_info={"session_dir": str(folder)})
    )
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with contextlib.suppress(KeyError), ray_session(1, 1):
        assert not ended
        if fails:
            raise KeyError
    assert (ended, folder.exists()) == ([True], fails)


def test_a_session_draws_no_random_numbers_and_prints_nothing(monkeypatch, capsys):
    """Ray draws from Python's generator, and prints what its daemons say on stdout."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    from ray._private.worker import print_to_stdstream

    monkeypatch.setattr(
        ray, "init", lambda **_: SimpleNamespace(address_info={}, n=random.random())
    )
    monkeypatch.setattr(ray, "shutdown", random.random)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    said = {"lines": ["Task hello failed"], "pid": "raylet", "is_err": False, "ip": "1"}
    before = random.getstate()
    with ray_session(1, 1):
        assert random.getstate() == before
        print_to_stdstream(said, ignore_prefix=False)
    assert random.getstate() == before
    assert capsys.readouterr().out == ""
    print_to_stdstream({**said, "lines": ["of somebody else"]}, ignore_prefix=False)
    assert "of somebody else" in capsys.readouterr().out


def test_ray_that_starts_too_slowly_is_one_error(monkeypatch):
    """Ray raises an Exception of no class of its own then, with daemons left running."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    ended = []

    def init(**_):
        raise Exception("The current node timed out\nduring startup")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    monkeypatch.setenv("RAY_ADDRESS", "local")
    with (
        pytest.raises(WorkerError, match=r"current node timed out during startup$"),
        ray_session(1, 1),
    ):
        pass
    assert ended == [True]


def test_workers_that_do_not_start_are_told_once(tiny, monkeypatch, recwarn):
    """With what each needs, and what is free."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})
    pool = WorkerPool(tiny, Workers(2, threads=4))
    pool._reserved, pool._waiting_since = pool._options("cuda"), -1e9
    for _ in range(2):
        pool._say_if_none_starts()
    (told,) = recwarn.list
    assert "each needs 4 CPUs and 1 GPUs, and the cluster has free: {'CPU': 1.0}" in str(
        told.message
    )


def test_a_worker_that_cannot_be_asked_again_is_gone(tiny, monkeypatch):
    """Ray may refuse the call; the pool must not wait for the answer."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    pool = WorkerPool(tiny, Workers(2))
    pool._members = [Member(number, None, ready=True) for number in (1, 2)]
    work = Units([4, 5], None)

    def refuses(member):
        raise ray.exceptions.RayActorError

    monkeypatch.setattr(pool, "_greet", refuses)
    for member in list(pool._members):
        member.units["a"] = work.next()
    pool._lost(pool._members[0], "a", work, RuntimeError("it died"))
    assert [member.number for member in pool._members] == [2]
    assert work.next() == 4
    with pytest.raises(WorkerError, match="no worker is left; worker 2"):
        pool._lost(pool._members[0], "a", work, RuntimeError("it died"))


class Numbers:
    """Squares of the indexes and the worker's threads; unit `bad` raises."""

    def __init__(self, bad=None):
        self.bad = bad

    def start(self, model):
        def run(index):
            if index == self.bad:
                raise KeyError(f"unit {index}")
            return index**2, torch.get_num_threads(), len(model.blocks)

        return run


def test_one_pool_runs_several_jobs(cluster, tiny, monkeypatch):
    """In the order of the units where that is asked for; an error is that of the job."""
    import ray

    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120)
    monkeypatch.setattr("slashpatch.data.progress._stderr_shown", lambda: console)
    with WorkerPool(tiny, Workers(2)) as pool:
        found = dict(pool.run(Numbers(), range(20), "trying", show=True, n=[2] * 20, ahead=3))
        assert found == {index: (index**2, 1, 2) for index in range(20)}
        with pytest.raises(KeyError, match="unit 7") as raised:
            list(pool.run(Numbers(bad=7), range(20), "trying"))
        assert isinstance(raised.value.__cause__, WorkerError)
        assert "raise KeyError" in str(raised.value.__cause__)
        found = dict(pool.run(Numbers(), [9, 4, 11], "trying"))
        assert found == {index: (index**2, 1, 2) for index in (9, 4, 11)}
    assert not ray.is_initialized()
    assert all(word in shown.getvalue() for word in ("trying", "of 2 workers", "40/40"))


def test_a_worker_with_another_model_is_refused(cluster, saved):
    model = sp.load(saved, device="cpu")
    llama(seed=4).save_pretrained(saved)
    with WorkerPool(model, Workers(1)) as pool, pytest.raises(WorkerError) as raised:
        list(pool.run(Numbers(), range(4), "trying"))
    assert "worker 1 (process" in str(raised.value)
    assert "its fingerprint is" in str(raised.value)


def test_what_makes_another_model(saved):
    """The same weights with another rotation, dtype, edit or library; and the edit's numbers."""
    model = sp.load(saved, device="cpu")
    expected = identity(model)
    assert difference(expected, identity(sp.load(saved, device="cpu"))) == ""
    config = saved / "config.json"
    settings = json.loads(config.read_text())
    settings["rope_parameters"]["rope_theta"] = 5000.0
    config.write_text(json.dumps(settings))
    other = sp.load(saved, device="cpu")
    assert difference(expected, identity(other)).startswith("its configuration is")
    assert "its logits on a short prompt differ" in difference_of_probes(
        probe(model), probe(other), torch.float32
    )
    assert difference_of_probes(probe(model), probe(model) + 1e-6, torch.float32) == ""
    assert "its dtype is float64" in difference(
        {"dtype": "float32"}, identity(sp.load(saved, device="cpu", dtype="float64"))
    )
    assert difference(expected, {**expected, "torch": "1.0"}).startswith("its torch is 1.0, exp")
