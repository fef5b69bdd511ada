"""The film of a run on text: what each frame shows, and files that are whole or not there."""

import shutil

import numpy as np
import pytest
from matplotlib.animation import FFMpegWriter
from matplotlib.colors import to_rgba
from PIL import Image

from slashpatch.errors import OutputError, PlotError, ScanError
from slashpatch.reporting import animation
from slashpatch.reporting.animation import Film, save_animation

from .text_runs import STEPS, text_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return text_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def film(run):
    return Film(run)


def test_the_gif_has_a_frame_for_each_step_and_stays_on_the_last(run, tmp_path):
    path = tmp_path / "run.gif"
    save_animation(run, path, frames_per_second=10)
    with Image.open(path) as shown:
        assert shown.n_frames == len(STEPS)
        assert shown.info["loop"] == 0
        durations, frames = [], []
        for index in range(shown.n_frames):
            shown.seek(index)
            durations.append(shown.info["duration"])
            frames.append(np.array(shown.convert("RGB")).astype(int))
    assert durations == [100] * (len(STEPS) - 1) + [3000]
    assert [path.name for path in tmp_path.iterdir()] == ["run.gif"]
    # The colours of the file are few, and near those of the picture.
    assert np.abs(frames[-1] - Film(run).frame(STEPS[-1]).astype(int)).mean() < 2


def test_the_caption_says_the_step_and_what_appeared_last(film):
    def said(step):
        film.turn(step)
        return film.caption.get_text()

    assert said(0) == "step 0"
    assert said(10) == "step 10"
    assert said(20) == "step 20   slash in L0H1 at Δ = 1 (half-way at step 15)"
    assert said(30) == said(20).replace("step 20", "step 30")
    assert said(40) == "step 40   L1H0 finds the earlier copy (half-way at step 35)"
    assert said(50) == "step 50   the copying loss falls (half-way at step 45)"


def test_heads_are_framed_while_they_slash_or_match(film):
    def marked(step):
        film.turn(step)
        found = {name: axis.get_title(loc="left") for name, axis in film.heads.items()}
        colors = {name: axis.spines["top"].get_edgecolor() for name, axis in film.heads.items()}
        return found, colors

    titles, colors = marked(10)
    assert list(titles.values()) == ["L0H0", "L0H1", "L1H0", "L1H1"]
    assert len(set(colors.values())) == 1
    titles, colors = marked(20)
    assert list(titles.values()) == ["L0H0", "L0H1 Δ=1", "L1H0", "L1H1"]
    assert colors["L0H1"] == to_rgba(animation._SLASH)
    titles, colors = marked(50)
    assert titles["L1H0"] == "L1H0 induction"
    assert colors["L1H0"] == to_rgba(animation._INDUCTION)
    assert colors["L0H1"] == to_rgba(animation._SLASH)
    titles, colors = marked(0)  # and back
    assert len(set(colors.values())) == 1


def test_a_higher_kappa_frames_no_slash(run):
    film = Film(run, kappa=0.8)
    film.turn(50)
    assert film.heads["L0H1"].get_title(loc="left") == "L0H1"


def test_patterns_are_those_of_the_step(film, run):
    film.turn(20)
    shown = film.heads["L1H1"].images[0].get_array()
    np.testing.assert_allclose(shown**2, run.patterns()[20][1, 1], atol=1e-6)
    film.turn(10)
    assert film.heads["L1H1"].images[0].get_array().max() == 0


def test_curves_are_drawn_up_to_the_step(film):
    film.turn(30)
    curves = {line.get_label(): line for line, _, _ in film._lines}
    slash = curves["slash, L0H1 Δ=1"]
    assert list(slash.get_xdata()) == [0, 10, 20, 30]
    assert list(slash.get_ydata()) == [0.03, 0.03, 0.7, 0.7]
    film.turn(50)
    assert list(curves["induction, L1H0"].get_ydata()) == [0.01] * 4 + [0.6] * 2
    assert list(curves["repeated random tokens"].get_ydata()) == [9.0] * 5 + [4.0]
    assert curves["held-out text"].get_ydata()[0] == 7.2
    assert [cursor.get_xdata() for cursor in film._cursors] == [[50, 50]] * 2


def test_nothing_moves_from_frame_to_frame(film):
    def places():
        return [axis.get_position().bounds for axis in film.figure.axes]

    film.frame(0)
    before = places()
    film.frame(50)
    assert places() == before


@pytest.mark.parametrize("name", ["run.png", "run", "run.GIF"])
def test_other_suffixes_are_refused(run, tmp_path, name):
    with pytest.raises(OutputError, match=r"ends in .gif, .mp4"):
        save_animation(run, tmp_path / name)


def test_arguments_that_make_no_film(run, tmp_path):
    path = tmp_path / "run.gif"
    with pytest.raises(PlotError, match="from 1 to 50; got 0"):
        save_animation(run, path, frames_per_second=0)
    with pytest.raises(ScanError, match="kappa"):
        save_animation(run, path, kappa=2.0)
    with pytest.raises(OutputError, match="no directory"):
        save_animation(run, tmp_path / "absent" / "run.gif")
    lacking = text_run(tmp_path / "lacking", STEPS[:-1])
    with pytest.raises(PlotError, match="no attention patterns of step 50"):
        save_animation(lacking, path)
    assert not path.exists()


def test_a_film_that_fails_leaves_the_old_file(run, tmp_path, monkeypatch):
    path = tmp_path / "run.gif"
    path.write_bytes(b"before")

    def fails(self, step):
        if step == 20:
            raise MemoryError
        return np.zeros((4, 4, 3), dtype=np.uint8)

    monkeypatch.setattr(Film, "frame", fails)
    with pytest.raises(MemoryError):
        save_animation(run, path)
    assert path.read_bytes() == b"before"
    assert [found.name for found in tmp_path.iterdir()] == ["run.gif"]


def test_without_ffmpeg_an_mp4_is_refused_before_anything_is_drawn(run, tmp_path, monkeypatch):
    monkeypatch.setattr(FFMpegWriter, "isAvailable", classmethod(lambda cls: False))
    monkeypatch.setattr(animation, "Film", None)
    with pytest.raises(PlotError, match=r"needs the program ffmpeg.*\.gif"):
        save_animation(run, tmp_path / "run.mp4")


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")
def test_an_mp4(run, tmp_path):
    path = tmp_path / "run.mp4"
    save_animation(run, path)
    assert path.read_bytes()[4:8] == b"ftyp"


def test_ffmpeg_that_fails_is_named_and_leaves_no_file(run, tmp_path, monkeypatch):
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\ncat > /dev/null\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(FFMpegWriter, "isAvailable", classmethod(lambda cls: True))
    monkeypatch.setattr(FFMpegWriter, "bin_path", classmethod(lambda cls: str(program)))
    with pytest.raises(OutputError, match="ffmpeg could not write"):
        save_animation(run, tmp_path / "run.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["ffmpeg"]
