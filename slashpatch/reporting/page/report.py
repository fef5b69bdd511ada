"""report(): write the results of one model as an interactive page, in one HTML file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from ...data.files import require_output, written_whole
from ...scanning.result import require_kappa
from .assets import page, require_extra
from .inputs import gather
from .payload import payload

SUFFIXES = (".html", ".htm")


def report(
    path: str | os.PathLike[str],
    scan: Any = None,
    random: Any = None,
    explanations: Any = (),
    results: Any = (),
    texts: Any = (),
    *,
    kappa: float = 0.1,
    title: str | None = None,
    command: str | None = None,
) -> Path:
    """Write an interactive report of one model as a single HTML file, and return its path.

    The page has the grid of all heads, a view of each head, texts with the keys that each token
    attends to, measured effects, and where everything comes from. It needs no network and no
    server: all data and the JavaScript of Vega-Lite are in the file. Nothing is run.

    Args:
        path: A file name that ends in .html.
        scan: A Scan, or the .safetensors file of one. With moments (`sp.scan`'s default) the page
            shows ranks, profiles and rotary pairs as well.
        random: A Scan of the same model and offsets on random tokens, or its file.
        explanations: Explanations, or .json files of them.
        results: Results of `measure`, `flow`, `copying`, `paths` or `sweep`, or their files.
        texts: What `sp.top_keys` returned, or its .safetensors files.
        kappa: The least score of a slash head that the page starts with; a slider changes it.
        title: Heading of the page; None: the model's name.
        command: What makes the report again, shown on the page.

    Raises:
        ExtraError: Without the extra `slashpatch[report]`.
        ReportError: For parts of different models, or of other classes.
        OutputError: If the file cannot be written. A failed write leaves no partial file.
        ScanError, OutputError: For files that are missing or damaged.
    """
    target = Path(path)
    require_kappa(kappa)
    require_output(target, SUFFIXES)
    require_extra()
    found = gather(scan, random, explanations, results, texts)
    data = payload(found, kappa)
    text = page(found, data, title, command)
    with written_whole(target) as file:
        file.write_text(text, encoding="utf-8", newline="\n")
    return target


def command_line() -> str:
    """Return the command that was typed, as a shell would read it."""
    import shlex

    return shlex.join(["slashpatch", *sys.argv[1:]])
