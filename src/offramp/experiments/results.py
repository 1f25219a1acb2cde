"""A folder of results: records as JSON lines with a checksum each, which are only added to.

    results.json    the version of the format
    records.jsonl   one record a job; a line is {"sha256": digest of what follows, "record": {...}}
    made/           what jobs need first, made once (`prerequisites`)

One process writes to a folder at a time, under a lock. A line that a killed process left half-written is cut off by the
next writer at the last good byte. Nothing else is ever changed: a job that is measured again has a second line, and the
last line of an id is its record.
"""

import array
import base64
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from offramp.errors import DamagedError, RefusedError, UsageError, require_folder
from offramp.experiments.children import Log
from offramp.experiments.record_parts import LEAST_NUMBER, MOST_NUMBER, require_parts
from offramp.program.checks import WrongError, parse, parsed_bytes, read, strict_json
from offramp.store.files import (
    fsync,
    lock_folder,
    open_plain,
    open_written,
    read_plain,
    translate_disk_full,
    write_all,
    write_atomic,
)

FORMAT = 1
RECORDS, ABOUT, MADE = "records.jsonl", "results.json", "made"
_BEFORE, _BETWEEN = b'{"sha256": "', b'", "record": '
_START = len(_BEFORE) + 64 + len(_BETWEEN)
MAX_RECORD_BYTES, MAX_RECORD_VALUES = 16 << 20, 1_000_000
"""Longest record that is read or added, and most values of one, besides those of packed samples."""
MAX_PARSED_BYTES = 120 << 20
"""Most memory that parsing of a record may take, as `checks.parsed_bytes` bounds it: three times what records take."""
MAX_ROWS, MAX_PACKED_VALUES = 500_000, 4_000_000
"""Most rows of data that are measured at once, so that their record can be kept, and most values of packed samples."""
PACKED_FROM = 20_000
"""Length from which samples are packed: written as the bytes of an array, in base64."""
_PACKED_KEYS = {"packed", "base64"}
_PACKED = {"u1": "B", "i8": "q", "f8": "d"}
"""Name of a type in packed samples -> its code of the module array."""
_MAX_ABOUT_BYTES = 1 << 20
_REMEDY = "restore the file, or name another folder"
Record = Mapping[str, Any]


_EMPTY = {"figures": {}, "samples": {}, "inputs": {}, "round": 1, "key": ""}
"""Values of a record that lacks these names: one of a study that was converted."""


class TooLargeError(UsageError):
    """A record takes more memory than is read of a record."""


