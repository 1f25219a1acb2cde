"""Records of arrays: inputs of a module that takes neither texts nor images, and .npz files of records.

Shapes: N records of a file, B records of a batch.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from offramp.errors import UsageError, missing
from offramp.program.inputs import Batch
from offramp.store.files import open_plain
from offramp.tasks.examples import Example, ids_by_name, parse_label, sorted_labels
from offramp.tasks.images import Image
from offramp.tasks.lines import Log, silent
from offramp.tasks.processors import FILE_NAME as PROCESSOR
from offramp.tasks.tables import label_field

SUFFIX = ".npz"
_REMEDY = "save one array for each argument with numpy.savez; the first axis of each counts records"


@dataclass(frozen=True, eq=False)
class Record:
    """One input: an array for each argument, without the batch axis. Positional arguments are named "0", "1", ..."""

    arrays: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, item: Any) -> Record:
        """Return the record of an array or tensor, a sequence of them (positional arguments), or a mapping by name.

        Raises UsageError for a text or an image.
        """
        if isinstance(item, Record):
            return item
        if isinstance(item, (Image, bytes)):
            what = f"the store has no image processor ({PROCESSOR}), so that the module takes arrays, not images"
            raise UsageError(what, item if isinstance(item, Image) else None, f"divide a folder that has {PROCESSOR}")
        if isinstance(item, str):
            raise UsageError("the module takes arrays, not texts", str(item)[:60], "give --input FILE.npz")
        if not isinstance(item, Mapping):
            item = {str(i): part for i, part in enumerate(item if isinstance(item, (tuple, list)) else [item])}
        return cls({name: _array(part) for name, part in item.items()})

    def read(self) -> bytes:
        """Return bytes that are equal exactly for equal records."""
        parts = [(name, str(array.dtype), array.shape, array.tobytes()) for name, array in sorted(self.arrays.items())]
        return repr(parts).encode()

    def __str__(self) -> str:
        return ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in self.arrays.items())


class ArrayInputs:
    """Encoder of records for one module: an `InputEncoder` that stacks arrays."""

    max_length = 1

    def __init__(self, wanted: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """`wanted` is the dtype and the shape of one record, by argument."""
        self._wanted = wanted
        self.sample = (Record({name: np.zeros(shape, dtype) for name, (dtype, shape) in wanted.items()}),)

    def encode(self, inputs: Sequence[Any]) -> Batch:
        """Return each argument stacked to [B, ...]. Other arrays of a record, such as a label, are ignored.

        Raises UsageError for a missing argument, and for arrays whose dtype, number of axes or shape does not fit.
        """
        records = [Record.of(item) for item in inputs]
        wanted = {name: (dtype, len(shape)) for name, (dtype, shape) in self._wanted.items()}
        for record in records:
            if {name: (str(a.dtype), a.ndim) for name, a in record.arrays.items() if name in wanted} != wanted:
                expected = ", ".join(f"{name}: {dtype}, {num_axes} axes" for name, (dtype, num_axes) in wanted.items())
                raise UsageError(f"the module takes ({expected}), not ({record})", None, _REMEDY)
        require_alike(records, self._wanted)
        return Batch(stacked(records, self._wanted), len(records), 1, np.ones(len(records), np.int64))

    def lengths(self, inputs: Iterable[Any]) -> Iterator[int]:
        """Yield 1 for each record."""
        return (1 for _ in inputs)

    def encoding_bytes(self, inputs: Iterable[Any]) -> int:
        """Return the size in bytes of the largest record: stacking copies it."""
        return max((sum(array.nbytes for array in Record.of(item).arrays.values()) for item in inputs), default=0)


def stacked(records: Sequence[Record], names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Return the arguments of all records as arrays [B, ...]; if `names` is given, these arguments only."""
    return {name: np.stack([record.arrays[name] for record in records]) for name in names or records[0].arrays}


def require_alike(records: Sequence[Record], names: Collection[str] | None = None) -> None:
    """Raise UsageError unless each argument has the same shape in all records, so that they can form a batch."""
    shapes: dict[str, tuple[int, ...]] = {}
    for record in records:
        for name, array in record.arrays.items():
            if (names is None or name in names) and shapes.setdefault(name, array.shape) != array.shape:
                what = f"{name} is {list(array.shape)} in one record and {list(shapes[name])} in another"
                raise UsageError(what, None, "give arrays of one shape, or one record at a time")


def records_at(path: Path) -> list[Record]:
    """Read the records of an .npz file. Raises UsageError."""
    return _records(_arrays(path), path)


def array_labels(path: Path, column: str) -> list[str]:
    """Return the distinct labels in the array `column` of an .npz file, sorted. Raises UsageError."""
    return sorted_labels(set(_labels(_arrays(path), column, path)), column, path)


def labelled_records(path: Path, labels: Sequence[str], column: str, log: Log = silent) -> Iterator[Example]:
    """Yield the records of an .npz file with their labels: names, or where none is a name, ids; numbers if `labels` is
    empty. `log` receives a line where they are ids.

    Raises UsageError for arrays that do not fit together, and for a label that is not one of `labels`.
    """
    arrays = _arrays(path)
    names = _labels(arrays, column, path)
    del arrays[column]
    records = _records(arrays, path)
    if len(names) != len(records):
        raise UsageError(f"{len(records)} records and {len(names)} labels", path, _REMEDY)
    ids, notice = ids_by_name(names, labels, bool(labels))
    if notice is not None:
        log(f"{path}: {notice}")
    for index, (record, name) in enumerate(zip(records, names)):
        yield Example(record, parse_label(name, labels, f"{path}[{index}]", ids))


def _array(part: Any) -> np.ndarray:
    """Convert an array, a number, or a tensor on any device."""
    return part.detach().cpu().numpy() if hasattr(part, "detach") else np.asarray(part)


def _labels(arrays: Mapping[str, np.ndarray], column: str, path: Path) -> list[str]:
    """Return the labels of all records as text, as those of a table are read. Raises UsageError."""
    if column not in arrays or arrays[column].ndim != 1:
        raise UsageError(f"no array {column!r} of labels, found {', '.join(arrays)}", path, "name it by --label-column")
    cells = arrays[column].tolist()
    return [label_field((f"{path}[{index}]", {column: cell}), column) for index, cell in enumerate(cells)]


def _records(arrays: Mapping[str, np.ndarray], path: Path) -> list[Record]:
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if not counts or len(set(counts.values())) != 1 or not next(iter(counts.values())):
        found = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise UsageError(f"the arrays do not have equal numbers of records ({found})", path, _REMEDY)
    (count,) = set(counts.values())
    return [Record({name: array[index] for name, array in arrays.items()}) for index in range(count)]


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with os.fdopen(open_plain(path), "rb") as data, np.load(data, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as error:
        raise UsageError(f"cannot be read ({error.strerror or error})", path, "check the path") from None
    except (
        ValueError,
        BadZipFile,
        AttributeError,
        EOFError,
        RuntimeError,
        zlib.error,
    ) as error:  # RuntimeError: zipfile
        raise UsageError(f"no arrays ({error})", path, _REMEDY) from None
