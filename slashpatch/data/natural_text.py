"""Natural text that comes with Python: help topics and source code of the standard library."""

from __future__ import annotations

import importlib.util
from pathlib import Path

#: Standard-library modules whose source serves as code prompts.
_SOURCES = [
    "argparse",
    "ast",
    "bdb",
    "calendar",
    "cmd",
    "codecs",
    "configparser",
    "copy",
    "csv",
    "difflib",
    "doctest",
    "fractions",
    "ftplib",
    "gettext",
    "heapq",
    "inspect",
    "ipaddress",
    "locale",
    "mailbox",
    "optparse",
    "pathlib",
    "pdb",
    "pickletools",
    "platform",
    "pprint",
    "random",
    "shutil",
    "smtplib",
    "statistics",
    "string",
    "tarfile",
    "textwrap",
    "threading",
    "timeit",
    "trace",
    "turtle",
    "uuid",
    "wave",
    "zipfile",
]


def prose() -> list[str]:
    """Return the longer help topics of the Python documentation."""
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items()) if len(text) > 1500]


def code() -> list[str]:
    """Return the source code of standard-library modules."""
    texts = []
    for name in _SOURCES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin and spec.origin.endswith(".py"):
            texts.append(Path(spec.origin).read_text(encoding="utf-8", errors="replace"))
    return texts