class Results:
    """A results folder that this process writes to. A context manager: the lock ends with the block.

    Raises UsageError if another process writes to the folder or it is not a results folder, RefusedError for one of
    another version, DamagedError for a damaged line before the last.
    """

    def __init__(self, folder: Path, log: Log) -> None:
        self.folder = folder
        self._release = lock_folder(folder, "cannot make a results folder there", "another sweep writes to this folder")
        try:
            _require_version(folder)
            if not (folder / ABOUT).exists():
                _require_empty(folder)
                write_atomic(folder / ABOUT, [json.dumps({"format": FORMAT}).encode() + b"\n"])
            self._fd = open_written(folder / RECORDS, os.O_APPEND)
        except BaseException:
            self._release()
            raise
        try:
            self.records, good_bytes, torn = _parse(folder / RECORDS)
            if torn:
                _require_cut(self._fd, good_bytes, folder / RECORDS)
                os.ftruncate(self._fd, good_bytes)
                log(f"{folder / RECORDS}: {torn} bytes of a line that was not finished are cut off")
        except BaseException:
            self.close()
            raise
        self.num_bytes = good_bytes

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and release the lock."""
        os.close(self._fd)
        self._release()

    def add(self, record: Record) -> None:
        """Add a record: it is on the disk when this returns.

        Raises DiskFullError, and TooLargeError for one that could not be read again; neither leaves a part of it.
        """
        record = _finite(record)
        line = line_of(record)
        try:
            _require_small(line)
        except ValueError as error:
            remedy = "give fewer rows, or passes, or no trace"
            raise TooLargeError(f"result not kept ({error})", self.folder, remedy) from None
        with translate_disk_full(self.folder / RECORDS):
            try:
                write_all(self._fd, line)
                fsync(self._fd)
            except OSError:
                os.ftruncate(self._fd, self.num_bytes)
                raise
        self.num_bytes += len(line)
        self.records.append(record)


def line_of(record: Record) -> bytes:
    """Return the line of a record. Numbers that are not finite become null, which JSON has no other words for."""
    body = json.dumps(_finite(_packed(record)), allow_nan=False, separators=(",", ":")).encode()
    return _BEFORE + hashlib.sha256(body).hexdigest().encode() + _BETWEEN + body + b"}\n"


def read_results(folder: Path, log: Log) -> list[dict[str, Any]]:
    """Return the records of a folder, which another process may be adding to: a line that is not finished is left out.

    Raises UsageError for a folder without records, RefusedError for one of another version, DamagedError.
    """
    require_folder(folder, "results folder", "name a folder that offramp sweep wrote")
    if not (folder / ABOUT).is_file():
        raise UsageError("not a results folder", folder, "name a folder that offramp sweep wrote")
    records = read_records(folder, log)
    if not records:
        raise UsageError("no records", folder, "run offramp sweep first")
    return records


def read_records(folder: Path, log: Log) -> list[dict[str, Any]]:
    """Return the records of a results folder, perhaps none; the errors are those of `read_results`."""
    _require_version(folder)
    if not (folder / RECORDS).is_file():
        return []
    records, _, torn = _parse(folder / RECORDS)
    if torn:
        log(f"{folder / RECORDS}: the last line is not finished, and is left out")
    return records


def _parse(path: Path) -> tuple[list[Any], int, int]:
    """Return the records, the bytes up to the end of the last good line, and the bytes behind it."""
    records, good_bytes, position, bad = [], 0, 0, None
    with os.fdopen(open_plain(path), "rb") as file:
        for number, line in enumerate(_lines(file, path), 1):
            position += len(line)
            if not _is_whole(line):
                bad = bad or number
                continue
            if bad is not None:
                what = "the line is damaged, and lines after it are not"
                raise DamagedError(what, f"{path}, line {bad}", "restore the file, or name another --out")
            try:
                _require_small(line)
                tree = strict_json(line[_START:-2], most_bytes=MAX_PARSED_BYTES)
                record = _unpacked(read(dict[str, Any], tree, "it"))
            except ValueError as error:
                raise DamagedError(f"no record ({error})", f"{path}, line {number}", _REMEDY) from None
            records.append(record)
            good_bytes = position
    return _newest(records), good_bytes, position - good_bytes


def _newest(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return records without those that a later one of the same id replaces; records of studies have no id."""
    found: dict[Any, dict[str, Any]] = {}
    for number, record in enumerate(records):
        name = record["id"] if isinstance(record.get("id"), str) else number
        found.pop(name, None)
        found[name] = record
    return list(found.values())


def _require_cut(fd: int, good_bytes: int, path: Path) -> None:
    """Raise DamagedError for a file without records that does not begin as one: it may be any file."""
    beginning = os.pread(fd, len(_BEFORE), 0)
    if not good_bytes and not _BEFORE.startswith(beginning) and beginning.strip(b"\0"):
        raise DamagedError("no file of records", path, _REMEDY)


def _packed(record: Record) -> Record:
    """Return a record whose long lists of numbers are packed: those of many rows, which would take much memory."""
    samples = record.get("samples")
    if not isinstance(samples, Mapping):
        return record
    return {**record, "samples": {name: _pack(values) for name, values in samples.items()}}


def _pack(values: Any) -> Any:
    if not isinstance(values, list) or len(values) < PACKED_FROM:
        return values
    if all(type(value) is float and math.isfinite(value) for value in values):
        kind = "f8"
    elif all(type(value) is int and -(2**63) <= value < 2**63 for value in values):
        kind = "u1" if min(values) >= 0 and max(values) < 256 else "i8"
    else:
        return values
    return {"packed": kind, "base64": base64.b64encode(_little(array.array(_PACKED[kind], values)).tobytes()).decode()}


