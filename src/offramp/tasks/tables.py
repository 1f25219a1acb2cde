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
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any, Collection, ContextManager, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from offramp.errors import UsageError, import_error
from offramp.tasks.text import Text

Row = Tuple[str, Mapping[str, Optional[str]]]
"""Position of a row (`FILE:LINE`), and column -> text. The text is None for null and NaN."""
Line = Tuple[str, str]
"""Position of a line (`FILE:LINE`), and its text without the end."""


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


def read_stream(
    stream: IO[bytes], suffix: str, where: object, columns: Optional[Sequence[str]] = None, skip_short: bool = False
) -> Iterator[Row]:
    """Yield the rows of an open file in the format of `suffix`.

    Args:
        stream: the open file.
        suffix: a key of `READERS`.
        where: names the file in errors.
        columns: names of the columns of a TSV or CSV file; None: the first line names them.
        skip_short: True to skip rows of such a file that have too few fields; otherwise they raise an error.
    """
    if suffix not in READERS:
        raise UsageError(f"unknown kind of table {suffix!r}", where, f"give a {', '.join(READERS)} file")
    for place, cells in READERS[suffix](stream, where):
        if isinstance(cells, dict):
            yield place, {name: _cell_text(cell) for name, cell in cells.items()}
        elif columns is None:
            columns = cells
        elif len(cells) == len(columns):
            yield place, dict(zip(columns, cells))
        elif len(cells) > len(columns) or not skip_short:
            what = f"{len(cells)} columns, {len(columns)} are expected"
            raise UsageError(what, place, "separate columns as the first line does")


def field(row: Row, name: str) -> str:
    """Return one column of a row. Raises UsageError if it is absent, null or NaN."""
    where, cells = row
    if name not in cells:
        raise _absent("column", name, cells, where)
    cell = cells[name]
    if cell is None:
        raise UsageError(f"column {name!r} is null or NaN", where, "correct the row, or drop it")
    return cell


def text_of(row: Row, names: Sequence[str]) -> Text:
    """Return one column as a text, or two columns as a pair of texts."""
    return _text_or_pair([field(row, name) for name in names])


def _absent(kind: str, name: str, found: Collection[str], where: str) -> UsageError:
    return UsageError(f"no {kind} {name!r}, found {', '.join(map(repr, found)) or 'none'}", where, "name one of these")


def _split_tsv(stream: IO[bytes], where: object) -> Iterator[Tuple[str, List[str]]]:
    return ((place, text.split("\t")) for place, text in lines_of(where, stream))


def _split_csv(stream: IO[bytes], where: object) -> Iterator[Tuple[str, List[str]]]:
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


def _parse_jsonl(stream: IO[bytes], where: object) -> Iterator[Tuple[str, Dict[str, Any]]]:
    """Yield the JSON object on each line. Raises UsageError."""
    for place, text in lines_of(where, stream):
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"not JSON ({error})", place, "write one object a line") from None
        if not isinstance(record, dict):
            raise UsageError(f"a {type(record).__name__}, not an object", place, "write one object a line")
        yield place, record


def _read_parquet(stream: IO[bytes], where: object) -> Iterator[Tuple[str, Dict[str, Any]]]:
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise import_error(error, "pyarrow", "data") from None
    try:
        batches = ParquetFile(stream).iter_batches(batch_size=1024)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        yield from ((f"{where}:{number}", cells) for number, cells in enumerate(rows, 1))
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"not Parquet ({error})", where, "save it again") from None


READERS = {".tsv": _split_tsv, ".csv": _split_csv, ".jsonl": _parse_jsonl, ".parquet": _read_parquet}
"""File suffix -> reader of a table. It yields positions, and either the fields of a row or its cells by column."""


def _cell_text(cell: Any) -> Optional[str]:
    """Return the text of a cell of JSON or Parquet, as in a TSV file; None for null and NaN."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return None
    return cell if isinstance(cell, str) else json.dumps(cell, default=str)


def read_texts(
    source: Union[str, Path], text_column: Optional[str] = None, pair_column: Optional[str] = None
) -> Iterator[Text]:
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


def _texts(source: Union[str, Path], text_column: Optional[str], pair_column: Optional[str]) -> Iterator[Text]:
    suffix = ".txt" if source == "-" else Path(source).suffix.lower()
    if suffix not in (".txt", ".tsv", ".jsonl"):
        raise UsageError(f"unknown kind of input {suffix!r}", source, "give a .txt, .tsv or .jsonl file, or -")
    if suffix == ".txt" and (text_column is not None or pair_column is not None):
        raise UsageError("plain text has no columns", source, "give a .tsv or .jsonl file, or name no column")
    if suffix == ".tsv" and text_column is None and pair_column is not None:
        raise UsageError(f"a pair column {pair_column!r} without a text column", source, "name both columns")
    with _open(source) as file:
        if suffix == ".txt":
            yield from (text for _, text in lines_of(source, file))
        elif suffix == ".tsv":
            yield from _texts_of_tsv(lines_of(source, file), text_column, pair_column)
        else:
            yield from _texts_of_jsonl(file, source, text_column or "text", pair_column)


def _open(source: Union[str, Path]) -> ContextManager[IO[bytes]]:
    try:
        return nullcontext(sys.stdin.buffer) if source == "-" else open(source, "rb")
    except OSError as error:
        raise UsageError(f"input cannot be read ({error.strerror})", source, "check the path") from None


def lines_of(source: object, file: IO[bytes]) -> Iterator[Line]:
    """Yield the lines of a file that are not blank. `source` names it in errors. Raises UsageError if not UTF-8."""
    for number, line in enumerate(file, 1):
        where = f"{source}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\n")
        except UnicodeDecodeError as error:
            what = f"not UTF-8 (byte {error.object[error.start]:#04x} at {error.start})"
            raise UsageError(what, where, "save the input as UTF-8") from None
        if text.strip():
            yield where, text[:-1] if text.endswith("\r") else text


def _texts_of_tsv(lines: Iterator[Line], text_column: Optional[str], pair_column: Optional[str]) -> Iterator[Text]:
    indices = [0]
    if text_column is not None:
        where, header = next(lines, (None, ""))
        if where is None:
            return
        found, names = header.split("\t"), [text_column] if pair_column is None else [text_column, pair_column]
        for name in names:
            if name not in found:
                raise _absent("column", name, found, where)
        indices = [found.index(name) for name in names]
    for where, text in lines:
        fields = text.split("\t")
        if len(fields) <= max(indices):
            what = f"{len(fields)} columns, {max(indices) + 1} are needed"
            raise UsageError(what, where, "separate columns by tabs")
        yield _text_or_pair([fields[index] for index in indices])


def _texts_of_jsonl(file: IO[bytes], source: object, text_field: str, pair_field: Optional[str]) -> Iterator[Text]:
    for where, record in _parse_jsonl(file, source):
        names = [text_field]
        if pair_field is not None or "pair" in record:
            names.append(pair_field or "pair")
        for name in names:
            if name not in record:
                raise _absent("field", name, record, where)
            if not isinstance(record[name], str):
                what = f"field {name!r} is a {type(record[name]).__name__}, not a string"
                raise UsageError(what, where, "write a string")
        yield _text_or_pair([record[name] for name in names])


def _text_or_pair(texts: Sequence[str]) -> Text:
    return texts[0] if len(texts) == 1 else (texts[0], texts[1])
