"""The one reader of texts and tables: plain lines, TSV, CSV, JSON lines and Parquet, of files, pipes and standard
input, and tables in memory.

Rows have named columns, and are read one at a time. Nothing is dropped, merged or guessed silently: irregular rows are
refused, or counted with their place, and guesses about the header, the text column and quotes are reported.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Collection, Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

from offramp.errors import UsageError, import_error, missing
from offramp.tasks.columns import (
    KNOWN_NAMES,
    PAIR_COLUMN,
    TEXT_COLUMNS,
    has_spaced_fields,
    may_have_other,
    names_separator,
    refuse_header,
    require_separator,
    table_notice,
)
from offramp.tasks.frames import frame_rows, is_frame, is_null, require_distinct
from offramp.tasks.lines import MAX_ROW_BYTES, MAX_TEXT_BYTES, Line, Log, Notes, is_pipe, lines_of, open_source, silent
from offramp.tasks.text import Text
from offramp.units import format_size

Row = Tuple[str, Mapping[str, Any]]
"""Position of a row (`FILE:LINE`), and column -> cell: text, or a value of JSON, Parquet or a table in memory."""
Source = Union[str, Path, Any]
"""Path, `-` for standard input, or a table in memory (`frames.is_frame`)."""
PLAIN = "txt"
"""Format of one text a line."""
_SAMPLE_LINES, _SAMPLE_CHARACTERS = 50, 1 << 16
"""Size of the sample by which the quoting of a TSV file is recognised; the smaller one counts."""
_MAX_BLANKS = 1024
"""Number of blank texts that are skipped to find out that there is no other."""


@dataclass(frozen=True)
class Layout:
    """Layout of a file; what is None follows from its name and first lines. Raises ValueError for an unknown format."""

    format: Optional[str] = None
    """`txt`, or a key of `READERS`; None: the suffix of the file; `txt` for standard input and pipes without one."""
    header: Optional[bool] = None
    """True if the first line of a TSV or CSV file names the columns; without a header they are `1`, `2`, ..."""
    quotes: Optional[bool] = None
    """True if fields of a TSV file are in double quotes, as pandas writes them where they hold tabs, line breaks or
    quotes. Fields of CSV files may be in quotes, unless it is False."""
    columns: Tuple[str, ...] = ()
    """Names of the columns of a TSV or CSV file without a header."""
    guesses_header: bool = False
    """Meaning of `header=None`. True: the first line decides, which is reported. False: there is a header."""
    skips_short: bool = False
    """True to skip rows that have too few fields; otherwise they raise an error."""

    def __post_init__(self) -> None:
        if self.format not in (None, PLAIN, *READERS):
            raise ValueError(f"format must be one of {', '.join((PLAIN, *READERS))}, not {self.format!r}")

    def format_of(self, source: Source) -> str:
        """Return the format of a file. Raises UsageError if its name does not tell."""
        found = self.format or Path(source).suffix.lower()[1:]
        if found in (PLAIN, *READERS):
            return found
        if is_pipe(source) or str(source).startswith(("/dev/", "/proc/")):
            return PLAIN
        if not Path(source).exists():
            raise missing(source)
        remedy = f"give a {', '.join(f'.{name}' for name in (PLAIN, *READERS))} file, or --input-format"
        raise UsageError(f"unknown kind of input {Path(source).suffix!r}", source, remedy)


def read_table(source: Source, layout: Optional[Layout] = None, notes: Optional[Notes] = None) -> Iterator[Row]:
    """Yield the rows of a table. Blank lines of a table of several columns are skipped, and counted in `notes`.

    Raises UsageError that names file and line, MissingExtraError for Parquet without pyarrow.
    """
    if is_frame(source):
        yield from frame_rows(source)
        return
    with open_source(source) as file:
        yield from read_stream(file, source, layout or Layout(), notes or Notes())


def read_stream(stream: IO[bytes], where: Source, layout: Layout, notes: Notes) -> Iterator[Row]:
    """Yield the rows of an open file, which `where` names in errors."""
    name = layout.format_of(where)
    if name == PLAIN:
        raise UsageError("plain text has no columns", where, f"give a {', '.join(READERS)} file, or --input-format")
    rows = READERS[name](stream, where, layout, notes)
    return rows if name not in ("tsv", "csv") else _named(rows, layout, notes)


def _named(rows: Iterator[Tuple[str, List[str]]], layout: Layout, notes: Notes) -> Iterator[Row]:
    """Yield rows of fields by column. A blank line is a row where there is one column."""
    columns = list(layout.columns)
    for place, cells in rows:
        if len(columns) != 1 and len(cells) < 2 and not "".join(cells).strip():
            notes.add("blank lines were skipped", place)
        elif not columns:
            has_header = _has_header(cells, place, layout, notes)
            columns = cells if has_header else [str(number) for number in range(1, len(cells) + 1)]
            require_distinct(columns, place)
            if not has_header:
                yield place, dict(zip(columns, cells))
        elif len(cells or [""]) == len(columns):
            yield place, dict(zip(columns, cells or [""]))
        elif len(cells) < len(columns) and layout.skips_short:
            notes.add("rows with too few fields were skipped", place)
        else:
            what = f"{len(cells)} fields, {len(columns)} are expected"
            raise UsageError(what, place, "separate fields as the first line does; see --quotes and --header")


def _has_header(cells: List[str], place: str, layout: Layout, notes: Notes) -> bool:
    """Return whether the first line names the columns. A guess is reported."""
    if layout.header is not None or not layout.guesses_header:
        return layout.header is not False
    words = TEXT_COLUMNS if len(cells) == 1 else KNOWN_NAMES
    found = any(cell.strip().casefold() in words for cell in cells)
    if found:
        notes.log(f"{place}: this line is the header, with the columns {', '.join(cells)} (--header no if it is a row)")
    else:
        notes.log(f"{place}: this line is a row, and there is no header (--header yes if it names the columns)")
    return found


def _split_tsv(stream: IO[bytes], where: object, layout: Layout, notes: Notes) -> Iterator[Tuple[str, List[str]]]:
    lines = _with_separator(lines_of(where, stream, notes), "\t", layout, notes)
    quotes = layout.quotes
    if quotes is None:
        sample = _sample(lines)
        following = list(itertools.islice(lines, 1))
        quotes = _is_quoted([text for _, text in sample], not following)
        held = sample + following
        del sample[:], following
        lines = _joined(held, lines)
        if quotes:
            notes.log(f"{where}: fields are in double quotes, which are removed (--quotes no keeps them)")
    if quotes:
        yield from _split_quoted(lines, "\t")
        return
    for place, text in lines:
        cells = _stripped(text).split("\t")
        if layout.quotes is None and '""' in text and any(map(_holds_doubled_quotes, cells)):
            notes.add("rows have quotes that were kept (--quotes yes removes them)", place)
        yield place, cells


def _sample(lines: Iterator[Line]) -> List[Line]:
    found, size = [], 0
    for line in itertools.islice(lines, _SAMPLE_LINES):
        found.append(line)
        size += len(line[1])
        if size > _SAMPLE_CHARACTERS:
            break
    return found


def _holds_doubled_quotes(cell: str) -> bool:
    """Return whether a field is in quotes and holds doubled quotes, as only a writer of quoted fields makes them."""
    inner = cell[1:-1]
    return len(cell) > 3 and cell[0] == cell[-1] == '"' and '""' in inner and '"' not in inner.replace('""', "")


def _is_quoted(lines: Sequence[str], is_whole: bool) -> bool:
    """Return whether the first lines of a TSV file, or all of them, must be read with quotes.

    Quotes are part of the text unless the lines have equal numbers of fields with quoting and not without it, unless a
    field holds doubled quotes, or unless all fields of the first line, one of several columns, are quoted.
    """
    if not any('"' in line for line in lines):
        return False
    plain = [_stripped(line).split("\t") for line in lines if line.strip()]
    try:
        quoted = [cells for cells in _csv_reader(lines, "\t") if any(cells)]
    except csv.Error as error:
        if is_whole or "unexpected end" not in str(error):
            return False
        quoted = [cells for cells in csv.reader(lines, delimiter="\t") if any(cells)][:-1]  # the last is incomplete
    is_even = len(set(map(len, quoted))) == 1
    is_needed = len(set(map(len, plain))) > 1
    names_are_quoted = len(plain[0]) > 1 and all(re.fullmatch('".+"', cell) for cell in plain[0])
    holds_doubled = any(_holds_doubled_quotes(cell) for cells in plain for cell in cells)
    return is_even and (is_needed or names_are_quoted or holds_doubled)


def _split_csv(stream: IO[bytes], where: object, layout: Layout, notes: Notes) -> Iterator[Tuple[str, List[str]]]:
    lines = _with_separator(lines_of(where, stream, notes), ",", layout, notes)
    first = list(itertools.islice(lines, 1))
    is_spaced = bool(first) and has_spaced_fields(first[0][1])
    if is_spaced:
        notes.log(f"{first[0][0]}: spaces after commas are removed")
    is_quoted = layout.quotes is not False
    return _split_quoted(_joined(first, lines), ",", is_spaced=is_spaced, is_quoted=is_quoted)


def _with_separator(lines: Iterator[Line], mark: str, layout: Layout, notes: Notes) -> Iterator[Line]:
    """Return the lines, without the first one if it names the separator, as Excel takes it (`sep=,`).

    Raises UsageError if the first ones have another separator than `mark`. Only where the first line may have another
    one are more lines read before it is returned.
    """
    first = list(itertools.islice(lines, 1))
    if not first or layout.header is False or layout.columns:
        return _joined(first, lines)
    if names_separator(*first[0], mark):
        notes.log(f"{first[0][0]}: this line names the separator, and is skipped (--header no if it is a row)")
        first = list(itertools.islice(lines, 1))
    if first and may_have_other(first[0][1], mark):
        first += _sample(lines)
        require_separator(first[0][0], [text for _, text in first], mark)
    return _joined(first, lines)


def _joined(first: List[Line], others: Iterator[Line]) -> Iterator[Line]:
    """Return lines that were read before, and the others. Each is dropped once it is read."""
    return itertools.chain((first.pop(0) for _ in range(len(first))), others)


def _csv_reader(lines: Iterable[str], mark: str, *, is_spaced: bool = False, is_quoted: bool = True) -> Any:
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))  # the default refuses 131,072 characters
    quoting = csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE
    return csv.reader(lines, delimiter=mark, strict=True, skipinitialspace=is_spaced, quoting=quoting)


def _split_quoted(
    lines: Iterator[Line], mark: str, *, is_spaced: bool = False, is_quoted: bool = True
) -> Iterator[Tuple[str, List[str]]]:
    place = ""

    def texts() -> Iterator[str]:
        nonlocal place
        for line in lines:
            place = line[0]
            yield line[1]

    try:
        for cells in _csv_reader(texts(), mark, is_spaced=is_spaced, is_quoted=is_quoted):
            yield place, cells
    except csv.Error as error:
        what = f"not {'CSV' if mark == ',' else 'TSV with quotes'} ({error})"
        raise UsageError(what, place, "quote fields that hold quotes or line breaks") from None


def _stripped(line: str) -> str:
    """Return a line without its line break, LF or CRLF."""
    text = line[:-1] if line.endswith("\n") else line
    return text[:-1] if text.endswith("\r") else text


def _parse_jsonl(stream: IO[bytes], where: object, layout: Layout, notes: Notes) -> Iterator[Row]:
    """Yield the JSON object on each line. Raises UsageError."""
    for place, text in lines_of(where, stream, notes):
        if not text.strip():
            notes.add("blank lines were skipped", place)
            continue
        try:
            record = json.loads(text, object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"not JSON ({error})", place, "write one object a line") from None
        if not isinstance(record, dict):
            raise UsageError(f"a {type(record).__name__}, not an object", place, "write one object a line")
        yield place, record


def _object(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"two of the keys {', '.join(repr(name) for name, _ in pairs)} are equal")
    return found


def _read_parquet(stream: IO[bytes], where: object, layout: Layout, notes: Notes) -> Iterator[Row]:
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise import_error(error, "pyarrow", "data") from None
    try:
        file = ParquetFile(stream)
        require_distinct(file.schema_arrow.names, where)
        batches = file.iter_batches(batch_size=1024)
        rows = itertools.chain.from_iterable(zip(*map(_values, batch.columns)) for batch in batches)
        names = file.schema_arrow.names
        yield from ((f"{where}:{number}", dict(zip(names, cells))) for number, cells in enumerate(rows, 1))
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"not Parquet ({error})", where, "save it again") from None


@dataclass(frozen=True)
class Unreadable:
    """Cell of Parquet that is no value of Python: text that is not UTF-8, or a time out of range."""

    error: Exception


def _values(column: Any) -> List[Any]:
    """Return the cells of a column of Arrow as values of Python."""
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError) as error:
        return Unreadable(error)


READERS: Dict[str, Any] = {"tsv": _split_tsv, "csv": _split_csv, "jsonl": _parse_jsonl, "parquet": _read_parquet}
"""Format -> reader of a table. It yields positions, and either the fields of a row or its cells by column."""


def require_columns(row: Row, names: Sequence[str]) -> None:
    """Raise UsageError for the first of these columns that a row lacks."""
    absent = next((name for name in names if name not in row[1]), None)
    if absent is not None:
        raise _absent(repr(absent), row[1], row[0])


def _cell(row: Row, name: str) -> Any:
    """Return one cell of a row. Raises UsageError if it is absent or unreadable."""
    require_columns(row, (name,))
    cell = row[1][name]
    if isinstance(cell, Unreadable):
        raise UsageError(f"column {name!r} is unreadable ({cell.error})", row[0], "correct the row, or drop it")
    return cell


def field(row: Row, name: str) -> str:
    """Return one column of a row. Raises UsageError if it is absent, null, NaN or not a text."""
    where, cell = row[0], _cell(row, name)
    if is_null(cell):
        raise UsageError(f"column {name!r} is null or NaN", where, "correct the row, or drop it")
    if not isinstance(cell, str):
        raise UsageError(f"column {name!r} is a {type(cell).__name__}, not a text", where, "write a text, in quotes")
    return cell


def label_field(row: Row, name: str) -> str:
    """Return the label in one column of a row, as text. Equal numbers have equal texts: 1, 1.0 and "1.0" are `1`.

    Raises UsageError if it is absent, null, NaN, or several values.
    """
    where, cell = row[0], _cell(row, name)
    if isinstance(cell, (list, dict, tuple, set)):
        remedy = "write one label a row: a model of several labels cannot be trained"
        raise UsageError(f"column {name!r} is a {type(cell).__name__}, not one label", where, remedy)
    if isinstance(cell, bytes):
        raise UsageError(f"column {name!r} is bytes, not one label", where, "write a text or a number")
    if is_null(cell) or (isinstance(cell, str) and cell.strip().casefold() == "nan"):
        raise UsageError(f"column {name!r} is null or NaN", where, "correct the row, or drop it")
    return same_label(label_spelling(cell))


def label_spelling(cell: Any) -> str:
    """Return a label as it is written."""
    return str(cell).lower() if isinstance(cell, bool) else str(cell)


def same_label(label: str) -> str:
    """Return one spelling for labels that are the same number: `1` for `1.0`."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", label, flags=re.ASCII)


