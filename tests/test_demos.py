"""The demos run as scripts, at small settings."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

DEMOS = sorted((Path(__file__).parents[1] / "demos").glob("*.py"))


@pytest.mark.real
@pytest.mark.parametrize("demo", DEMOS, ids=lambda path: path.stem)
def test_demo_runs_and_saves_its_figures_beside_it(demo, tmp_path):
    script = shutil.copy(demo, tmp_path)
    done = subprocess.run(
        [sys.executable, script, "--figures"],
        env={**os.environ, "SLASHPATCH_DEMO": "small"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "L16H0" in done.stdout
    assert list(tmp_path.glob("*.png"))
