"""Results of a run in a file: CSV, JSON lines or Parquet. The file is complete, or it is not there."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Tuple

from offramp.errors import OfframpError, import_error
from offramp.session.results import Result
from offramp.store.files import write_atomic
from offramp.tasks.images import Image

Cells = Dict[str, Any]
"""One row: column -> cell."""
_ROWS_AT_ONCE, _CHARACTERS_AT_ONCE = 1024, 1 << 18
"""Most rows of a row group of Parquet, and the number of characters of its inputs at which it ends earlier."""


def require_library(path: str) -> None:
    """Raise OfframpError for Parquet without pyarrow.

    A file is made in memory, so that the plan counts what that takes: pyarrow loads more libraries when it is used.
    """
    if path.lower().endswith(".parquet"):
        try:
            for _ in _parquet(iter([{"input": "a", "label": "b", "labels": ("c",), "score": 0.5}] * _ROWS_AT_ONCE)):
                pass
        except ImportError as error:
            found = import_error(error, "pyarrow", "data")
            remedy = f"{found.remedy}; .csv and .jsonl need no library"
            raise OfframpError(found.what, path, remedy) from None


def write_results(path: str, answers: Iterable[Tuple[Any, Result]]) -> None:
    """Write a row for each (input, result), in order, while they are computed; a link at `path` is followed.

    Rows have the keys of `offramp run --json`, and `input`: a text, a pair of texts, or the place of an image. CSV and
    Parquet leave out keys that do not apply to the model, and have a column `scores.LABEL` for each label. Lists are
    JSON in CSV.

    Raises DiskFullError, and what computing the answers raises; then there is no new file.
    """
    rows = ({"input": _name(given), **asdict(result)} for given, result in answers)
    write_atomic(Path(os.path.realpath(path)), FORMATS[Path(path).suffix.lower()](rows))


def _name(given: Any) -> Any:
    """Return an input as a value of JSON; None for arrays, and for images that are in memory."""
    if isinstance(given, (tuple, list)):
        return list(given)
    return str(given) if isinstance(given, (str, Image)) else None


def _json_lines(rows: Iterator[Cells]) -> Iterator[bytes]:
    for row in rows:
        line = json.dumps(row, ensure_ascii=False, allow_nan=False)
        yield line.encode("utf-8", "backslashreplace") + b"\n"  # the escape of a lone surrogate is that of JSON


def _csv_lines(rows: Iterator[Cells]) -> Iterator[bytes]:
    buffer = io.StringIO()
    writer = csv.writer(buffer, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    for number, row in enumerate(map(_columns, rows)):
        if number == 0:
            writer.writerow(row)
        writer.writerow(json.dumps(cell) if isinstance(cell, list) else cell for cell in row.values())
        yield buffer.getvalue().encode("utf-8", "backslashreplace")
        buffer.seek(0)
        buffer.truncate()


def _columns(row: Cells) -> Cells:
    """Return a row of numbers, texts and lists. A cell that is None is None in all rows of a model."""
    cells: List[Tuple[str, Any]] = []
    for name, cell in row.items():
        if isinstance(cell, dict):
            cells += [(f"{name}.{key}", value) for key, value in cell.items()]
        elif name == "input" and isinstance(cell, list):
            cells.append((name, json.dumps(cell, ensure_ascii=False)))
        elif cell is not None:
            cells.append((name, list(cell) if isinstance(cell, tuple) else cell))
    return dict(cells)


def _parquet(rows: Iterator[Cells]) -> Iterator[bytes]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    columns = map(_columns, rows)
    first = next(columns)
    kinds = {
        "input": pa.string(),
        "label": pa.string(),
        "labels": pa.list_(pa.string()),
        "values": pa.list_(pa.float64()),
    }
    kinds.update(dict.fromkeys(("exit_stage", "stages_run", "bytes_read"), pa.int64()))
    schema = pa.schema([(_encodable(name), kinds.get(name, pa.float64())) for name in first])
    sink, columns = io.BytesIO(), chain([first], columns)
    with ParquetWriter(sink, schema) as writer:
        for group in _groups(columns):
            writer.write_table(pa.table([[_encodable(row[name]) for row in group] for name in first], schema=schema))
            yield _drained(sink)
    yield _drained(sink)


def _groups(rows: Iterator[Cells]) -> Iterator[List[Cells]]:
    group, size = [], 0
    for row in rows:
        group.append(row)
        size += len(row.get("input", ""))
        if len(group) == _ROWS_AT_ONCE or size >= _CHARACTERS_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _drained(sink: io.BytesIO) -> bytes:
    data = sink.getvalue()
    sink.seek(0)
    sink.truncate()
    return data


def _encodable(cell: Any) -> Any:
    """Return a cell with lone surrogates, which UTF-8 does not have, as escapes."""
    if isinstance(cell, list):
        return [_encodable(each) for each in cell]
    return cell.encode("utf-8", "backslashreplace").decode() if isinstance(cell, str) else cell


FORMATS = {".csv": _csv_lines, ".jsonl": _json_lines, ".parquet": _parquet}
"""Suffix of a file -> function from rows to its bytes."""
