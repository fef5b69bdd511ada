"""What results show in notebooks: small, escaped, without scripts, the same each time."""

import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch

import slashpatch as sp
from slashpatch import theory
from slashpatch.checking.result import Check, Report
from slashpatch.edits import EDITS
from slashpatch.reporting.notebook.svg import inline_svg
from slashpatch.reporting.style import new_figure, styled

from ..tiny import random_tokens
from . import samples

KINDS = (
    *("measure", "flow", "copying", "paths", "pairs", "direct", "persistence"),
    *("sweep", "screen", "dose", "circuit"),
)
#: Elements without an end tag in HTML.
VOID = {"br", "img"}


class Checked(HTMLParser):
    """Reads a piece of HTML; keeps its elements and its text, and fails where tags do not match."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.words = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def checked(result):
    """The HTML of a result, after tests that hold for all."""
    html = result._repr_html_()
    assert html == result._repr_html_()
    assert len(html) < 70_000
    found = Checked(html)
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "style", "link", "iframe", "object", "foreignobject", "img"}
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("href", "src", "xlink:href", "action"):
            value = attributes.get(name, "")
            assert not value or value.startswith("data:image/png;base64,") or value[1:] in ids
        for reference in re.findall(r"url\(#([^)]+)\)", " ".join(map(str, attributes.values()))):
            assert reference in ids
        if tag == "svg":
            assert attributes["role"] == "img"
            assert len(attributes["aria-label"]) > 20
    assert "#010203" not in html
    return found


def run(steps=20):
    return theory.train(theory.Settings(steps=steps, length=32), progress=False)


def check_report(model="tiny"):
    checks = [
        Check("hooks", "", "pass", "a"),
        *(Check("edits", f"KnockOut(L0H{head}, offsets=1)", "pass", "") for head in range(9)),
        Check("edits", "PlantSlash(L0H0)", "fail", "<b>differs</b>"),
        Check("fused", "no edit", "refused", "no"),
    ]
    return Report(tuple(checks), samples.origin(model))


def with_cosines(explanation, scan):
    return dataclasses.replace(
        explanation, cosines=scan.require_moments().cosines(explanation.head)
    )


def test_a_scan():
    found = checked(samples.scan())
    assert "L1H0 1 0.800" in found.text
    assert [tag for tag, _ in found.elements].count("svg") == 1
    assert "1 slash heads" in found.text


def test_a_scan_of_one_prompt_has_no_intervals():
    found = checked(samples.scan(n=1))
    assert "L1H0 1 0.800 –" in found.text


def test_a_long_table_says_how_many_rows_are_left_out():
    many = samples.scan(layers=4, heads=8)
    many.sums.fill_(0.5 * 4)
    assert f"and {4 * 8 * 8 - 10} more heads and offsets" in checked(many).text


@pytest.mark.parametrize("level", [0.0, 0.9])
def test_many_heads_stay_small(level):
    many = samples.scan(layers=32, heads=32, offsets=range(4), moments=False)
    many.sums.copy_(4 * (level + 0.1 * torch.rand(many.sums.shape, dtype=torch.float64)))
    checked(many)
    rows = [
        {"name": f"L{layer}H{head}", "layer": layer, "head": head, "effect": head - 16.0}
        for layer in range(32)
        for head in range(32)
    ]
    frame = pd.DataFrame(rows).assign(baseline=1.0, edited=1.0, low=-1.0, high=1.0, q=0.01, p=0.01)
    sweep = samples.result("sweep")
    checked(dataclasses.replace(sweep, frame=frame))


@pytest.mark.parametrize("kind", KINDS)
def test_a_result(kind):
    result = samples.result(kind)
    found = checked(result)
    assert "4 prompts (repeated random tokens)" in found.text
    assert "The edit raises the loss." in found.text
    assert [tag for tag, _ in found.elements].count("svg") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_without_rows_or_intervals(kind):
    result = samples.result(kind)
    empty = dataclasses.replace(result, frame=result.frame.iloc[:0], tables={})
    assert "no rows" in checked(empty).text
    ends = [name for name in result.frame if name.endswith(("low", "high")) or name in ("p", "q")]
    nan = float("nan")
    checked(dataclasses.replace(result, frame=result.frame.assign(**dict.fromkeys(ends, nan))))


def test_a_result_of_another_kind_is_a_plain_table():
    frame = pd.DataFrame({"<i>": range(30), "b": ["<script>x</script>"] * 30})
    found = checked(sp.Result("dose", frame))
    assert "dose: 30 rows" in found.text
    assert "<script>x</script>" in found.text


def test_an_explanation_with_and_without_rope():
    scan = samples.scan()
    full = with_cosines(samples.explanation(of=scan), scan)
    found = checked(full)
    assert "L1H0 at Δ=1: RoPE-made slash" in found.text
    assert "drop high 0.020 2%" in found.text
    bare = dataclasses.replace(full, profile=None, cosines=[], dropped={}, frozen={}, pairs=[])
    found = checked(bare)
    assert "no RoPE" in found.text
    assert "drop high" not in found.text
    checked(dataclasses.replace(full, natural=0.0))


def test_an_explanation_with_many_pairs_stays_small():
    scan = samples.scan(d_head=256)
    checked(with_cosines(samples.explanation(of=scan), scan))


def test_a_check():
    found = checked(check_report())
    assert "10 pass, 1 refused, 1 fail" in found.text
    assert "<b>differs</b>" in found.text
    assert "no checks" in checked(Report((), samples.origin())).text


def test_a_training_run():
    found = checked(run())
    assert "Training run: copying, Δ=1, step 20" in found.text
    assert "nothing measured yet" in checked(dataclasses.replace(run(0), rows=[])).text


def test_a_training_run_shows_itself_without_a_model_library():
    code = (
        "import sys; from slashpatch import theory; "
        "theory.train(theory.Settings(steps=2, length=32), progress=False)._repr_html_(); "
        "assert not {'transformers', 'transformer_lens', 'altair'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_monitor_before_and_after_it_saw_something(tiny):
    monitor = sp.SlashMonitor(tiny, offsets=range(3))
    assert "has not run yet" in checked(monitor).text
    with monitor:
        tiny(random_tokens(2, 12))
    found = checked(monitor)
    assert "24 rows (tokens) so far, offsets 0–2" in found.text
    assert "tiny" in found.text


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_says_what_it_does(name):
    texts = {
        "AblateHeads": "AblateHeads((L0H0, L1H1))",
        "ScaleOffsets": "ScaleOffsets(L0H0, 1, 0.5)",
        "KnockOut": "KnockOut(L0H0, 1)",
        "KeepOnly": "KeepOnly(L0H0, (1, 2))",
        "ShiftSlash": "ShiftSlash(L0H0, by=1)",
        "DropBand": "DropBand(L0H0, high)",
        "FreezeBand": "FreezeBand(L0H0, low)",
        "SwapBands": "SwapBands(L0H0, high, low)",
        "ScaleBand": "ScaleBand(L0H0, high, 2)",
        "SetFrequencies": "SetFrequencies(L0H0, (1.0, 0.5))",
        "RankOne": "RankOne(L0H0)",
        "DropDirection": "DropDirection(L0H0)",
        "PlantSlash": "PlantSlash(L0H0, 1, 2.0)",
    }
    edit = sp.parse_edit(texts[name])
    found = checked(edit)
    assert str(edit) in found.text
    assert "L0H0" in found.text
    sentence = found.text.removeprefix(str(edit)).strip()
    assert re.match(r"[A-Z][^`]{30,}?\. \d heads?: ", sentence)


def test_an_edit_of_ones_own_and_of_many_heads():
    @dataclasses.dataclass(frozen=True, repr=False)
    class Mine(sp.KnockOut):
        pass

    @dataclasses.dataclass(frozen=True, repr=False)
    class Told(sp.Edit):
        """Do <b>nothing</b>. And no more."""

    assert "without a description" in checked(Mine("L0H0", 1)).text
    assert "Do <b>nothing</b>. 1 head: L0H0" in checked(Told("L0H0")).text
    assert "100 heads" in checked(Told([(0, head) for head in range(100)])).text


def test_hostile_texts_stay_text():
    hostile = samples.HOSTILE + " $\\frac{1}$ \x00\n"
    shown = re.sub(r"\s+", " ", samples.HOSTILE.split("\u202e")[0])
    scan = samples.scan(model=hostile + "\ud800", source=hostile)
    assert shown in checked(scan).text
    result = samples.result("measure", model=hostile)
    frame, draws = result.frame.assign(edit=hostile), result.tables["draws"].assign(edit=hostile)
    result = dataclasses.replace(
        result, frame=frame, tables={"draws": draws}, remarks=(hostile,) * 9
    )
    assert shown in checked(result).text
    for kind in KINDS[1:]:
        other = samples.result(kind, model=hostile)
        columns = {"edit": hostile, "metric": hostile, "reader": hostile, "patched": hostile}
        columns = {name: value for name, value in columns.items() if name in other.frame}
        details = {**other.provenance, "metric": hostile, "measured": [hostile]}
        frame = other.frame.assign(**columns)
        checked(dataclasses.replace(other, frame=frame, provenance=details))
    checked(samples.explanation(of=scan, model=hostile))
    assert shown in checked(check_report(hostile)).text
    for text in ("\u202e", "\u2066", "\x00", "\ud800"):
        assert text not in scan._repr_html_()


@styled
def _drawn(text="x"):
    figure = new_figure(2, 1)
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], "o-", label=text)
    axis.legend()
    return figure


def test_pictures_share_no_ids_and_follow_the_colour_of_the_page():
    one, other = inline_svg(_drawn, "one picture"), inline_svg(lambda: _drawn("y"), "another one")
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (one, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert "currentColor" in one
    assert inline_svg(_drawn, "one picture") == one
    assert inline_svg(_drawn, 'a "label" & <b>').count("&lt;b&gt;") == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_outputs_read_in_a_browser(opened, tmp_path, scheme):
    """No complaint, and all text is inside its block, which the page's colours reach."""
    scan = samples.scan()
    results = [scan, with_cosines(samples.explanation(of=scan), scan), check_report(), run()]
    results += [samples.result(kind) for kind in KINDS]
    colors = {"light": "background:#fff;color:#222", "dark": "background:#111;color:#ddd"}
    blocks = "".join(result._repr_html_() for result in results)
    path = tmp_path / "outputs.html"
    path.write_text(
        '<!doctype html><html lang="en" data-ready="all"><meta charset="utf-8"><title>outputs'
        f'</title><body style="{colors[scheme]}"><main>{blocks}</main></body></html>',
        encoding="utf-8",
    )
    page = opened(path)
    assert page.locator("svg[role=img]").count() == len(results) - 1
    pytest.importorskip("axe_playwright_python")
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page)
    serious = [
        (each["id"], [node["target"] for node in each["nodes"]][:3])
        for each in found.response["violations"]
        if each["impact"] in ("serious", "critical")
    ]
    assert serious == []
