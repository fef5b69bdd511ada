"""The report's file: what it is made of, what is refused, what its data is."""

import base64
import gzip
import json
import re
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import slashpatch as sp
from slashpatch.errors import (
    ExtraError,
    OutputError,
    ReportError,
    ScanError,
    SlashpatchError,
)
from slashpatch.reporting.page.report import report
from slashpatch.reporting.page.scan_data import MOST_OFFSETS, number, shown_columns
from slashpatch.reporting.page.shown_text import UNSEEN, visible

from . import samples
from .test_notebook import KINDS

LIMIT = 3_000_000


def data_of(path):
    text = re.search(r'id="data">([^<]*)<', path.read_text()).group(1)
    return json.loads(gzip.decompress(base64.b64decode(text)))


def test_the_same_parts_make_the_same_bytes(tmp_path):
    parts = {"scan": samples.scan(), "explanations": [samples.explanation()]}
    one, two = (report(tmp_path / name, **parts).read_bytes() for name in ("1.html", "2.html"))
    assert one == two


def test_from_files_as_from_objects(tmp_path):
    parts = {
        "scan": samples.scan(),
        "random": samples.scan(seed=1, moments=False),
        "explanations": [samples.explanation()],
        "results": [samples.result("measure"), samples.result("sweep")],
        "texts": [samples.text()],
    }
    saved = {}
    for name, part in parts.items():
        suffix = ".json" if name in ("explanations", "results") else ".safetensors"
        several = part if isinstance(part, list) else [part]
        paths = [tmp_path / f"{name}{index}{suffix}" for index in range(len(several))]
        for one, path in zip(several, paths, strict=True):
            one.save(path)
        saved[name] = paths if isinstance(part, list) else paths[0]
    from_objects = data_of(report(tmp_path / "objects.html", **parts))
    from_files = data_of(report(tmp_path / "files.html", **saved))
    assert from_files == from_objects


def test_public_name_is_a_function_whatever_was_imported(tmp_path):

    assert callable(sp.report)
    assert sp.report(tmp_path / "r.html", scan=samples.scan()) == tmp_path / "r.html"


def test_scores_in_the_page_are_those_of_the_scan(tmp_path):
    scan = samples.scan()
    data = data_of(report(tmp_path / "r.html", scan=scan))
    got = torch.tensor(data["scores"]["natural"]["score"]).reshape(scan.scores.shape)
    torch.testing.assert_close(got.double(), scan.scores, atol=1e-6, rtol=0)
    low, high = scan.intervals()
    for name, expected in (("low", low), ("high", high)):
        got = torch.tensor(data["scores"]["natural"][name]).reshape(expected.shape)
        torch.testing.assert_close(got.double(), expected, atol=6e-4, rtol=0)


def test_amplitudes_and_phases_add_up_to_the_prediction(tmp_path):
    """Σ A_l cos(θ_l Δ + φ_l), from the page's own numbers, is the page's predicted logit."""
    data = data_of(report(tmp_path / "r.html", scan=samples.scan()))
    wavelength = torch.tensor(data["pairs"]["layers"][1]["wavelength"])
    for index in (4, 7):
        pairs, profile = data["pairs"]["heads"][index], data["profile"]["heads"][index]
        amplitude, phase = (torch.tensor(pairs[name]) for name in ("amplitude", "phase"))
        offsets = torch.arange(profile["offsets"])[:, None]
        logits = (amplitude * (2 * torch.pi / wavelength * offsets + phase).cos()).sum(-1)
        torch.testing.assert_close(logits, torch.tensor(profile["predicted"]), atol=0.05, rtol=0.02)


def test_a_large_model_fits(tmp_path):
    """32 × 32 heads of 128 dimensions, all kinds of results, a text of 4,096 tokens."""
    heads = [f"L{layer}H0" for layer in range(8)]
    large = {"layers": 32, "heads": 32, "kv": 8, "offsets": range(16)}
    path = report(
        tmp_path / "large.html",
        scan=samples.scan(**large, d_head=128),
        random=samples.scan(**large, moments=False, seed=1),
        explanations=[samples.explanation("L1H0", samples.scan(offsets=range(16)))],
        results=[samples.result(kind) for kind in KINDS],
        texts=[samples.text(4096, heads, top=5, offsets=range(16), scattered=True)],
    )
    assert path.stat().st_size < LIMIT


def test_results_that_are_damaged_are_refused(tmp_path):
    """Files that load as a Result, and lack what a page shows of it."""
    samples.result("sweep").save(tmp_path / "r.json")
    whole = json.loads((tmp_path / "r.json").read_text())

    def refused(change, words):
        record = json.loads(json.dumps(whole))
        change(record)
        (tmp_path / "changed.json").write_text(json.dumps(record))
        with pytest.raises(SlashpatchError, match=words):
            report(tmp_path / "r.html", scan=samples.scan(), results=[tmp_path / "changed.json"])
        assert not (tmp_path / "r.html").exists()

    refused(lambda r: r.update(kind="other"), "other|unknown kind")
    refused(lambda r: r.update(effects=[]), "result")
    refused(lambda r: [row.pop("effect") for row in r["effects"]], "result")
    refused(lambda r: r["effects"][0].update(effect="much"), "result")
    refused(lambda r: r["provenance"].update(prompts=[]), "result")
    refused(lambda r: r["effects"][0].update(layer=99), "heads that the scan's model has not")


