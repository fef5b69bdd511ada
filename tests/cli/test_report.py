"""`slashpatch report`: a page from a model or from files, and one line for bad input."""

import json
import sys

import pytest

import slashpatch as sp

from ..reporting import samples
from ..reporting.test_page import data_of

SMALL = ("--prompts", 2, "--max-tokens", 24, "--offsets", "0-3", "--device", "cpu", "--heads", 2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Results of a made-up model as files."""
    folder = tmp_path_factory.mktemp("saved")
    samples.scan().save(folder / "scan.safetensors")
    samples.scan(seed=1, moments=False).save(folder / "random.safetensors")
    samples.explanation().save(folder / "head.json")
    samples.result("measure").save(folder / "measure.json")
    samples.result("sweep").save(folder / "sweep.parquet")
    samples.text().save(folder / "text.safetensors")
    samples.result("flow", model="other/model", fingerprint="0").save(folder / "other.json")
    (folder / "damaged.json").write_text('{"kind": "flow", ')
    (folder / "damaged.safetensors").write_bytes(b"nothing")
    return folder


def test_a_page_of_a_model(call, model, tmp_path):
    out = tmp_path / "page.html"
    code, printed, err = call("report", "-m", model, "--out", out, *SMALL, "--seed", 3)
    assert (code, printed) == (0, f"wrote {out}\n"), err
    data = data_of(out)
    scan = sp.scan(sp.load(model), offsets=range(4), n_prompts=2, max_tokens=24, seed=3)
    assert data["shape"] == list(scan.scores.shape[:2])
    assert data["scores"]["natural"]["score"][0] == pytest.approx(
        scan.scores[0, 0].tolist(), abs=1e-4
    )
    strongest = dict.fromkeys(str(entry.head) for entry in scan.slash_heads())
    assert list(data["explanations"]) == list(strongest)[:2]
    assert [head["name"] for head in data["texts"][0]["heads"]] == list(strongest)[:2]
    assert len(data["texts"][0]["tokens"]) == 24
    assert f"slashpatch report -m {model} --out {out}" in out.read_text()


def test_a_page_of_a_model_with_what_is_known_of_it(call, model, tmp_path):
    """Saved results of the model go in; a head that was explained is not explained again."""
    found = sp.load(model)
    sp.explain(found, "L0H1", n_prompts=1, max_tokens=16).save(tmp_path / "head.json")
    sp.sweep(found, "KnockOut({head}, 1)", "L0H0, L0H1", n_prompts=2, max_tokens=24).save(
        tmp_path / "sweep.json"
    )
    (tmp_path / "own.txt").write_text("some words of my own")
    out = tmp_path / "page.html"
    files = ("--explanation", tmp_path / "head.json", "--result", tmp_path / "sweep.json")
    given = (*files, "--look-at", tmp_path / "own.txt", "--json", "--kappa", 0)
    code, printed, err = call("report", "-m", model, "--out", out, *SMALL, *given)
    assert (code, err) == (0, "")
    assert json.loads(printed) == {"path": str(out), "bytes": out.stat().st_size}
    data = data_of(out)
    assert "L0H1" in data["explanations"]
    assert len(data["sweeps"]) == 1
    assert "own.txt" in data["texts"][0]["source"]


def test_a_page_of_files_runs_no_model(call, saved, tmp_path, monkeypatch):
    monkeypatch.setattr("slashpatch.cli.report.load_bridge", None)
    out = tmp_path / "page.html"
    code, _, err = call(
        "report", "--out", out, "--scan", saved / "scan.safetensors",
        "--random", saved / "random.safetensors", "--explanation", saved / "head.json",
        "--result", saved / "measure.json", "--result", saved / "sweep.parquet",
        "--keys", saved / "text.safetensors", "--title", "my model",
    )  # fmt: skip
    assert code == 0, err
    data = data_of(out)
    assert list(data["explanations"]) == ["L1H0"]
    assert [result["kind"] for result in data["results"]] == ["measure", "sweep"]
    assert len(data["texts"]) == 1
    assert "<title>my model" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--scan", "{}/scan.safetensors", "--result", "{}/other.json"), "of another model than"),
        (("--scan", "{}/damaged.safetensors"), "damaged.safetensors"),
        (("--scan", "{}/scan.safetensors", "--result", "{}/damaged.json"), "damaged.json"),
        (("--scan", "{}/scan.safetensors", "--keys", "{}/scan.safetensors"), "scan.safetensors"),
        (("--scan", "{}/none.safetensors"), "no file"),
        (("--scan", "{}/scan.safetensors", "-m", "somewhere"), "no model is run, so --model"),
        (("--scan", "{}/scan.safetensors", "--prompts", "3"), "no model is run, so --prompts"),
        (("--random", "{}/random.safetensors"), "--random goes with --scan"),
        (("--offsets", "x"), "offset"),
        (("--kappa", "2"), "kappa"),
        (("--result", "{}/damaged.json"), "damaged.json"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(arguments, words, call, saved, tmp_path):
    out = tmp_path / "page.html"
    filled = [argument.format(saved) for argument in arguments]
    code, printed, err = call("report", "--out", out, *filled)
    assert (code, printed) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_results_of_another_model_are_refused_before_it_is_run(call, model, saved, tmp_path):
    files = ("--result", saved / "other.json")
    code, _, err = call("report", "-m", model, "--out", tmp_path / "page.html", *SMALL, *files)
    assert code == 2
    assert "results[0] is of another model than" in err
    assert "passes over each" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["page.pdf", "nowhere/page.html", "."])
def test_unwritable_paths(name, call, saved, tmp_path):
    code, _, err = call("report", "--out", tmp_path / name, "--scan", saved / "scan.safetensors")
    assert code == 2
    assert "cannot write" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["altair", "vl_convert", "jinja2"])
def test_without_the_extra(module, call, saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = call(
        "report", "--out", tmp_path / "page.html", "--scan", saved / "scan.safetensors"
    )
    assert code == 2
    assert "pip install 'slashpatch[report]'" in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
