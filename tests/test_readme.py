"""Every code block of the README and of docs/ runs as it stands, and every link leads somewhere."""

import itertools
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [*PAGES, ROOT / "CONTRIBUTING.md"]
by_name = {"ids": lambda path: str(path.relative_to(ROOT))}


def blocks(page):
    """(language, code) of each fenced block of a page."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def prose(page):
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def of_language(wanted):
    """{page name: its blocks of a language}, of the pages that have any."""
    found = {
        str(page.relative_to(ROOT).with_suffix("")): [
            code for language, code in blocks(page) if language == wanted
        ]
        for page in PAGES
    }
    return {name: codes for name, codes in found.items() if codes}


PYTHON = of_language("python")
COMMANDS = {
    f"{page}.{number}-{shlex.split(line)[1]}": line
    for page, codes in of_language("bash").items()
    for number, line in enumerate("".join(codes).strip().splitlines(), 1)
}
MAKE = {name: line for name, line in COMMANDS.items() if line.startswith("make ")}
SLASHPATCH = {line: name for name, line in COMMANDS.items() if name not in MAKE}  # each once


@pytest.mark.parametrize("page", LINKED, **by_name)
def test_blocks_are_of_known_languages(page):
    assert {language for language, _ in blocks(page)} <= {"bash", "python", "text"}
    assert page.read_text().count("```") == 2 * len(blocks(page))


@pytest.mark.parametrize("codes", PYTHON.values(), ids=PYTHON)
def test_python_blocks_are_short(codes):
    assert all(len(code.strip().splitlines()) <= 15 for code in codes)


@pytest.mark.real
@pytest.mark.usefixtures("unchecked")  # as a reader runs them
@pytest.mark.parametrize("name", PYTHON)
def test_python_blocks_of_a_page_run_in_order(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = types.ModuleType("page")  # dataclasses look up the module that they are defined in
    monkeypatch.setitem(sys.modules, page.__name__, page)
    for number, code in enumerate(PYTHON[name], 1):
        exec(compile(code, f"{name}, block {number}", "exec"), vars(page))


@pytest.mark.parametrize("command", MAKE.values(), ids=MAKE)
def test_make_targets_exist(command):
    subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.real
@pytest.mark.usefixtures("unchecked")  # as a reader runs them
@pytest.mark.parametrize("command", SLASHPATCH, ids=SLASHPATCH.values())
def test_commands_run(command, tmp_path, monkeypatch, capsys):
    from slashpatch.cli.app import main

    program, *arguments = shlex.split(command)
    assert program == ".venv/bin/slashpatch"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["slashpatch", *arguments])
    with pytest.raises(SystemExit) as done:
        main()
    printed = capsys.readouterr()
    assert done.value.code == 0, printed.err
    assert printed.out
    for option, name in itertools.pairwise(arguments):
        if option in ("--plot", "--out"):
            assert (tmp_path / name).stat().st_size > 0


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


def test_the_readme_lists_every_command_and_edit():
    from slashpatch.cli.app import app
    from slashpatch.edits import EDITS

    rows = set(re.findall(r"^\| `(\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    commands = {command.callback.__name__ for command in app.registered_commands}
    commands |= {group.name for group in app.registered_groups}
    assert rows == {"slashpatch"} | commands | set(EDITS)


def anchors(page):
    """The names by which a forge links to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, **by_name)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


def test_every_page_and_picture_is_linked():
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page))
    }
    files = {path for path in (ROOT / "docs").rglob("*") if path.is_file()}
    assert files <= linked


def tree():
    """{path: what is said of it} of the tree of slashpatch/ in CONTRIBUTING.md."""
    code = next(code for _, code in blocks(ROOT / "CONTRIBUTING.md") if "slashpatch/" in code)
    found, parents = {}, []
    for line in code.rstrip().splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, about = line.strip().partition(" ")
        parents[depth:] = [name]
        assert "".join(parents) not in found, line
        found["".join(parents)] = about.strip()
    return found


def test_the_tree_in_contributing_is_the_packages():
    folder = ROOT / "slashpatch"
    modules = {path for path in folder.rglob("*.py") if path.name != "__init__.py"}
    top_level = {path for path in folder.iterdir() if path.is_file()}
    rooms = {path.parent for path in folder.rglob("*.py")}
    expected = {str(path.relative_to(ROOT)) for path in modules | top_level}
    expected |= {f"{room.relative_to(ROOT)}/" for room in rooms}
    assert set(tree()) == expected
    assert all(tree().values())
