import contextlib
import io
import sys

import pytest

from slashpatch.data import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal_on_stderr(monkeypatch):
    """What is drawn on stderr, as if that were a terminal; pytest replaces it before each test."""
    drawn = Terminal()
    monkeypatch.setattr(sys, "stderr", drawn)
    monkeypatch.setenv("TERM", "xterm-256color")
    return drawn


@pytest.mark.parametrize("show", [None, False, True])
def test_the_bar_of_workers(monkeypatch, show):
    terminal = terminal_on_stderr(monkeypatch)
    with progress.WorkersBar("running", 3, 2, show) as bar:
        bar.alive(2)
        bar.advance(3)
    assert ("running" in terminal.getvalue()) == (show is not False)


def test_nothing_is_drawn_over_another_display(monkeypatch):
    terminal = terminal_on_stderr(monkeypatch)
    with progress.busy("loading"):
        assert list(progress.progress_over([1, 2], "outer")) == [1, 2]
    assert "outer" in terminal.getvalue()
    before = terminal.getvalue()
    with contextlib.suppress(KeyError), progress.without_progress():
        with progress.busy("loading"):
            assert list(progress.progress_over([1, 2], "inner", show=True)) == [1, 2]
        assert terminal.getvalue() == before
        raise KeyError
    list(progress.progress_over([1], "again"))
    assert "again" in terminal.getvalue()
