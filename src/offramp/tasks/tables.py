"""Rows of a table on disk, one at a time: TSV, CSV or JSON lines, with named columns.

It knows what a column is, and not what it means.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from offramp.errors import UsageError

Row = tuple[str, dict[str, str]]
"""Where it stands (`FILE:LINE`), and column -> text."""
SUFFIXES = (".tsv", ".csv", ".jsonl")


def read_table(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a file; the first line names the columns of a TSV or CSV, unless `columns` does.

    A TSV is split at tabs alone: quotes mean nothing. Numbers of JSON lines become text. Blank lines are skipped.
    Raises UsageError naming file and line.
    """
    try:
        with path.open("rb") as file:
            yield from read_stream(file, path.suffix.lower(), path, columns)
    except OSError as error:
        raise UsageError(f"table cannot be read ({error.strerror})", path, "check the path") from None


def read_stream(
    stream: IO[bytes],
    suffix: str,
    where: object,
    columns: Sequence[str] | None = None,
    *,
    skip_short: bool = False,
) -> Iterator[Row]:
    """The same for an open file, of a kind that `suffix` tells. `skip_short`: pass over rows that lack fields."""
    if suffix not in SUFFIXES:
        raise UsageError(f"unknown kind of table {suffix!r}", where, f"give a {', '.join(SUFFIXES)} file")
    lines = io.TextIOWrapper(stream, "utf-8-sig", newline="" if suffix == ".csv" else "\n")
    try:
        if suffix == ".jsonl":
            yield from _objects(lines, where)
        else:
            yield from _rows(lines, suffix, where, columns, skip_short)
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 (byte {error.object[error.start]:#04x})", where, "save it as UTF-8") from None
    except csv.Error as error:
        raise UsageError(f"not CSV ({error})", where, "quote fields that hold quotes or line breaks") from None
    finally:
        lines.detach()


def field(row: Row, name: str) -> str:
    """One column of a row. Raises UsageError naming the columns that there are."""
    where, cells = row
    if name not in cells:
        raise UsageError(f"no column {name!r}, found {', '.join(map(repr, cells))}", where, "name one of these")
    return cells[name]


def _rows(lines: IO[str], suffix: str, where: object, columns: Sequence[str] | None, skip_short: bool) -> Iterator[Row]:
    split = _split_tsv(lines) if suffix == ".tsv" else _split_csv(lines)
    header = list(columns) if columns is not None else next(split, (0, None))[1]
    if header is None:
        return
    for number, cells in split:
        place = f"{where}:{number}"
        if skip_short and len(cells) < len(header):
            continue
        if len(cells) != len(header):
            what = f"{len(cells)} columns, {len(header)} are expected"
            raise UsageError(what, place, "separate columns as the first line does")
        yield place, dict(zip(header, cells, strict=True))


def _split_tsv(lines: IO[str]) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(lines, 1):
        text = line.removesuffix("\n").removesuffix("\r")
        if text.strip():
            yield number, text.split("\t")


def _split_csv(lines: IO[str]) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(lines, strict=True)
    for cells in reader:
        if any(cell.strip() for cell in cells):
            yield reader.line_num, cells


def _objects(lines: IO[str], where: object) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{where}:{number}"
        try:
            tree = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"not JSON ({error})", place, "write one object a line") from None
        if not isinstance(tree, dict):
            raise UsageError(f"a {type(tree).__name__}, not an object", place, "write one object a line")
        yield place, {name: value if isinstance(value, str) else json.dumps(value) for name, value in tree.items()}
