"""What `mkdocs build` does beside mkdocs.yml, so that docs/ reads well on a forge too.

Links that leave docs/ get the files that they name; the demos come in as notebooks; reference
pages, which are tables of names, get the docstrings of these names.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
#: Files of the site that mkdocs.yml names. The plugin `offline` looks for the name of the second.
_ASSETS = ("docs_build/site.css", "docs_build/iframe-worker.js")
_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")
_NAME = re.compile(r"(?<=^\| )`([\w.]*\w)`(?= \|)", re.MULTILINE)
#: Options of mkdocstrings for some names. `heads` is a function in a module of the same name.
_OPTIONS = {
    "heads.heads": "{heading: slashpatch.data.heads, toc_label: heads}",
    "theory": "{members: false}",
    "Edit": '{filters: ["!^_"]}',
}


def notebooks() -> list[str]:
    """Return the demos that are executed notebooks, or their scripts where they are not."""
    scripts = sorted((ROOT / "demos").glob("[0-9]*.py"))
    found = [path.with_suffix(".ipynb") for path in scripts]
    found = [path if path.exists() else script for path, script in zip(found, scripts, strict=True)]
    return [path.relative_to(ROOT).as_posix() for path in found]


def on_config(config: Any) -> Any:
    """Put the demos into the navigation."""
    for section in config.nav:
        if "Demos" in section:
            section["Demos"] += notebooks()
    return config


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: Any) -> Files:
    """Add the demos, and what pages of docs/ link to outside it."""
    wanted = {*_ASSETS, *notebooks()}
    for page in files.documentation_pages():
        wanted |= {path for path in _outside(page.src_uri, page.content_string) if path}
    # CONTRIBUTING.md is a page of the site whether or not another page links to it.
    for path in sorted(wanted | {"CONTRIBUTING.md"}):
        if files.get_file_from_path(path) is None:
            files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at the places that their files have in the site; add docstrings."""
    here = page.file.src_uri
    if here in notebooks():
        return markdown
    base = posixpath.dirname(here)

    def moved(match: re.Match[str]) -> str:
        path = _outside_docs(here, match[0])
        return match[0] if path is None else posixpath.relpath(path, base or ".")

    markdown = _LINK.sub(moved, markdown)
    if base != "reference" or here.endswith("commands.md"):
        return markdown
    names = dict.fromkeys(_NAME.findall(markdown))
    markdown = _NAME.sub(lambda name: f"[{name[0]}][slashpatch.{name[1]}]", markdown)
    for name in names:
        markdown += f"\n::: slashpatch.{name}\n    options: {_OPTIONS.get(name, '{}')}\n"
    return markdown


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Take scripts out of notebooks, which would load MathJax and Mermaid from a network."""
    if page.file.src_uri not in notebooks():
        return html
    return re.sub(r"<script\b.*?</script>", "", html, flags=re.DOTALL)


def _outside(page: str, markdown: str) -> list[str | None]:
    """Return the files outside docs/ that a page links to, from the repository's root."""
    return [_outside_docs(page, link) for link in _LINK.findall(markdown)]


def _outside_docs(page: str, link: str) -> str | None:
    """Return the file that a link names, from the repository's root; None if it is in docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    if page == "CONTRIBUTING.md" or path.startswith("docs/") or not (ROOT / path).is_file():
        return None
    demo = {posixpath.splitext(name)[0]: name for name in notebooks()}
    return demo.get(posixpath.splitext(path)[0], path)