def text_of(row: Row, names: Sequence[str]) -> Text:
    """Return one column as a text, or two columns as a pair of texts."""
    texts = [field(row, name) for name in names]
    return texts[0] if len(texts) == 1 else (texts[0], texts[1])


def _absent(names: str, found: Collection[str], where: str) -> UsageError:
    return UsageError(f"no column {names}, found {', '.join(map(repr, found)) or 'none'}", where, "name one of these")


def text_columns(row: Row, text_column: Optional[str], pair_column: Optional[str]) -> Tuple[str, ...]:
    """Return the columns of a row that hold its text, or both texts, by name where none is given."""
    where, cells = row
    if text_column is None:
        text_column = next((name for name in TEXT_COLUMNS if name in cells), None)
    if text_column is None:
        if len(cells) != 1 and next(iter(cells), "") != "1":
            raise _absent(" or ".join(map(repr, TEXT_COLUMNS)), cells, where)
        text_column = next(iter(cells))
    pair_column = pair_column or (PAIR_COLUMN if PAIR_COLUMN in cells and text_column != PAIR_COLUMN else None)
    if pair_column == text_column:
        what = f"the text and the second text of the pair are both read from the column {text_column!r}"
        raise UsageError(what, where, "name another column, or no --pair-column")
    return (text_column,) if pair_column is None else (text_column, pair_column)


