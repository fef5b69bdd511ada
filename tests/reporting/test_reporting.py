import math

import torch

import slashpatch as sp
from slashpatch.data.progress import Stages, busy, progress_over
from slashpatch.reporting.figures import losses_figure, save_figure, scan_figure
from slashpatch.reporting.live import show_live
from slashpatch.reporting.tables import heatmap, interval, number, plain, side_by_side, strongest
from slashpatch.reporting.words import marked_pair

from ..tiny import random_tokens


def test_heatmap_shades_by_score():
    scores = torch.tensor([[0.05, 0.15, 0.25], [0.45, 0.65, 0.95]])
    lines = plain(heatmap(scores, "title")).splitlines()
    assert lines[0] == "title"
    assert lines[1].split() == ["H0", "H1", "H2"]
    assert lines[2].split() == ["L0", "···", "░░░"]
    assert lines[3].split() == ["L1", "▒▒▒", "▓▓▓", "███"]


def test_heatmap_of_many_heads_is_narrow():
    lines = plain(heatmap(torch.full((2, 32), 0.9), "title")).splitlines()
    assert lines[2].count("█") == 32
    assert len(lines[2]) < 50


def test_side_by_side_when_there_is_room():
    one = heatmap(torch.rand(2, 3), "left")
    assert "left" in plain(side_by_side(one, one, 120)).splitlines()[0]
    assert (
        plain(side_by_side(one, one, 120)).count("\n") * 2
        < plain(side_by_side(one, one, 20)).count("\n") + 3
    )


def test_missing_numbers_are_dashes():
    assert number(math.nan) == interval(math.nan, math.nan) == "–"
    assert interval(0.1, 0.25) == "0.100 to 0.250"


def test_strongest_honours_the_least_offset(tiny):
    scan = sp.scan(tiny, random_tokens(2, 12), range(4))
    head, offset, score = strongest(scan, min_offset=1)
    assert offset >= 1
    assert score == float(scan.scores[:, :, 1:].max())
    assert score == float(scan.scores[head.layer, head.head, offset])


def test_differing_words_are_marked():
    top, bottom = marked_pair("the cat sat down", "the dog sat up", styled=False)
    assert top.plain == "the ⟦cat⟧ sat ⟦down⟧"
    assert bottom.plain == "the ⟦dog⟧ sat ⟦up⟧"
    styled, _ = marked_pair("a b", "a c")
    assert styled.plain == "a b"
    assert [styled.plain[span.start : span.end] for span in styled.spans] == ["b"]
    same, _ = marked_pair("same text", "same text", styled=False)
    assert same.plain == "same text"


def test_live_view_on_a_terminal():
    import io

    from rich.console import Console

    head = {"head": "L1H1", "offset": 1, "reads": "a", "weight": 0.9, "score": 0.5}
    steps = [{"token": "b", "at": "a", "position": 3, "heads": [head]}]
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    show_live("prompt", iter(steps), console)
    out = console.file.getvalue()
    assert "L1H1" in out
    assert "0.90" in out


def test_figures_are_drawn_and_saved(tiny, tmp_path):
    scan = sp.scan(tiny, random_tokens(2, 12), range(4))
    save_figure(scan_figure(scan, scan), tmp_path / "scan.png")
    save_figure(losses_figure({"a": [1.0, 2.0], "b": [3.0, 3.0]}, "title"), tmp_path / "a.pdf")
    assert (tmp_path / "scan.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_in_a_notebook_texts_are_texts_and_nothing_else_is_displayed(monkeypatch, capsys):
    """rich would display what it prints, whatever file it is given."""
    displayed = []
    monkeypatch.setenv("FORCE_COLOR", "1")  # as kernels do
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *what: displayed.append(what))
    assert plain("slash heads") == "slash heads"
    with busy("loading"), Stages("converting") as stages:
        stages.next("weights")
    assert not displayed
    assert capsys.readouterr().err == "converting: weights\n"


def test_a_notebook_shows_figures_as_pictures(tiny):
    scan = sp.scan(tiny, random_tokens(2, 12), range(4))
    first, again = scan.plot()._repr_png_(), scan.plot()._repr_png_()
    assert first.startswith(b"\x89PNG")
    assert first == again
    assert b"Software" not in first


def test_progress_yields_everything(capsys):
    assert list(progress_over([1, 2, 3], "counting", show=True, n=[5, 1, 2])) == [1, 2, 3]
    assert list(progress_over([1, 2], "counting", show=False)) == [1, 2]
    with Stages("title") as stages:
        stages.next("first")
    assert "title: first" in capsys.readouterr().err