def _unpacked(record: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `_packed`. Raises ValueError for bytes that are no such samples, and for too many."""
    samples = record.get("samples")
    if not isinstance(samples, dict):
        return record
    packed = {name: each for name, each in samples.items() if isinstance(each, dict) and each.keys() == _PACKED_KEYS}
    if sum(map(_num_packed, packed.values())) > MAX_PACKED_VALUES:
        raise ValueError("more packed samples than are kept of a record")
    return {**record, "samples": {**samples, **{name: _unpack(each) for name, each in packed.items()}}}


def _num_packed(packed: Mapping[str, Any]) -> int:
    """Return the number of values of packed samples without decoding them."""
    if not isinstance(packed["packed"], str) or packed["packed"] not in _PACKED:
        raise ValueError(f"packed samples of an unknown type {packed['packed']!r}")
    text = str(packed["base64"])
    return (len(text) * 3 // 4 - text[-2:].count("=")) // array.array(_PACKED[packed["packed"]]).itemsize


def _unpack(packed: Mapping[str, Any]) -> list[Any]:
    found = array.array(_PACKED[packed["packed"]])
    found.frombytes(base64.b64decode(str(packed["base64"]), validate=True))
    if not all(map(math.isfinite, found)):
        raise ValueError("packed samples that no sweep writes")
    return _little(found).tolist()


def _little(found: Any) -> Any:
    """Return an array with its bytes in the order of records, or back in that of this machine."""
    if sys.byteorder == "big":
        found.byteswap()
    return found


def _lines(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yield the lines of a file. Raises DamagedError for one that is longer than any record."""
    while line := file.readline(MAX_RECORD_BYTES + 1):
        if len(line) > MAX_RECORD_BYTES:
            raise DamagedError(f"a line of more than {MAX_RECORD_BYTES} bytes", path, _REMEDY)
        yield line


def _is_whole(line: bytes) -> bool:
    """Return whether a line is as `line_of` writes it."""
    body = memoryview(line)[_START:-2]
    return line.startswith(_BEFORE + hashlib.sha256(body).hexdigest().encode() + _BETWEEN) and line.endswith(b"}\n")


def _require_small(line: bytes) -> None:
    """Raise ValueError for a record that takes too much memory. A list, an object or a name counts as three values."""
    num_values = line.count(b",") + 3 * sum(map(line.count, (b"[", b"{", b":")))
    if len(line) > MAX_RECORD_BYTES or num_values > MAX_RECORD_VALUES or parsed_bytes(line) > MAX_PARSED_BYTES:
        raise ValueError(f"{len(line)} bytes with some {num_values} values, more than are kept of a record")


def completed(record: Record, folder: str) -> Record:
    """Return a record with all parts that a report needs. Figures that nothing can have count as missing."""
    found = {**_EMPTY, **record}
    try:
        require_parts(found)
    except WrongError as error:
        name = record["id"] if isinstance(record.get("id"), str) else "without an id"
        what = f"record {name} has parts that no sweep writes ({error})"
        raise RefusedError(what, folder, "use the release that wrote it, or run the sweep again") from None
    found["experiment"] = {"seed": None, **(found.get("experiment") or {})}
    found["figures"] = {name: value if _is_figure(value) else None for name, value in found["figures"].items()}
    return {**found, "inputs": {"data": None, **found["inputs"]}}


def _is_figure(value: Any) -> bool:
    """Return whether a value is a number of a size that can be compared and drawn."""
    return isinstance(value, (int, float)) and (value == 0 or LEAST_NUMBER <= abs(value) <= MOST_NUMBER)


def _finite(tree: Any) -> Any:
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, Mapping):
        return {str(name): _finite(value) for name, value in tree.items()}
    return [_finite(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def _require_version(folder: Path) -> None:
    path = folder / ABOUT
    if not path.exists():
        return
    try:
        found = parse(dict[str, Any], read_plain(path, _MAX_ABOUT_BYTES), path.name).get("format")
    except (WrongError, OSError) as error:
        raise RefusedError(f"unreadable ({error})", path, "name another folder") from None
    if found != FORMAT:
        what = f"results of format {found}, and this release knows {FORMAT}"
        raise RefusedError(what, folder, "use the release that wrote them, or name another --out")


def _require_empty(folder: Path) -> None:
    others = sorted({path.name for path in folder.iterdir()} - {ABOUT + ".tmp"})  # left by a process that was killed
    if others:
        what = f"not a results folder: it holds {', '.join(others[:3])}"
        raise UsageError(what, folder, "name a new folder with --out")
