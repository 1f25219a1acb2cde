"""Names by which columns are found, and by which a table with another separator is recognised."""

from __future__ import annotations

import re
from typing import Optional, Tuple

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
_LEAST_KNOWN = 2
"""Number of known names by which a line of plain text is recognised as a header: one word may be a text."""


def require_separator(place: str, line: str, mark: str) -> None:
    """Raise UsageError if the first line of a table, whose separator is `mark`, is a header with another separator."""
    found = None if mark in line else _separator(line, 1)
    if found is not None:
        raise _refusal(place, found, f"not by {_SEPARATORS[mark][0]}", "--header no if the line is a row")


def refuse_header(place: str, line: str) -> None:
    """Raise UsageError if the first line of plain text is the header of a table."""
    found = _separator(line, _LEAST_KNOWN)
    if found is not None:
        raise _refusal(place, found, "in a file that is read as plain text", "--input-format txt if the line is a text")


def _refusal(place: str, mark: str, but: str, otherwise: str) -> UsageError:
    """Return the error of a header whose separator is `mark`. `otherwise`: the option if the line is no header."""
    name, form = _SEPARATORS[mark]
    remedy = f"give --input-format {form}, or name it .{form}" if form else "save it with commas, as .csv"
    return UsageError(f"a header whose names are separated by {name}, {but}", place, f"{remedy} ({otherwise})")


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
