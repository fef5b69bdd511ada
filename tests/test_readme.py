"""Every code block of the README runs as it stands."""

import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line for language, code in BLOCKS if language == "bash" for line in code.strip().splitlines()
]


def test_there_is_nothing_else_to_run():
    assert {language for language, _ in BLOCKS} == {"bash", "python"}
    assert len(PYTHON) == 4
    assert len(COMMANDS) == 11


@pytest.mark.real
@pytest.mark.parametrize("code", PYTHON, ids=["library", "effects", "hooks", "fused"])
def test_python_blocks_run(code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(code.strip().splitlines()) <= 12
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("command", [line for line in COMMANDS if line.startswith("make")])
def test_make_targets_exist(command):
    subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.real
@pytest.mark.parametrize("command", [line for line in COMMANDS if not line.startswith("make")])
def test_commands_run(command, tmp_path):
    program, *arguments = shlex.split(command)
    assert program == ".venv/bin/slashpatch"
    done = subprocess.run(
        [sys.executable, "-m", "slashpatch.cli", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout
    for option, name in itertools.pairwise(arguments):
        if option in ("--plot", "--out"):
            assert (tmp_path / name).stat().st_size > 0
