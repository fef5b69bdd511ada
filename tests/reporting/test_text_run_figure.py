"""The figure, the table and the HTML of a run on text."""

import dataclasses
import io

import pytest
from matplotlib.colors import to_hex

from slashpatch.errors import PlotError, ScanError
from slashpatch.scanning.emergence_result import Emergence

from .text_runs import STEPS, text_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return text_run(tmp_path_factory.mktemp("run"))


def still(run):
    """The run, but nothing ever changes in it."""

    def first(found):
        rows = found.frame[found.frame["step"] == STEPS[0]]
        n = len(rows)
        frame = found.frame.copy()
        for column in frame.columns:
            if column not in ("step", "checkpoint"):
                frame[column] = list(rows[column]) * (len(frame) // n)
        return Emergence(frame, found.provenance)

    return dataclasses.replace(run, text=first(run.text), random=first(run.random))


@pytest.mark.filterwarnings("error:.*layout")
def test_a_panel_for_each_kind_with_a_rule_where_it_changed(run):
    figure = run.plot()
    figure.savefig(io.BytesIO())
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles == [
        "slash score", "rank one (r1)", "cone (cosine to the mean)", "prefix matching",
        "loss (nats)",
    ]  # fmt: skip
    rules = [
        [line.get_xdata()[0] for line in axis.lines if list(line.get_ydata()) == [0, 1]
         and line.get_xdata()[0] == line.get_xdata()[1]]
        for axis in figure.axes
    ]  # fmt: skip
    # "slash below induction" is the strongest slash here, so it is drawn once.
    assert rules == [[15, 15], [15, 15], [15, 15], [35], [45]]
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == [
        "strongest slash, L0H1 Δ=1\nstep 15",
        "the same on random tokens, L0H1 Δ=1\nstep 15",
    ]
    natural, random = figure.axes[0].lines[0], figure.axes[0].lines[2]
    assert list(natural.get_ydata()) == [0.03, 0.03, 0.7, 0.7, 0.7, 0.7]
    assert list(random.get_ydata()) == [0.03, 0.03, 0.5, 0.5, 0.5, 0.5]


def test_the_band_goes_from_a_quarter_to_three_quarters(run):
    (band,) = run.plot().axes[3].patches
    assert band.get_x() == pytest.approx(32.5)
    assert band.get_width() == pytest.approx(5)
    assert to_hex(band.get_facecolor()) == to_hex(run.plot().axes[3].lines[0].get_color())


def test_where_nothing_changed_there_is_no_rule_and_the_words_say_so(run):
    same = still(run)
    figure = same.plot()
    assert all(len(axis.patches) == 0 for axis in figure.axes)
    labels = [text.get_text() for text in figure.axes[3].get_legend().get_texts()]
    assert labels[0].endswith("no change")
    assert "no change" in same.table()
    assert "15" not in same.table().replace("150", "")


def test_the_table_and_the_html_hold_the_changes(run):
    table = run.table()
    assert str(run) == table
    assert "training on text: 2 layers of 2 heads, 50 steps, seed 0" in table
    for quantity in run.changes()["quantity"]:
        assert quantity in table
    (row,) = [line for line in table.splitlines() if "strongest slash" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "strongest slash", "L0H1", "1", "0.03", "0.70", "15", "12 to 18",
    ]  # fmt: skip
    html = run._repr_html_()
    assert "<svg" in html
    assert "induction" in html
    assert "<script" not in html


def test_other_backends(run):
    alt = pytest.importorskip("altair", reason="the extra report is not installed")
    assert isinstance(run.plot("altair"), alt.TopLevelMixin)
    with pytest.raises(PlotError, match="backend must be one of"):
        run.plot("plotly")
    with pytest.raises(ScanError, match="kappa"):
        run.plot(kappa=2.0)
