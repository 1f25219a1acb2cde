"""Tables and pages of results as plain data, and how they are written: Markdown and CSV.

A page is a list of sections; a section has text, tables and pictures. This module computes no figures: cells hold what
is shown, and beside it the number, its interval and unit for the forms that programs read.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from offramp.reporting.pictures import Picture

NONE = "–"
"""Text of a cell without a value."""


@dataclass(frozen=True)
class Column:
    """Heading of a column."""

    title: str
    unit: str = ""
    """Unit of `Cell.value`, for CSV; shown cells have units of their own."""
    is_text: bool = False
    """True for words, which are aligned to the left."""
    help: str = ""
    """Definition of the figure, and how it is measured."""


@dataclass(frozen=True)
class Cell:
    """One cell: the text that is shown, and the value behind it."""

    text: str
    value: float | str | None = None
    """Value in the unit of the column; None: the text is the value."""
    low: float | None = None
    """Lower end of the 95 % interval; None: there is none."""
    high: float | None = None
    detail: str = ""
    """Shown behind the text, in a lighter colour: an interval, such as "[1.2, 1.4]"."""
    is_best: bool = False
    """True: the best of its column, by a significant difference. It is printed in bold."""
    bins: tuple[int, ...] = ()
    """Histogram of the raw samples, which a page draws beside the text."""
    detectable: float | None = None
    """Smallest deviation from equality that this number of samples finds in 80 % of studies; of a paired comparison."""


@dataclass(frozen=True)
class Row:
    """One row. `label` is its place in a page, which pictures refer to; `name` is what it is of."""

    cells: tuple[Cell, ...]
    label: str = ""
    name: str = ""
    facts: str = ""
    """Further facts of its records, which a page shows where the pointer is: names and values, between semicolons."""
    command: str = ""
    """The command that measures it again."""
    kind: str = ""
    """`baseline`, `failed`, or nothing."""


@dataclass(frozen=True)
class Table:
    """A table with its caption and notes. `name` is that of its file, and of its place in a page."""

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Section:
    """A part of a page, with a heading."""

    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Page:
    """A report. `facts` are pairs of a number and what it counts, for the head of the page."""

    title: str
    facts: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]

    @property
    def tables(self) -> list[Table]:
        """All tables of the page."""
        return [table for section in self.sections for table in section.tables]

    @property
    def pictures(self) -> list[Picture]:
        """All pictures of the page."""
        return [picture for section in self.sections for picture in section.pictures]


def table_of(name: str, title: str, columns: Sequence[Column], rows: Iterable[Sequence[object]],
             notes: Sequence[str] = ()) -> Table:  # fmt: skip
    """Return a table of cells, or of plain values, which are shown as they are; None is a cell without a value."""
    made = tuple(Row(tuple(map(cell_of, row))) for row in rows)
    return Table(name, title, tuple(columns), made, tuple(notes))


def cell_of(value: object) -> Cell:
    """Return a value as a cell."""
    return value if isinstance(value, Cell) else Cell(NONE if value is None else str(value))


def slug(text: str) -> str:
    """Return text as a name of a file or a place in a page: lower-case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].strip("-") or "table"


def to_markdown(page: Page) -> str:
    """Return all tables of a page as Markdown, below the headings of their sections."""
    lines = [f"# {_markdown_text(page.title)}", ""]
    for section in page.sections:
        if section.tables:
            lines += [f"## {_markdown_text(section.title)}", ""]
            lines += [part for text in section.text for part in (_markdown_text(text), "")]
            lines += [part for table in section.tables for part in (markdown(table), "")]
    return "\n".join(lines)


def markdown(table: Table) -> str:
    """Return a table as Markdown, with its title above and its notes below."""
    head = [_markdown_text(column.title) for column in table.columns]
    rule = ["---" if column.is_text else "---:" for column in table.columns]
    rows = [[_markdown_cell(cell) for cell in row.cells] for row in table.rows]
    lines = ["| " + " | ".join(line) + " |" for line in (head, rule, *rows)]
    notes = [part for note in table.notes for part in ("", _markdown_text(note))]
    return "\n".join([f"**{_markdown_text(table.title)}**", "", *lines, *notes])


def _markdown_cell(cell: Cell) -> str:
    shown = _markdown_text(cell.text)
    return f"{'**' + shown + '**' if cell.is_best else shown} {_markdown_text(cell.detail)}".strip()


def _markdown_text(text: str) -> str:
    """Return text that ends no cell and begins no markup."""
    return re.sub(r"([\\|*_`\[\]<>])", r"\\\1", printable(text)).replace("\\<", "&lt;").replace("\\>", "&gt;")


def to_csv(page: Page) -> str:
    """Return all tables of a page as CSV, each below a line with its title, and followed by an empty line."""
    return "\n".join(f"# {printable(table.title)}\n{comma_separated(table)}" for table in page.tables)


def comma_separated(table: Table) -> str:
    """Return a table as CSV: values without rounding, in the unit that the heading names, and columns of intervals and
    of the smallest effects that can be detected.
    """
    head, cells = [], []
    for index, column in enumerate(table.columns):
        below = [row.cells[index] for row in table.rows]
        head.append(f"{column.title} ({column.unit})" if column.unit else column.title)
        cells.append([_plain(cell) for cell in below])
        for end in ("low", "high", "detectable"):
            if any(getattr(cell, end) is not None for cell in below):
                head.append(f"{column.title} {end}")
                cells.append(["" if (value := getattr(cell, end)) is None else repr(value) for cell in below])
    return csv_of(head, zip(*cells, strict=True))


def csv_of(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return comma-separated values. Texts that a spreadsheet would run as a formula begin with an apostrophe."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_inert(cell) for cell in head])
    writer.writerows([_inert(cell) for cell in row] for row in rows)
    return text.getvalue()


def _plain(cell: Cell) -> str:
    if cell.value is None:
        return "" if cell.text == NONE else cell.text
    return cell.value if isinstance(cell.value, str) else repr(cell.value)


def _inert(cell: object) -> object:
    if not isinstance(cell, str) or not cell or cell[0] not in "=+-@\t\r":
        return cell
    try:
        float(cell)
    except ValueError:
        return "'" + cell
    return cell


def printable(text: str, instead: str = " ") -> str:
    """Return text as one line of printable letters: names in records may hold anything."""
    return "".join(char if char.isprintable() else instead for char in text)
