"""Runs the demos, and writes each as a notebook beside its script.

`make demos` runs all; `python benchmarks/notebooks.py 05 06` only those whose names start so. A
notebook holds the script's cells and their outputs, and nothing that another run would change: no
times, no paths, no version of Python. A demo that fails or warns writes no notebook.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jupytext
import nbformat
from nbclient import NotebookClient

import slashpatch
from slashpatch.data.files import written_whole

DEMOS = Path(__file__).parents[1] / "demos"
#: tqdm warns where ipywidgets, which draw its bars, are not installed.
_WITHOUT_WIDGETS = "ignore:IProgress not found"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def scripts() -> list[Path]:
    """Return the demos' scripts, in order."""
    return sorted(DEMOS.glob("*.py"))


def unexecuted(script: Path) -> nbformat.NotebookNode:
    """Return a script's cells as a notebook without outputs."""
    notebook = jupytext.read(script, fmt="py:percent")
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    for number, cell in enumerate(notebook.cells, 1):
        cell.id, cell.metadata = f"cell-{number:02}", nbformat.NotebookNode()
    return notebook


def executed(script: Path) -> nbformat.NotebookNode:
    """Return a script's cells as a notebook with the outputs of running them.

    Raises nbclient's CellExecutionError if a cell fails, RuntimeError if one writes to stderr.
    """
    notebook = unexecuted(script)
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", record_timing=False)
    with tempfile.TemporaryDirectory() as folder:
        client.execute(cwd=folder, env={**os.environ, "PYTHONWARNINGS": _WITHOUT_WIDGETS})
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
            warned = [o.text for o in cell.outputs if o.get("name") == "stderr"]
            if warned:
                raise RuntimeError(f"{script.name} writes to stderr: {warned[0]}")
    return notebook


def _joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Return a cell's outputs, with the pieces in which its text arrived put together."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        before = joined[-1] if joined else {}
        if output.output_type == "stream" and before.get("name") == output.name:
            before["text"] += output.text
        else:
            joined.append(output)
    return joined


def main(names: list[str]) -> None:
    """Run the demos whose names start with one of `names`, or all, and write their notebooks."""
    slashpatch.load()  # so that no notebook shows its download
    for script in scripts():
        if not names or script.name.startswith(tuple(names)):
            print(script.name, flush=True)
            notebook = executed(script)
            with written_whole(script.with_suffix(".ipynb")) as file:
                nbformat.write(notebook, file)


if __name__ == "__main__":
    main(sys.argv[1:])