def read_texts(
    source: Source,
    text_column: Optional[str] = None,
    pair_column: Optional[str] = None,
    layout: Optional[Layout] = None,
    log: Log = silent,
) -> Iterator[Text]:
    """Yield the texts, and the pairs of texts, of `source`, one for each line or row. It is never in memory as a whole.

    Plain text has one text a line; a blank line is an empty text. A table has them in `text_column`, or else in
    `sentence`, `text`, the only column, or the first of a table without a header; and the second text of a pair in
    `pair_column`, or else in `pair`, if there is one. The first line of a TSV or CSV file names the columns if one of
    them is given, or if it holds such names. `log` receives the guesses, and the irregular rows at the end.

    The first row, or the first line that is not blank, is read by this call, so that a missing file, an unknown column
    and an empty input raise at once. Raises UsageError that names the line.
    """
    notes, layout = Notes(log), layout or Layout()
    is_plain = not is_frame(source) and layout.format_of(source) == PLAIN
    if is_plain and (text_column is not None or pair_column is not None):
        raise UsageError("plain text has no columns", source, "give a table, or --input-format, or name no column")
    if is_plain and (layout.header or layout.quotes):
        raise UsageError("plain text has no header and no quotes", source, "give --input-format csv, or another table")
    names = text_column, pair_column
    found = _plain_texts(source, layout, notes) if is_plain else _table_texts(source, names, layout, notes)
    texts, first = _counted(found, notes), []
    for text in texts:
        first.append(text)
        if not is_plain or _has_text(text) or len(first) == _MAX_BLANKS:
            return itertools.chain(first, texts)
    raise UsageError("no input", source, "give at least one text")


