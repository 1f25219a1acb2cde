"""Tables as LaTeX that fits a page: wide tables are split into parts, long texts are broken into lines.

The packages are `booktabs` and `tabularx`, and `graphicx` for a table whose first columns alone are too wide, which is
scaled. Widths are estimated by counting letters: LaTeX is not run.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from offramp.reporting.tables import Cell, Column, Page, Row, Table, printable

_LETTERS_OF_LINE = 76
"""Letters of a line of the class `article` on A4 in \\footnotesize."""
_LETTERS_BETWEEN = 2
"""Letters that the space between two columns takes."""
_LINES_OF_PAGE = 42
"""Lines of a part: a page has some 58 in \\footnotesize, and a caption, notes and rules of tables need some."""
_BROKEN_FROM = 26
"""Letters from which a text is broken into lines, if its table is too wide."""
_FEWEST_LETTERS = 18
"""Width of the narrowest column of broken texts."""


@dataclass(frozen=True)
class _Part:
    """Columns and rows of a table that fit a page."""

    columns: tuple[int, ...]
    broken: frozenset[int]
    """Columns whose texts are broken into lines."""
    rows: tuple[Row, ...]
    is_scaled: bool
    """True if the columns are too wide for a page all the same."""


def to_latex(page: Page) -> str:
    """Return all tables of a page as LaTeX, below a comment with the packages that they need."""
    head = "% \\usepackage{booktabs,tabularx,graphicx}"
    return "\n".join([head, "", *(latex(table) + "\n" for table in page.tables)])


def latex(table: Table) -> str:
    """Return a table as LaTeX environments with captions and labels: several, if it is too large for a page."""
    parts = list(_parts(table))
    return "\n\n".join(_environment(table, part, number, len(parts)) for number, part in enumerate(parts, 1))


def _environment(table: Table, part: _Part, number: int, num_parts: int) -> str:
    columns = [table.columns[index] for index in part.columns]
    aligned = [_alignment(column, index in part.broken) for column, index in zip(columns, part.columns, strict=True)]
    kind, width = ("tabularx", r"{\linewidth}") if part.broken else ("tabular", "")
    rows = [[_cell(row.cells[index], index in part.broken) for index in part.columns] for row in part.rows]
    notes = [rf"\par\vspace{{2pt}}{_text(note)}\par" for note in table.notes] if number == num_parts else []
    suffix, label = (f" (part {number} of {num_parts})", f"-{number}") if num_parts > 1 else ("", "")
    body = [
        rf"\begin{{{kind}}}{width}{{@{{}}{''.join(aligned)}@{{}}}}",
        r"\toprule",
        rf"{' & '.join(_text(column.title) for column in columns)} \\",
        r"\midrule",
        *(rf"{' & '.join(row)} \\" for row in rows),
        r"\bottomrule",
        rf"\end{{{kind}}}",
    ]
    if part.is_scaled:
        body = [r"\resizebox{\linewidth}{!}{%", *body[:-1], body[-1] + "}"]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            r"\footnotesize",
            r"\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{_text(table.title + suffix)}}}",
            rf"\label{{tab:{table.name}{label}}}",
            *body,
            *notes,
            r"\end{table}",
        ]
    )


def _alignment(column: Column, is_broken: bool) -> str:
    if is_broken:
        return r">{\raggedright\arraybackslash}X"
    return "l" if column.is_text else "r"


def _parts(table: Table) -> Iterator[_Part]:
    """Yield what fits a page: the first columns of text, which name a row, with some of the others; then more rows."""
    widths = [_width(table, index) for index in range(len(table.columns))]
    texts = [column.is_text for column in table.columns]
    num_keys = texts.index(False) if False in texts else min(1, len(texts))
    keys, others = tuple(range(num_keys)), range(num_keys, len(texts))
    widest = {index for index, is_text in enumerate(texts) if is_text and widths[index] >= _BROKEN_FROM}
    fitted = [_FEWEST_LETTERS if index in widest else width for index, width in enumerate(widths)]
    for columns in _packed(keys, others, widths if _sum(widths, range(len(widths))) <= _LETTERS_OF_LINE else fitted):
        is_wide, is_scaled = (_sum(each, columns) > _LETTERS_OF_LINE for each in (widths, fitted))
        broken = frozenset(widest & set(columns)) if is_wide and not is_scaled else frozenset[int]()
        spare = max(0, _LETTERS_OF_LINE - _sum(fitted, columns)) // max(1, len(broken))
        num_lines = max(_LINES_OF_PAGE // 2, _LINES_OF_PAGE - sum(len(note) for note in table.notes) // 80)
        for rows in _pages(table.rows, broken, _FEWEST_LETTERS + spare, num_lines):
            yield _Part(columns, broken, rows, is_scaled or (is_wide and not broken))


def _packed(keys: Sequence[int], others: Sequence[int], widths: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield the columns of each part: all keys, and as many others as fit, at least one."""
    part: list[int] = []
    for index in others:
        if part and _sum(widths, [*keys, *part, index]) > _LETTERS_OF_LINE:
            yield (*keys, *part)
            part = []
        part.append(index)
    if part or not others:
        yield (*keys, *part)