def test_parts_that_contradict_one_another_are_refused(tmp_path):
    scan = samples.scan()
    with pytest.raises(ReportError, match="same prompts as scan="):
        report(tmp_path / "r.html", scan=scan, random=scan)
    with pytest.raises(ReportError, match="several explanations of L1H0"):
        report(tmp_path / "r.html", scan=scan, explanations=[samples.explanation()] * 2)
    with pytest.raises(ReportError, match="must be several of Explanation; got 5"):
        report(tmp_path / "r.html", scan=scan, explanations=5)


def test_names_that_are_no_text(tmp_path):
    """File names may hold half of a surrogate pair."""
    path = report(tmp_path / "r.html", scan=samples.scan(source="caf\udce9", model="a\ud800b"))
    assert data_of(path)["scores"]["natural"]["label"] == "caf⟨U+DCE9⟩"


def test_of_many_offsets_the_highest_are_kept(tmp_path):
    scan = samples.scan(offsets=range(200), moments=False)
    scan.sums[2, 1, 190] = 4 * 0.5
    columns = shown_columns(scan)
    assert len(columns) == MOST_OFFSETS
    assert set(scan.scores.nan_to_num(-1).flatten(0, 1).argmax(1).tolist()) <= set(columns)
    assert 190 in columns
    assert columns == sorted(columns)
    data = data_of(report(tmp_path / "r.html", scan=scan))
    assert data["offsets_left_out"] == 200 - MOST_OFFSETS


@pytest.mark.parametrize("part", ["random", "explanations", "results", "texts"])
def test_parts_of_another_model_are_refused(part, tmp_path):
    other = {"model": "another/model", "fingerprint": "0" * 64}
    wrong = {
        "random": samples.scan(moments=False, **other),
        "explanations": [samples.explanation(**other)],
        "results": [samples.result("flow", **other)],
        "texts": [samples.text(**other)],
    }[part]
    with pytest.raises(ReportError, match="of another model than the scan: another/model"):
        report(tmp_path / "r.html", scan=samples.scan(), **{part: wrong})
    assert list(tmp_path.iterdir()) == []


def test_wrong_parts_are_refused(tmp_path):
    with pytest.raises(ReportError, match="needs a scan"):
        report(tmp_path / "r.html")
    with pytest.raises(ReportError, match=r"results\[0\] must be a Result .* got Scan"):
        report(tmp_path / "r.html", scan=samples.scan(), results=[samples.scan()])
    with pytest.raises(ReportError, match="must have the offsets of the other scan"):
        report(tmp_path / "r.html", scan=samples.scan(), random=samples.scan(offsets=range(3)))
    with pytest.raises(ReportError, match="explanation is of L2H3"):
        small = samples.scan(layers=2, heads=2)
        report(tmp_path / "r.html", scan=small, explanations=[samples.explanation("L2H3")])
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_refused_and_nothing_is_written(tmp_path):
    samples.scan().save(tmp_path / "scan.safetensors")
    whole = (tmp_path / "scan.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "half.json").write_text('{"kind": "flow", ')
    for parts, error in (
        ({"scan": tmp_path / "half.safetensors"}, ScanError),
        ({"scan": tmp_path / "none.safetensors"}, ScanError),
        ({"scan": tmp_path / "scan.safetensors", "results": tmp_path / "half.json"}, OutputError),
        (
            {"scan": tmp_path / "scan.safetensors", "texts": tmp_path / "scan.safetensors"},
            ScanError,
        ),
        ({"scan": samples.scan(), "explanations": tmp_path / "half.json"}, SlashpatchError),
    ):
        with pytest.raises(error) as raised:
            report(tmp_path / "r.html", **parts)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize("name", ["r.txt", "nowhere/r.html", "folder"])
def test_unwritable_paths_are_refused(name, tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError):
        report(tmp_path / name, scan=samples.scan())


def test_an_existing_file_survives_a_failed_report(tmp_path):
    path = report(tmp_path / "r.html", scan=samples.scan())
    before = path.read_bytes()
    with pytest.raises(ReportError):
        report(path, scan=samples.scan(), results=[samples.result("flow", fingerprint="0")])
    assert path.read_bytes() == before


def test_without_the_extra_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    monkeypatch.setattr("slashpatch.reporting.page.assets.find_spec", lambda name: None)
    with pytest.raises(ExtraError, match=r"pip install 'slashpatch\[report\]'"):
        report(tmp_path / "r.html", scan=samples.scan())


def test_hostile_names_are_escaped_in_the_file(tmp_path):
    bad = {"model": samples.HOSTILE}
    text = report(
        tmp_path / "r.html",
        scan=samples.scan(**bad),
        title=samples.HOSTILE,
        command=samples.HOSTILE,
    ).read_text()
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert "\u202e" not in text


def test_nothing_in_the_file_is_fetched(tmp_path):
    """Neither links to styles, scripts or pictures, nor a policy that would allow them."""
    text = report(tmp_path / "r.html", scan=samples.scan()).read_text()
    page = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"(src|href)=[\"'](?!#|data:)", page)
    assert "default-src 'none'" in page
    assert page.count("'sha256-") == 2


@given(st.floats() | st.integers() | st.none() | st.booleans() | st.text(), st.integers(1, 6))
def test_numbers_are_rounded_to_digits(value, digits):
    got = number(value, digits)
    json.dumps(got, allow_nan=False)
    if isinstance(value, float) and got is not None:
        assert got == pytest.approx(value, rel=10 ** (1 - digits), abs=1e-300)


@given(st.text())
def test_visible_text_has_no_control_characters(text):
    import unicodedata

    shown = visible(text)
    assert not any(unicodedata.category(char) in UNSEEN for char in shown)
    assert visible(shown) == shown
