"""A block of HTML for a notebook: a title, lines, pictures and tables, all escaped by Jinja."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..style import printable

if TYPE_CHECKING:
    from jinja2 import Template

#: Longest text of a cell or line.
_LONGEST = 600


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        columns: Titles of the columns.
        rows: Cells of each row.
        texts: Indices of the columns that are aligned on the left; the others hold numbers.
        caption: What the table shows.
        more: What is said below it of rows that are left out.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: tuple[int, ...] = (0,)
    caption: str = ""
    more: str = ""


@dataclass(frozen=True)
class Block:
    """What a notebook shows of a result, from top to bottom: title, lines, pictures, tables, notes.

    `pictures` are <svg> elements that `inline_svg` made; all else is text, and is escaped.
    """

    title: str
    lines: Sequence[str] = ()
    pictures: Sequence[str] = ()
    tables: Sequence[Table] = field(default=())
    notes: Sequence[str] = ()

    def html(self) -> str:
        """Return the block as HTML."""
        from markupsafe import Markup

        shown = Block(
            _text(self.title),
            [_text(line) for line in self.lines],
            [Markup(picture) for picture in self.pictures],
            [_table(table) for table in self.tables],
            [_text(note) for note in self.notes],
        )
        return _template().render(block=shown)


def _table(table: Table) -> Table:
    return Table(
        [_text(column) for column in table.columns],
        [[_text(cell) for cell in row] for row in table.rows],
        table.texts,
        _text(table.caption),
        _text(table.more),
    )


def _text(text: Any) -> str:
    """Return a text of printable characters, cut if it is long."""
    shown = printable(text)
    return shown if len(shown) <= _LONGEST else shown[:_LONGEST] + "…"


@functools.cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("slashpatch.reporting.notebook", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template("block.html.jinja")
