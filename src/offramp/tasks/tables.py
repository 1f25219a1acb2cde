"""Tables and texts on disk, read one row at a time: TSV, CSV, JSON lines, Parquet, and plain lines of text.

Rows have named columns; what a column means is not known here.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any, BinaryIO, ContextManager, Dict, NamedTuple, Optional, Tuple

from offramp.errors import MissingExtraError, UsageError
from offramp.tasks.text import Text

Row = Tuple[str, Dict[str, Optional[str]]]
"""Position of a row (`FILE:LINE`), and column -> text. The text is None for null and NaN."""


class Line(NamedTuple):
    """A line of a file without its end, and its position (`FILE:LINE`)."""

    where: str
    text: str


class Layout(NamedTuple):
    """Rows of a TSV or CSV file. The other formats name the columns of each row."""

    columns: Sequence[str] | None = None
    """Names of the columns; None: the first line names them."""
    skip_short: bool = False
    """True to skip rows that have too few fields; otherwise they raise an error."""


HEADER_LINE = Layout()


def read_table(path: Path) -> Iterator[Row]:
    """Yield the rows of a file, whose suffix is a key of `READERS`.

    The first line of a TSV or CSV file names the columns. A TSV file is split at tabs, without quoting. Numbers in JSON
    lines and Parquet are converted to text. Blank lines are skipped. Parquet needs pyarrow.

    Raises UsageError that names file and line, MissingExtraError.
    """
    try:
        with path.open("rb") as file:
            yield from read_stream(file, path.suffix.lower(), path)
    except OSError as error:
        raise UsageError(f"table cannot be read ({error.strerror})", path, "check the path") from None


def read_stream(stream: IO[bytes], suffix: str, where: object, layout: Layout = HEADER_LINE) -> Iterator[Row]:
    """Yield the rows of an open file in the format of `suffix`. `where` names the file in errors."""
    if suffix not in READERS:
        raise UsageError(f"unknown kind of table {suffix!r}", where, f"give a {', '.join(READERS)} file")
    return READERS[suffix](stream, where, layout)


def field(row: Row, name: str) -> str:
    """Return one column of a row. Raises UsageError if it is absent, null or NaN."""
    where, cells = row
    if name not in cells:
        raise UsageError(f"no column {name!r}, found {', '.join(map(repr, cells))}", where, "name one of these")
    cell = cells[name]
    if cell is None:
        raise UsageError(f"column {name!r} is null or NaN", where, "correct the row, or drop it")
    return cell


def text_of(row: Row, names: Sequence[str]) -> Text:
    """Return one column as a text, or two columns as a pair of texts."""
    return _text_or_pair([field(row, name) for name in names])


def _read_tsv(stream: IO[bytes], where: object, layout: Layout) -> Iterator[Row]:
    return _rows(((line.where, line.text.split("\t")) for line in lines_of(where, stream)), layout)


def _read_csv(stream: IO[bytes], where: object, layout: Layout) -> Iterator[Row]:
    return _rows(_split_csv(stream, where), layout)


def _read_jsonl(stream: IO[bytes], where: object, _: Layout) -> Iterator[Row]:
    for line in lines_of(where, stream):
        yield line.where, {name: _cell_text(cell) for name, cell in _object_of(line).items()}


def _read_parquet(stream: IO[bytes], where: object, _: Layout) -> Iterator[Row]:
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
                yield f"{where}:{number}", {name: _cell_text(cell) for name, cell in cells.items()}
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"not Parquet ({error})", where, "save it again") from None


READERS: dict[str, Callable[[IO[bytes], object, Layout], Iterator[Row]]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
"""File suffix -> reader of a table."""


def _rows(split: Iterator[tuple[str, list[str]]], layout: Layout) -> Iterator[Row]:
    header = list(layout.columns) if layout.columns is not None else next(split, ("", None))[1]
    if header is None:
        return
    for where, cells in split:
        if layout.skip_short and len(cells) < len(header):
            continue
        if len(cells) != len(header):
            what = f"{len(cells)} columns, {len(header)} are expected"
            raise UsageError(what, where, "separate columns as the first line does")
        yield where, dict(zip(header, cells))


def _split_csv(stream: IO[bytes], where: object) -> Iterator[tuple[str, list[str]]]:
    lines = io.TextIOWrapper(stream, "utf-8-sig", newline="")  # type: ignore[arg-type]
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


def _cell_text(cell: Any) -> str | None:
    """Return the text of a cell of JSON or Parquet, as in a TSV file; None for null and NaN."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    return cell if isinstance(cell, str) else json.dumps(cell, default=str)