def _has_text(text: Text) -> bool:
    return any(part.strip() for part in ((text,) if isinstance(text, str) else text))


def _counted(texts: Iterator[Tuple[str, Text]], notes: Notes) -> Iterator[Text]:
    for place, text in texts:
        if not _has_text(text):
            notes.add("blank texts, each answered as an empty one", place)
        yield text
    notes.report()


def _plain_texts(source: Source, layout: Layout, notes: Notes) -> Iterator[Tuple[str, Text]]:
    cut = partial(notes.add, f"lines of which only the first {format_size(MAX_TEXT_BYTES)} was read")
    with open_source(source) as file:
        lines = lines_of(source, file, notes, MAX_TEXT_BYTES, cut)
        for number, (place, text) in enumerate(lines if layout.format else _noticed(lines, notes)):
            if number == 0 and layout.format is None:
                refuse_header(place, text)
            if number == 0 and re.match(r'\{\s*"', text):
                notes.log(f"{place}: this line looks like JSON and is read as a text (--input-format jsonl reads it)")
            yield place, _stripped(text)


def _noticed(lines: Iterator[Line], notes: Notes) -> Iterator[Line]:
    """Yield lines of plain text, and report once whether the first ones look like a table. No line waits for it."""
    sample: List[Line] = []
    size, is_open = 0, True
    for line in lines:
        yield line
        if is_open:
            sample.append(line)
            size += len(line[1])
            is_open = len(sample) < _SAMPLE_LINES and size <= _SAMPLE_CHARACTERS
            if not is_open:
                _note_table(sample, notes)
                del sample[:]
    _note_table(sample, notes)


