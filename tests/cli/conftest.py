"""A tiny model in a directory, and the command run in this process."""

import sys

import pytest

from slashpatch.cli import app as cli

from ..tiny import llama, tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model directory, as a user would name it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    llama(seed=0).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["slashpatch", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return run
