"""Rows of a table on disk, one at a time: TSV, CSV, JSON lines or Parquet, with named columns.

It knows what a column is, and not what it means.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from offramp.errors import MissingExtraError, UsageError
from offramp.tasks.inputs import Line, lines_of, object_of
from offramp.tasks.text import Text

Row = tuple[str, dict[str, str | None]]
"""Where it stands (`FILE:LINE`), and column -> text; None for what is null or not a number."""
SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet")


def read_table(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Yield the rows of a file; the first line names the columns of a TSV or CSV, unless `columns` does.

    A TSV is split at tabs alone: quotes mean nothing. Numbers of JSON lines become text. Blank lines are skipped.
    A Parquet file needs pyarrow. Raises UsageError naming file and line, MissingExtraError.
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
    if suffix == ".parquet":
        yield from _read_parquet(stream, where)
    elif suffix == ".jsonl":
        yield from _objects(lines_of(where, stream))
    elif suffix == ".tsv":
        split = ((line.where, line.text.split("\t")) for line in lines_of(where, stream))
        yield from _rows(split, columns, skip_short)
    else:
        yield from _rows(_split_csv(stream, where), columns, skip_short)


def field(row: Row, name: str) -> str:
    """One column of a row. Raises UsageError naming the columns that there are."""
    where, cells = row
    if name not in cells:
        raise UsageError(f"no column {name!r}, found {', '.join(map(repr, cells))}", where, "name one of these")
    cell = cells[name]
    if cell is None:
        raise UsageError(f"column {name!r} is null or NaN", where, "correct the row, or drop it")
    return cell


def text_of(row: Row, names: Sequence[str]) -> Text:
    """One column as a text, or two as a pair."""
    parts = [field(row, name) for name in names]
    return parts[0] if len(parts) == 1 else (parts[0], parts[1])


def _rows(split: Iterator[tuple[str, list[str]]], columns: Sequence[str] | None, skip_short: bool) -> Iterator[Row]:
    header = list(columns) if columns is not None else next(split, ("", None))[1]
    if header is None:
        return
    for place, cells in split:
        if skip_short and len(cells) < len(header):
            continue
        if len(cells) != len(header):
            what = f"{len(cells)} columns, {len(header)} are expected"
            raise UsageError(what, place, "separate columns as the first line does")
        yield place, dict(zip(header, cells, strict=True))


def _split_csv(stream: IO[bytes], where: object) -> Iterator[tuple[str, list[str]]]:
    lines = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    reader = csv.reader(lines, strict=True)
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield f"{where}:{reader.line_num}", cells
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 (byte {error.object[error.start]:#04x})", where, "save it as UTF-8") from None
    except csv.Error as error:
        raise UsageError(f"not CSV ({error})", where, "quote fields that hold quotes or line breaks") from None
    finally:
        lines.detach()


def _objects(lines: Iterator[Line]) -> Iterator[Row]:
    for line in lines:
        cells = object_of(line)
        yield line.where, {name: _text_of(cell) for name, cell in cells.items()}


def _read_parquet(stream: IO[bytes], where: object) -> Iterator[Row]:
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MissingExtraError("pyarrow", "data") from None
    number = 0
    try:
        for batch in ParquetFile(stream).iter_batches(batch_size=1024):
            for cells in batch.to_pylist():
                number += 1
                yield f"{where}:{number}", {name: _text_of(cell) for name, cell in cells.items()}
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"not Parquet ({error})", where, "save it again") from None


def _text_of(cell: Any) -> str | None:
    """A cell as a TSV would have it."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    return cell if isinstance(cell, str) else json.dumps(cell, default=str)