def _note_table(sample: List[Line], notes: Notes) -> None:
    notice = table_notice([text for _, text in sample]) if sample else None
    if notice is not None:
        notes.log(f"{sample[0][0]}: {notice}")


def _table_texts(
    source: Source, names: Tuple[Optional[str], Optional[str]], layout: Layout, notes: Notes
) -> Iterator[Tuple[str, Text]]:
    layout = replace(layout, guesses_header=not any(names))
    text_column, pair_column = names
    first: Tuple[str, ...] = ()
    for row in read_table(source, layout, notes):
        columns = text_columns(row, text_column, pair_column)
        if not first and columns != tuple(name for name in names if name):
            notes.log(f"{row[0]}: texts are read from {_described(columns, row)}")
        first, text_column = first or columns, columns[0]
        note_columns(row, columns, first, notes)
        yield row[0], text_of(row, columns)


def _described(columns: Tuple[str, ...], row: Row) -> str:
    """Return columns in words; of a table without a header, whose first column was taken, how another is named."""
    found = f"the column {' and '.join(map(repr, columns))}"
    is_guess = columns == ("1",) and len(row[1]) > 1
    return f"{found}, the first of {len(row[1])} (--header no --text-column 2 reads another)" if is_guess else found


def note_columns(row: Row, columns: Tuple[str, ...], first: Tuple[str, ...], notes: Notes) -> None:
    """Count a row whose text is read from other columns than that of the first row, as JSON lines allow it."""
    if columns != first:
        kind = "are pairs of texts" if len(columns) > 1 else "are single texts"
        notes.add(f"rows {kind}, of the column {' and '.join(map(repr, columns))}, unlike the first", row[0])