def read_texts(source: str | Path, text_column: str | None = None, pair_column: str | None = None) -> Iterator[Text]:
    """Yield the texts, and the pairs of texts, of `source`. The file is never in memory as a whole.

    - `-` (standard input) and `.txt`: one text a line;
    - `.tsv`: the first column, or the columns that `text_column` and `pair_column` name in the first line. Fields are
      split at tabs, without quoting;
    - `.jsonl`: the field `text` or `text_column` of each object, and the field `pair`, if there is one, as second text.
      A `pair_column` must be in every object.

    Lines end with LF or CRLF, are UTF-8 with or without a byte order mark, and are skipped if blank. The first text is
    read by this call, so that a missing file, an unknown column and an empty input raise at once.

    Raises UsageError that names the line.
    """
    texts = _texts(source, text_column, pair_column)
    first = next(texts, None)
    if first is None:
        raise UsageError("no input", source, "give at least one text")
    return itertools.chain([first], texts)


def _texts(source: str | Path, text_column: str | None, pair_column: str | None) -> Iterator[Text]:
    suffix = ".txt" if source == "-" else Path(source).suffix.lower()
    if suffix not in (".txt", ".tsv", ".jsonl"):
        raise UsageError(f"unknown kind of input {suffix!r}", source, "give a .txt, .tsv or .jsonl file, or -")
    if suffix == ".txt" and (text_column is not None or pair_column is not None):
        raise UsageError("plain text has no columns", source, "give a .tsv or .jsonl file, or name no column")
    if suffix == ".tsv" and text_column is None and pair_column is not None:
        raise UsageError(f"a pair column {pair_column!r} without a text column", source, "name both columns")
    with _open(source) as file:
        lines = lines_of(source, file)
        if suffix == ".txt":
            yield from (line.text for line in lines)
        elif suffix == ".tsv":
            yield from _texts_of_tsv(lines, text_column, pair_column)
        else:
            yield from _texts_of_jsonl(lines, text_column, pair_column)


def _open(source: str | Path) -> ContextManager[BinaryIO]:
    if source == "-":
        return nullcontext(sys.stdin.buffer)
    try:
        return open(source, "rb")
    except OSError as error:
        raise UsageError(f"input cannot be read ({error.strerror})", source, "check the path") from None


def lines_of(source: object, file: IO[bytes]) -> Iterator[Line]:
    """Yield the lines of a file that are not blank. `source` names it in errors. Raises UsageError if not UTF-8."""
    for number, line in enumerate(file, 1):
        where = f"{source}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            what = f"not UTF-8 (byte {error.object[error.start]:#04x} at {error.start})"
            raise UsageError(what, where, "save the input as UTF-8") from None
        text = text[:-1] if text.endswith("\n") else text
        text = text[:-1] if text.endswith("\r") else text
        if text.strip():
            yield Line(where, text)


def _texts_of_tsv(lines: Iterator[Line], text_column: str | None, pair_column: str | None) -> Iterator[Text]:
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


def _texts_of_jsonl(lines: Iterator[Line], text_column: str | None, pair_column: str | None) -> Iterator[Text]:
    for line in lines:
        record = _object_of(line)
        names = [text_column or "text"]
        if pair_column is not None or "pair" in record:
            names.append(pair_column or "pair")
        yield _text_or_pair([_string(record, name, line.where) for name in names])


def _object_of(line: Line) -> dict[str, Any]:
    """Parse the JSON object on a line. Raises UsageError."""
    try:
        record = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"not JSON ({error})", line.where, "write one object a line") from None
    if not isinstance(record, dict):
        raise UsageError(f"a {type(record).__name__}, not an object", line.where, "write one object a line")
    return record


def _string(record: dict[str, Any], name: str, where: str) -> str:
    if name not in record:
        found = ", ".join(map(repr, record)) or "none"
        raise UsageError(f"no field {name!r}, found {found}", where, "name one of these")
    if not isinstance(record[name], str):
        raise UsageError(f"field {name!r} is a {type(record[name]).__name__}, not a string", where, "write a string")
    return record[name]


def _text_or_pair(texts: list[str]) -> Text:
    return texts[0] if len(texts) == 1 else (texts[0], texts[1])
