"""The site of docs/ builds without a warning, needs no network, and has all pages and names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import slashpatch

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


@pytest.fixture
def scripts(monkeypatch):
    """The folder of the scripts that write pages, so that they can be imported."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def in_navigation():
    """The pages of docs/ that mkdocs.yml lists."""
    _, _, nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")
    return set(re.findall(r": ([\w/-]+\.md)$", nav, re.MULTILINE)) - {"CONTRIBUTING.md"}


def test_the_navigation_has_every_page():
    assert in_navigation() == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


def test_every_demo_is_listed():
    listed = (DOCS / "demos.md").read_text(encoding="utf-8")
    assert {path.stem for path in (ROOT / "demos").glob("[0-9]*.py")} == set(
        re.findall(r"\.\./demos/(\w+)\.(?:py|ipynb)", listed)
    )


def test_pages_and_pictures_are_in_the_site(site):
    assert {page.relative_to(DOCS).with_suffix(".html") for page in DOCS.rglob("*.md")} <= {
        page.relative_to(site) for page in site.rglob("*.html")
    }
    assert (site / "demos" / "02_why_a_slash.html").exists()
    assert "ShiftSlash" in (site / "search" / "search_index.js").read_text(encoding="utf-8")


def test_the_site_loads_nothing_from_a_network(site):
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img|iframe|source|video)\b[^>]*", html)
        assert not [tag for tag in loaded if re.search(r"(?:src|href)=.?(?:https?:)?//", tag)], page
        assert not re.search(r"import\(?\s*[\"']https?:|cdnjs|unpkg", html), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_opened_from_disk_are_searched_without_a_network(site, scheme, browser):
    problems = []
    context = browser.new_context(color_scheme=scheme, offline=True)
    with context:
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        # The search library warns of some queries that are still being typed.
        page.on("console", lambda said: said.type == "error" and problems.append(said.text))
        page.on("request", lambda sent: problems.append(sent.url))
        page.goto((site / "reference" / "edits.html").as_uri())
        page.keyboard.press("s")
        page.locator("input.md-search__input:focus").press_sequentially("ShiftSlash", delay=20)
        page.locator(".md-search-result__item").first.wait_for(timeout=60_000)
        assert "Gallery" in page.locator(".md-search-result__list").inner_text()
    assert not [what for what in problems if not what.startswith(("file:", "data:", "about:"))]


def test_the_reference_is_up_to_date(scripts):
    from reference import pages

    written = {page.name: page.read_text(encoding="utf-8") for page in DOCS.glob("reference/*")}
    assert written == pages(), "run `make reference`"


def test_the_reference_has_every_public_name(scripts):
    from reference import PAGES

    listed = [name for _, _, names in PAGES.values() for name in names.split()]
    assert set(slashpatch.__all__) <= set(listed)
    assert len(listed) == len(set(listed))


def test_the_gallery_has_every_edit(scripts):
    from gallery import ENTRIES, HEADER, SETUP

    from slashpatch.edits import EDITS

    page = (DOCS / "gallery.md").read_text(encoding="utf-8")
    assert [entry.name for entry in ENTRIES] == re.findall(r"^## (\w+)$", page, re.MULTILINE)
    assert {entry.name for entry in ENTRIES} == set(EDITS)
    assert page.startswith(HEADER.format(setup=SETUP))
    for entry in ENTRIES:
        _, _, rest = page.partition(f"## {entry.name}\n")
        section = rest.partition("\n## ")[0]
        assert f"](pictures/{entry.name}.png)" in section
        assert (DOCS / "pictures" / f"{entry.name}.png").stat().st_size > 0
        assert f"```text\n{entry.formula}\n```" in section
        assert f"```python\n{entry.code}\n```" in section
        assert len(entry.code.splitlines()) == 3


def test_the_gallery_is_small():
    assert sum(path.stat().st_size for path in DOCS.glob("pictures/[A-Z]*.png")) < 1_000_000
