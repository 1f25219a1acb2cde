"""Texts from a file or from standard input, one at a time: no file is ever in memory as a whole.

Does not know of tokens, and looks at no other columns than those that it is asked for.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, NamedTuple

from offramp.errors import UsageError
from offramp.tasks.text import Text

if TYPE_CHECKING:
    _Read = Callable[[Iterator["Line"]], Iterator[Text]]


class Line(NamedTuple):
    """A line without its end, and where it stands."""

    where: str
    text: str


def read_inputs(source: str | Path, text_column: str | None = None, pair_column: str | None = None) -> Iterator[Text]:
    """Yield the texts, and the pairs of texts, of `source`.

    - `-` (standard input) and `.txt`: one text a line;
    - `.tsv`: the first column, or, when `text_column` is named, the columns that the first line calls so. Fields are
      split at tabs alone: quotes mean nothing;
    - `.jsonl`: the field `text` or `text_column` of each object, with `pair` as second text where there is one; a
      `pair_column` that is named must be in every object.

    Lines end with LF or CRLF, are UTF-8 with or without a byte order mark, and are skipped when blank. The first text
    is read at once, so that a missing file, an unknown column and an input without any text are told by this call.

    Raises UsageError, which names the line at fault.
    """
    read = _reader(source, text_column, pair_column)
    texts = _texts(source, read)
    first = next(texts, None)
    if first is None:
        raise UsageError("no input", source, "give at least one text")
    return itertools.chain([first], texts)


def _reader(source: str | Path, text_column: str | None, pair_column: str | None) -> _Read:
    suffix = ".txt" if source == "-" else Path(source).suffix.lower()
    if suffix == ".jsonl":
        return lambda lines: _read_jsonl(lines, text_column, pair_column)
    if suffix == ".tsv":
        if pair_column is not None and text_column is None:
            raise UsageError(f"a pair column {pair_column!r} without a text column", source, "name both columns")
        return lambda lines: _read_tsv(lines, text_column, pair_column)
    if suffix != ".txt":
        raise UsageError(f"unknown kind of input {suffix!r}", source, "give a .txt, .tsv or .jsonl file, or -")
    if text_column is not None or pair_column is not None:
        raise UsageError("plain text has no columns", source, "give a .tsv or .jsonl file, or name no column")
    return lambda lines: (line.text for line in lines)


def _texts(source: str | Path, read: _Read) -> Iterator[Text]:
    with _open(source) as file:
        yield from read(lines_of(source, file))


def _open(source: str | Path) -> AbstractContextManager[BinaryIO]:
    if source == "-":
        return nullcontext(sys.stdin.buffer)
    try:
        return open(source, "rb")
    except OSError as error:
        raise UsageError(f"input cannot be read ({error.strerror})", source, "check the path") from None


def lines_of(source: object, file: IO[bytes]) -> Iterator[Line]:
    """The lines of a file that are not blank; `source` is what to call it. Raises UsageError unless it is UTF-8."""
    for number, line in enumerate(file, 1):
        where = f"{source}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            what = f"not UTF-8 (byte {error.object[error.start]:#04x} at {error.start})"
            raise UsageError(what, where, "save the input as UTF-8") from None
        text = text[:-1] if text.endswith("\n") else text  # removesuffix is not in Python 3.8
        text = text[:-1] if text.endswith("\r") else text
        if text.strip():
            yield Line(where, text)


def _read_tsv(lines: Iterator[Line], text_column: str | None, pair_column: str | None) -> Iterator[Text]:
    indices = [0]
    if text_column is not None:
        header = next(lines, None)
        if header is None:
            return
        names = [text_column] if pair_column is None else [text_column, pair_column]
        indices = [_column(name, header) for name in names]
    for line in lines:
        fields = line.text.split("\t")
        if len(fields) <= max(indices):
            what = f"{len(fields)} columns, {max(indices) + 1} are needed"
            raise UsageError(what, line.where, "separate columns by tabs")
        yield _text_or_pair([fields[index] for index in indices])


def _column(name: str, header: Line) -> int:
    names = header.text.split("\t")
    if name not in names:
        raise UsageError(f"no column {name!r}, found {', '.join(map(repr, names))}", header.where, "name one of these")
    return names.index(name)


def _read_jsonl(lines: Iterator[Line], text_column: str | None, pair_column: str | None) -> Iterator[Text]:
    for line in lines:
        record = object_of(line)
        names = [text_column or "text"]
        if pair_column is not None or "pair" in record:
            names.append(pair_column or "pair")
        yield _text_or_pair([_field(record, name, line.where) for name in names])


def object_of(line: Line) -> dict:
    """The JSON object on a line. Raises UsageError."""
    try:
        record = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON ({error})", line.where, "write one object a line") from None
    if not isinstance(record, dict):
        raise UsageError(f"a {type(record).__name__}, not an object", line.where, "write one object a line")
    return record


def _field(record: dict, name: str, where: str) -> str:
    if name not in record:
        found = ", ".join(map(repr, record)) or "none"
        raise UsageError(f"no field {name!r}, found {found}", where, "name one of these")
    if not isinstance(record[name], str):
        raise UsageError(f"field {name!r} is a {type(record[name]).__name__}, not a string", where, "write a string")
    return record[name]


def _text_or_pair(texts: list[str]) -> Text:
    return texts[0] if len(texts) == 1 else (texts[0], texts[1])
