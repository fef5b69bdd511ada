"""Results as matplotlib figures and as Altair charts."""

import dataclasses
import io
import sys

import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure

import slashpatch as sp
from slashpatch.data import display
from slashpatch.errors import ExtraError, PlotError, ScanError
from slashpatch.reporting.style import printable, shortened

from ..tiny import random_tokens
from . import samples
from .test_notebook import KINDS, check_report, run, with_cosines

alt = pytest.importorskip("altair", reason="the extra report is not installed")
vlc = pytest.importorskip("vl_convert", reason="the extra report is not installed")


def results():
    scan = samples.scan()
    return {
        "scan": scan,
        "explanation": with_cosines(samples.explanation(of=scan), scan),
        "check": check_report(),
        "run": run(),
        **{kind: samples.result(kind) for kind in KINDS},
    }


@pytest.fixture(scope="module")
def made():
    return results()


def drawn(figure):
    """The figure's PNG; constrained layout complains of what does not fit."""
    file = io.BytesIO()
    figure.savefig(file)
    return file.getvalue()


def texts(figure):
    """All that is written in a figure."""
    import matplotlib.text

    drawn(figure)
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


@pytest.mark.filterwarnings("error:.*layout")
@pytest.mark.parametrize("name", ["scan", "explanation", "check", "run", *KINDS])
def test_both_backends(made, name):
    before = dict(rcParams)
    figure = made[name].plot()
    assert isinstance(figure, Figure)
    assert not [text for text in texts(figure) if "$" in text]
    assert drawn(figure).startswith(b"\x89PNG")
    assert drawn(made[name].plot("matplotlib")) == drawn(made[name].plot())
    assert dict(rcParams) == before
    chart = made[name].plot(backend="altair")
    assert isinstance(chart, alt.TopLevelMixin)
    spec = chart.to_json()
    assert chart.to_dict()["background"] == "white"
    assert "<svg" in vlc.vegalite_to_svg(spec)
    assert vlc.vegalite_to_png(spec).startswith(b"\x89PNG")


def test_a_scan_with_a_control_and_another_kappa(made):
    scan, control = made["scan"], samples.scan(seed=2, source="random text")
    figure = scan.plot(control=control, kappa=0.02)
    found = texts(figure)
    assert {"natural text", "random text"} <= set(found)
    assert any("0.02" in text for text in found)
    same = texts(scan.plot(control=scan))
    assert "natural text (control)" in same
    chart = scan.plot("altair", control=control, kappa=0.3)
    svg = vlc.vegalite_to_svg(chart.to_json())
    assert "random text" in svg
    assert chart.to_dict()["params"] == [{"name": "kappa", "value": 0.3}]


def test_a_monitor(tiny):
    monitor = sp.SlashMonitor(tiny, offsets=range(3))
    for _ in range(2):  # before and after it has seen something
        assert drawn(monitor.plot()).startswith(b"\x89PNG")
        assert "<svg" in vlc.vegalite_to_svg(monitor.plot("altair").to_json())
        with monitor:
            tiny(random_tokens(1, 8))


def test_an_explanation_without_rope(made):
    bare = dataclasses.replace(made["explanation"], profile=None, cosines=[], dropped={}, frozen={})
    assert len(bare.plot().axes) == 1
    assert "hconcat" not in bare.plot("altair").to_dict()


def test_a_forest_has_a_panel_for_each_metric_and_leaves_rows_out(made):
    one = made["measure"]
    import pandas as pd

    frame = pd.concat([one.frame, one.frame.assign(metric="loss")], ignore_index=True)
    both = dataclasses.replace(one, frame=frame)
    figure = both.plot(top=1)
    assert len(figure.axes) == 2
    assert "effect on loss (1 more rows)" in texts(figure)
    assert len(both.plot("altair").to_dict()["vconcat"]) == 2


def test_single_draws_are_in_the_forest(made):
    (axis,) = made["measure"].plot().axes
    (ticks,) = [line for line in axis.lines if line.get_alpha() == 0.6]
    assert list(ticks.get_xdata()) == pytest.approx([0.1, 0.15])
    spec = made["measure"].plot("altair").to_dict()
    assert "draws0" in str(spec)


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_without_rows_has_no_plot(kind):
    result = samples.result(kind)
    for backend in ("matplotlib", "altair"):
        with pytest.raises(PlotError, match=f"{kind} has no rows"):
            dataclasses.replace(result, frame=result.frame.iloc[:0]).plot(backend)


def test_results_that_have_no_plot(made):
    with pytest.raises(PlotError, match="no plot of a result of kind 'other'.*measure, flow"):
        dataclasses.replace(made["flow"], kind="other").plot()
    with pytest.raises(PlotError, match="no measurements yet"):
        dataclasses.replace(made["run"], rows=[]).plot()


@pytest.mark.parametrize("name", ["scan", "explanation", "check", "run", "flow"])
def test_another_backend_is_named_in_one_line(made, name):
    with pytest.raises(PlotError) as raised:
        made[name].plot("plotly")
    assert str(raised.value) == "backend must be one of matplotlib, altair; got 'plotly'"


@pytest.mark.parametrize("name", ["scan", "explanation", "check", "run", *KINDS])
def test_without_altair_one_line_says_what_to_install(made, name, monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(ExtraError, match=r"pip install 'slashpatch\[report\]'"):
        made[name].plot("altair")
    made[name].plot()
    made[name]._repr_html_()


@pytest.mark.parametrize("backend", ["matplotlib", "altair"])
def test_hostile_names_are_drawn_as_text(backend):
    hostile = samples.HOSTILE + " $\\frac{1}$ $"
    scan = samples.scan(model=hostile, source=hostile)
    result = samples.result("measure", model=hostile)
    result = dataclasses.replace(result, frame=result.frame.assign(edit=hostile, metric=hostile))
    for shown in (scan, result, check_report(hostile), samples.explanation(of=scan, model=hostile)):
        made = shown.plot(backend)
        if backend == "altair":
            assert "<script" not in vlc.vegalite_to_svg(made.to_json())
        else:
            assert any("<script>" in text for text in texts(made)) or shown is not scan


def test_a_subclass_looks_as_its_base_class():
    class Mine(sp.Result):
        pass

    made = samples.result("flow")
    mine = Mine(made.kind, made.frame, provenance=made.provenance)
    assert display.html(mine) == dataclasses.replace(made, remarks=())._repr_html_()


def test_labels_are_printable_and_short():
    assert printable("a\nb\u202e\ud800é") == "a\\nb\\u202e\\ud800é"
    assert shortened("x" * 60) == "x" * 47 + "…"
    assert shortened("short") == "short"


def test_arguments_that_make_no_plot():
    from . import samples

    scan = samples.scan()
    with pytest.raises(ScanError, match="kappa"):
        scan.plot(kappa=7.0)
    with pytest.raises(PlotError, match="control must be a scan of as many heads"):
        scan.plot(control=samples.scan(layers=2))
    with pytest.raises(PlotError, match="at least 1; got 0"):
        samples.result("measure").plot(top=0)


def test_heads_that_were_not_run_do_not_look_like_heads_without_effect(made):
    screen = made["screen"]
    assert any("grey: not run" in text for text in texts(screen.plot()))
    head = screen.frame.iloc[:1]
    of_all = dataclasses.replace(screen, frame=head)
    assert not any("not run" in text for text in texts(of_all.plot()))
