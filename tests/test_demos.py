"""The demos run as scripts, at small settings; their notebooks hold the same cells, executed."""

import ast
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
import torch

from benchmarks import notebooks
from slashpatch.effects.statistics import interval

DEMOS = notebooks.scripts()
NOTEBOOKS = [demo.with_suffix(".ipynb") for demo in DEMOS]
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

#: What would differ on another machine.
_DRIFTS = re.compile(
    r"(/root|/home|/tmp|/work|/usr|/opt|C:\\)[/\\\w]|ipykernel_|0x[0-9a-f]{8}|\x1b"
)
_LARGEST = 300_000


@pytest.mark.real
@pytest.mark.parametrize("demo", DEMOS, ids=lambda path: path.stem)
def test_demo_runs_and_saves_its_figures_beside_it(demo, tmp_path):
    script = shutil.copy(demo, tmp_path)
    done = subprocess.run(
        [sys.executable, script, "--figures"],
        cwd=tmp_path,
        env={**os.environ, "SLASHPATCH_DEMO": "small"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert ("strongest slash" if demo.stem.startswith("07") else "L16H0") in done.stdout
    assert list(tmp_path.glob("*.png"))


def _cells(notebook):
    return [(cell.cell_type, cell.id, cell.source) for cell in notebook.cells]


@each_notebook
def test_notebook_holds_the_cells_of_its_script(path):
    made_again = "make demos writes the notebooks again"
    expected = notebooks.unexecuted(path.with_suffix(".py"))
    notebook = nbformat.read(path, as_version=4)
    assert _cells(notebook) == _cells(expected), made_again
    assert notebook.metadata == expected.metadata, made_again


@each_notebook
def test_notebook_was_executed_from_top_to_bottom_without_errors(path):
    code = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    kinds = {output.get("name", output.output_type) for cell in code for output in cell.outputs}
    assert kinds <= {"stdout", "execute_result", "display_data"}
    assert any("image/png" in o.get("data", {}) for cell in code for o in cell.outputs)


@each_notebook
def test_notebook_is_small_and_names_no_place(path):
    text = path.read_text(encoding="utf-8")
    assert len(text) < _LARGEST
    notebook = nbformat.reads(text, as_version=4)
    for cell in notebook.cells:
        assert not cell.metadata
        for output in cell.get("outputs", ()):
            shown = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
            assert not _DRIFTS.search(f"{output.get('text', '')}{shown}")


@each_notebook
def test_notebook_begins_with_a_title_and_a_paragraph(path):
    first = nbformat.read(path, as_version=4).cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# \S.*\n\n\S", first.source)


_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def _printed(notebook):
    return "".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "stream"
    )


@pytest.mark.real
@pytest.mark.exhaustive
def test_running_a_demo_again_prints_the_same_numbers():
    # The sixth, whose prompts don't depend on the version of Python.
    (path,) = [path for path in NOTEBOOKS if path.name.startswith("06")]
    before = _printed(nbformat.read(path, as_version=4))
    after = _printed(notebooks.executed(path.with_suffix(".py")))
    assert _NUMBER.sub("#", after) == _NUMBER.sub("#", before)
    numbers = [[float(n) for n in _NUMBER.findall(text)] for text in (before, after)]
    assert numbers[1] == pytest.approx(numbers[0], abs=0.04)  # 3 of 64 words


def _functions_of_the_sixth(*names):
    (script,) = [demo for demo in DEMOS if demo.name.startswith("06")]
    tree = ast.parse(script.read_text(encoding="utf-8"))
    tree.body = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name in names]
    space = {"torch": torch, "interval": interval}
    exec(compile(tree, script.name, "exec"), space)
    return space


@pytest.mark.parametrize(
    ("low", "random", "others", "said"),
    [
        (0.1, 0.95, 0.9, "This model shows the result."),
        (0.1, 0.5, 0.9, "in part"),
        (0.1, 0.95, 0.1, "in part"),
        (0.5, 0.5, 0.9, "does not show"),
        (0.9, 0.2, 0.9, "the opposite"),
    ],
)
def test_the_sixth_demo_can_say_yes_and_no(low, random, others, said):
    verdict = _functions_of_the_sixth("with_interval", "text_of", "verdict")["verdict"]
    noise = pd.Series([-0.05, 0.0, 0.05, 0.0] * 4)
    lines = verdict(1.0 + noise * 0, low + noise, random + noise.iloc[::-1].reset_index(drop=True),
                    others + noise.shift(1, fill_value=0.0))  # fmt: skip
    assert said in "\n".join(lines)
    assert "says nothing" in verdict(0.7 + noise, low + noise, random + noise, others + noise)[0]
