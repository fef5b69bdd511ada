"""`--workers` on the commands that have it."""

import json

import pytest

SHORT = ("--prompts", 2, "--max-tokens", 13, "--json")


def test_sweep_in_workers_prints_what_one_process_prints(cluster, call, model):
    """The model is loaded by each worker from the directory."""
    alone = json.loads(call("sweep", "-m", model, "--device", "cpu", *SHORT)[1])
    code, out, err = call("sweep", "-m", model, "--device", "cpu", "--workers", "2", *SHORT)
    assert code == 0, err
    shared = json.loads(out)
    assert shared["effects"] == alone["effects"]
    assert shared["provenance"] == {**alone["provenance"], "workers": 2, "threads": 1}


@pytest.mark.parametrize(
    ("command", "home"),
    [
        (("scan",), "scanning.scan.scan"),
        (("flow",), "effects.flow.flow"),
        (("measure", "-e", "KnockOut(L0H0, 1)"), "effects.measure.measure"),
        (("sweep",), "effects.sweep.sweep"),
        (("screen",), "effects.screen.screen"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_commands_hand_workers_on(call, model, monkeypatch, command, home):
    pytest.importorskip("ray", reason="the extra ray is not installed")

    class Seen(Exception):
        pass

    def run(*arguments, workers, **options):
        raise Seen(workers)

    monkeypatch.setattr(f"slashpatch.{home}", run)
    from slashpatch.cli import app as cli

    monkeypatch.setattr("sys.argv", ["slashpatch", *command, "-m", model, "--workers", "3x2"])
    with pytest.raises(Seen) as seen:
        cli.main()
    assert seen.value.args == ("3x2",)


def test_workers_are_checked_before_the_model_is_loaded(call, monkeypatch):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    code, _, err = call("sweep", "-m", "absent.gguf", "--workers", "two")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "expected a number of workers such as 4, or 4x2" in err
    monkeypatch.setattr("slashpatch.bridge.workers.options.find_spec", lambda name: None)
    code, _, err = call("flow", "-m", "absent.gguf", "--workers", "2")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "pip install 'slashpatch[ray]'" in err
