"""Names by which columns are found, and by which a table with another separator is recognised."""

from __future__ import annotations

import csv
import re
from typing import Optional, Sequence, Tuple

from offramp.errors import UsageError

TEXT_COLUMNS = ("sentence", "text")
"""Names of the text column that are looked for where none is given, in this order."""
PAIR_COLUMN = "pair"
"""Name of the column with the second text, where none is given."""
KNOWN_NAMES = {
    *TEXT_COLUMNS, PAIR_COLUMN, "label", "labels", "class", "category", "target", "score", "id", "idx", "index",
    "title", "body", "content", "review", "comment", "question", "answer", "premise", "hypothesis", "sentence1",
    "sentence2", "text1", "text2", "question1", "question2",
}  # fmt: skip
"""Words that mark the first line of a table of several columns as names, if one of its fields is such a word."""
_SEPARATORS = {"\t": ("tabs", "tsv"), ",": ("commas", "csv"), ";": ("semicolons", ""), "|": ("bars", "")}
"""Separator -> its name, and the format whose separator it is."""
_NAME = re.compile(r"[\w.-]+(?: [\w.-]+)*|")
"""Pattern of a field of a header. Fields of texts with a separator begin with a space, or end with a point."""
_QUOTED = re.compile(r'((?:^|,) *)"[^"]*(?:""[^"]*)*"?')
"""Pattern of a field in quotes, with the comma before it. A quote within a field is a character like others."""
_MARK_LINE = re.compile(r'"?sep=(.)"?[\r\n]*', re.IGNORECASE)
"""Pattern of a first line by which Excel is told the separator."""
_LEAST_KNOWN = 2
"""Number of known names by which a line of plain text is recognised as a header: one word may be a text."""


def require_separator(place: str, lines: Sequence[str], mark: str) -> None:
    """Raise UsageError if the first lines of a table, whose separator is `mark`, have another one.

    The first line is a header with it, or all of several lines have equal numbers of it.
    """
    found = _separator(lines[0], 1)
    if found is not None:
        raise _refusal(place, found, f"not by {_SEPARATORS[mark][0]}", "--header no if the line is a row")
    other = _even_separator(lines)
    if other is not None:
        (name, form), number = _SEPARATORS[other], _even_fields(lines, other)
        what = f"each line has {number} fields that are separated by {name}, not by {_SEPARATORS[mark][0]}"
        raise UsageError(what, place, _other_format(form) + " (--header no if the lines are texts)")


def names_separator(place: str, line: str, mark: str) -> bool:
    """Return whether the first line of a table names `mark` as its separator. Raises UsageError if it names another."""
    found = _MARK_LINE.fullmatch(line)
    if found is None or found[1] == mark:
        return found is not None
    name, form = _SEPARATORS.get(found[1], (repr(found[1]), ""))
    what = f"the first line names {name} as the separator, not {_SEPARATORS[mark][0]}"
    raise UsageError(what, place, _other_format(form) + " (--header no if the line is a row)")


def table_notice(lines: Sequence[str]) -> Optional[str]:
    """Return a notice that the first lines of plain text look like those of a table; None if they do not."""
    if lines[0].strip().strip('"').casefold() in TEXT_COLUMNS:
        return "this line is read as a text, and could be the header of a table (--input-format csv or tsv reads one)"
    mark = _even_separator(lines)
    if mark is None:
        return None
    (name, form), number = _SEPARATORS[mark], _even_fields(lines, mark)
    otherwise = f"--input-format {form} reads a table" if form else "a table needs commas, and --input-format csv"
    return f"each line has {number} fields that are separated by {name}, and is read as one text ({otherwise})"


def may_have_other(line: str, mark: str) -> bool:
    """Return whether the first line of a table has other separators than `mark`, and not `mark`."""
    return mark not in line and any(other in line for other in _SEPARATORS)


def has_spaced_fields(line: str) -> bool:
    """Return whether a line of CSV has a space after each comma, as people write."""
    fields = _QUOTED.sub(r"\1q", line).split(",")[1:]
    return bool(fields) and all(field.startswith(" ") and field.strip() for field in fields)


def _even_separator(lines: Sequence[str]) -> Optional[str]:
    """Return the separator of which all of several lines have equal numbers; None if there is none."""
    return next((mark for mark in _SEPARATORS if _even_fields(lines, mark) > 1), None)


def _even_fields(lines: Sequence[str], mark: str) -> int:
    """Return the number of fields of each of several lines; 1 if it varies, or if a space follows, as in sentences."""
    try:
        rows = [cells for cells in csv.reader(lines, delimiter=mark) if "".join(cells).strip()]
    except csv.Error:
        return 1
    is_even = len(rows) > 1 and len({len(cells) for cells in rows}) == 1
    has_spaces = any(cell.startswith(" ") for cells in rows for cell in cells[1:])
    return len(rows[0]) if is_even and not has_spaces else 1


def refuse_header(place: str, line: str) -> None:
    """Raise UsageError if the first line of plain text is the header of a table."""
    found = _separator(line, _LEAST_KNOWN)
    if found is not None:
        raise _refusal(place, found, "in a file that is read as plain text", "--input-format txt if the line is a text")


def _refusal(place: str, mark: str, but: str, otherwise: str) -> UsageError:
    """Return the error of a header whose separator is `mark`. `otherwise`: the option if the line is no header."""
    name, form = _SEPARATORS[mark]
    what = f"a header whose names are separated by {name}, {but}"
    return UsageError(what, place, f"{_other_format(form)} ({otherwise})")


def _other_format(form: str) -> str:
    """Return the remedy for a table of another format; "" is none that is read."""
    return f"give --input-format {form}, or name it .{form}" if form else "save it with commas, as .csv"


def _separator(line: str, least: int) -> Optional[str]:
    """Return the separator that makes a line a header with at least `least` known names; None if none does."""
    return next((mark for mark in _SEPARATORS if _known_names(_fields(line, mark)) >= least), None)


def _fields(line: str, mark: str) -> Tuple[str, ...]:
    """Return the fields of a line, without quotes around them."""
    fields = (field.strip("\r\n") for field in line.split(mark))
    return tuple(field[1:-1] if re.fullmatch('".*"', field) else field for field in fields)


def _known_names(fields: Tuple[str, ...]) -> int:
    """Return the number of known names in a line of several fields that may all be names; otherwise 0."""
    if sum(map(bool, fields)) < 2 or not all(map(_NAME.fullmatch, fields)):
        return 0
    return sum(field.casefold() in KNOWN_NAMES for field in fields)