def _pages(rows: Sequence[Row], broken: frozenset[int], letters: int, most: int) -> Iterator[tuple[Row, ...]]:
    """Yield the rows of each part, in `most` lines. `letters`: width of a broken column."""
    page: list[Row] = []
    num_lines = 0
    for row in rows:
        height = max((math.ceil(_letters(row.cells[index]) / letters) for index in broken), default=1) or 1
        if page and num_lines + height > most:
            yield tuple(page)
            page, num_lines = [], 0
        page.append(row)
        num_lines += height
    yield tuple(page)


def _sum(widths: Sequence[int], columns: Sequence[int] | range) -> int:
    return sum(widths[index] + _LETTERS_BETWEEN for index in columns) - _LETTERS_BETWEEN


def _width(table: Table, index: int) -> int:
    return max([len(table.columns[index].title), *(_letters(row.cells[index]) for row in table.rows)])


def _letters(cell: Cell) -> int:
    return len(f"{cell.text} {cell.detail}".strip())


def _cell(cell: Cell, is_broken: bool) -> str:
    shown = _text(cell.text)
    if is_broken:  # names and paths have no spaces
        shown = re.sub(r"(?<=\w)(\\?[_&]|[/:;,.=-](?:\{\})?)(?=\w)", r"\1\\allowbreak{}", shown)
    bold = rf"\textbf{{{shown}}}" if cell.is_best else shown
    return f"{bold} {_text(cell.detail)}".strip()


_LATEX = {
    **{char: "\\" + char for char in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "[": "{[}", "]": "{]}", "|": r"\textbar{}", '"': r"\symbol{34}",
    "–": r"\textendash{}", "×": r"$\times$", "−": r"$-$", "≤": r"$\le$", "≥": r"$\ge$", "±": r"$\pm$",
    "µ": r"$\mu$", "·": r"$\cdot$", "→": r"$\to$", "…": r"\ldots{}", "’": "'", "ß": r"\ss{}",
}  # fmt: skip


_ACCENTS = {
    "\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0306": "u", "\u0307": ".",
    "\u0308": '"', "\u030a": "r", "\u030b": "H", "\u030c": "v", "\u0327": "c",
}  # fmt: skip
"""Combining accent -> its command, which all encodings of fonts have."""


def _text(text: str) -> str:
    """Return text that compiles with pdflatex and its usual fonts; other letters appear as codes, such as U+6F22."""
    made = "".join(_letter(char) for char in printable(text))
    return re.sub(r"([-'`,?!])(?=[-'`,])", r"\1{}", made)  # no ligatures, so that `--budget` keeps both hyphens


def _letter(char: str) -> str:
    if char in _LATEX or char.isascii():
        return _LATEX.get(char, char)
    base, *accents = unicodedata.normalize("NFD", char)
    if base.isascii() and base.isalpha() and len(accents) == 1 and accents[0] in _ACCENTS:
        return rf"\{_ACCENTS[accents[0]]}{{{base}}}"
    return f"U+{ord(char):04X}"
