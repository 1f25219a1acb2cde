"""Records of arrays, as the inputs of a module that takes neither texts nor images, and labelled records from a file.

Shapes: N records of a file, B of a batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from offramp.errors import UsageError
from offramp.tasks.examples import Example, Splits, cut, parse_label
from offramp.tasks.metrics import default_metrics
from offramp.tasks.own import in_order

SUFFIX = ".npz"
_REMEDY = "save the arrays with numpy.savez, by argument; the first extent of each counts records"


@dataclass(frozen=True, eq=False)
class Record:
    """One input: arrays by argument, each without the extent of rows. Arguments without a name are called 0, 1, ..."""

    arrays: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, item: Any) -> Record:
        """Of an array (or a tensor), a sequence of them as positional arguments, or a mapping by name."""
        if isinstance(item, Record):
            return item
        if isinstance(item, (str, bytes)):
            raise UsageError("the module takes arrays, and this is none", str(item)[:60], "give --input FILE.npz")
        if not isinstance(item, Mapping):
            item = {str(i): part for i, part in enumerate(item if isinstance(item, (tuple, list)) else [item])}
        return cls({name: _array(part) for name, part in item.items()})

    def read(self) -> bytes:
        """What tells it from others."""
        parts = [(name, str(array.dtype), array.shape, array.tobytes()) for name, array in sorted(self.arrays.items())]
        return repr(parts).encode()

    def __str__(self) -> str:
        return ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in self.arrays.items())


class ArrayInputs:
    """Stacks records for one module: what `TextEncoder` is for texts."""

    max_length = 1
    """A record has no length."""

    def __init__(self, wanted: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """`wanted`: dtype and shape of one record, by argument."""
        self._wanted = wanted
        self.sample = (Record({name: np.zeros(shape, dtype) for name, (dtype, shape) in wanted.items()}),)
        """What a process encodes to come to its footprint."""

    def encode(self, items: Sequence[Any]) -> dict[str, np.ndarray]:
        """Argument -> [B, ...]; other arrays, as of labels, are left out. Raises UsageError for arguments that are
        missing, and for another dtype or number of extents than the module takes.
        """
        records = [Record.of(item) for item in items]
        for record in records:
            self._require(record)
        require_alike(records, self._wanted)
        return stacked(records, self._wanted)

    def encoding_bytes(self, items: Iterable[Any]) -> int:
        """The most that stacking one of these takes."""
        return max((sum(array.nbytes for array in Record.of(item).arrays.values()) for item in items), default=0)

    def _require(self, record: Record) -> None:
        found = {name: (str(a.dtype), a.ndim) for name, a in record.arrays.items() if name in self._wanted}
        wanted = {name: (dtype, len(shape)) for name, (dtype, shape) in self._wanted.items()}
        if found != wanted:
            told = ", ".join(f"{name}: {dtype}, {extents} extents" for name, (dtype, extents) in wanted.items())
            raise UsageError(f"the module takes ({told}), not ({record})", None, _REMEDY)


def stacked(records: Sequence[Record], names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """Argument -> [B, ...], of all records; `names`: these arguments alone."""
    return {name: np.stack([record.arrays[name] for record in records]) for name in names or records[0].arrays}


def require_alike(records: Sequence[Record], names: Collection[str] | None = None) -> None:
    """Raise UsageError unless arrays of one name have one shape, so that they can be a batch."""
    shapes: dict[str, tuple[int, ...]] = {}
    for record in records:
        for name, array in record.arrays.items():
            if (names is None or name in names) and shapes.setdefault(name, array.shape) != array.shape:
                what = f"{name} is {list(array.shape)} in one record and {list(shapes[name])} in another"
                raise UsageError(what, None, "give arrays of one shape, or one record at a time")


def _array(part: Any) -> np.ndarray:
    """Of an array or a number, or of a tensor, wherever it lies."""
    return part.detach().cpu().numpy() if hasattr(part, "detach") else np.asarray(part)


@dataclass(frozen=True, eq=False)
class ArrayRows:
    """Labelled records as rows of a batch."""

    records: Sequence[Record]
    labels_N: np.ndarray

    def __len__(self) -> int:
        return len(self.records)

    @property
    def lengths_N(self) -> np.ndarray:
        """All alike."""
        return np.ones(len(self), np.int64)

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Each argument [B, ...], and `labels` [B]."""
        return {**stacked([self.records[int(index)] for index in indices]), "labels": self.labels_N[indices]}


def records_at(path: Path) -> list[Record]:
    """The records of an .npz file. Raises UsageError."""
    return _records(_arrays(path), path)


def _records(arrays: Mapping[str, np.ndarray], path: Path) -> list[Record]:
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if not counts or len(set(counts.values())) != 1 or not next(iter(counts.values())):
        told = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise UsageError(f"the arrays hold no equal numbers of records ({told})", path, _REMEDY)
    (count,) = set(counts.values())
    return [Record({name: array[index] for name, array in arrays.items()}) for index in range(count)]


def load_arrays(
    train: Path | None, dev: Path | None, label: str, labels: Sequence[str] | None = None, split_seed: int = 0
) -> Splits[Record]:
    """Cut the records of a file into train, tune and certify, and, without `dev`, into dev as well, by their content.

    Args:
        train: an .npz with an array for each argument, and one called `label`: names or ids, numbers of a regression.
            May be None where `labels` are given: then there is dev alone.
        labels: the name of each label id; none: a regression. None: those that the train file has, sorted.

    Scores are accuracy, or Pearson's and Spearman's correlations. Raises UsageError for arrays that do not fit
    together, a label that is none of `labels`, fewer than two labels, so many numbers that they are values, an empty
    split.
    """
    first = train or dev
    if first is None:
        raise UsageError("no records", None, f"name a file that ends in {SUFFIX}")
    labelled = {path: _labelled(path, label) for path in (train, dev) if path is not None}
    if labels is None:
        labels = in_order({str(found) for found in labelled[first][1]}, label, first)
    examples = {} if train is None else cut(_examples(train, *labelled[train], labels), dev is not None, split_seed)
    if dev is not None:
        examples["dev"] = list(_examples(dev, *labelled[dev], labels))
    splits = Splits(first.stem, tuple(labels), default_metrics(labels), examples, cuts_dev=dev is None)
    return splits.require_examples(first)


def _examples(
    path: Path, records: Sequence[Record], found: np.ndarray, labels: Sequence[str]
) -> Iterator[Example[Record]]:
    for index, (record, name) in enumerate(zip(records, found, strict=True)):
        yield Example(record, parse_label(str(name), labels, f"{path}[{index}]"))


def _labelled(path: Path, label: str) -> tuple[list[Record], np.ndarray]:
    """The records of a file, and the label of each."""
    arrays = _arrays(path)
    if label not in arrays or arrays[label].ndim != 1:
        raise UsageError(f"no array {label!r} of labels, found {', '.join(arrays)}", path, "name it by --label-column")
    found = arrays.pop(label)
    records = _records(arrays, path)
    if len(found) != len(records):
        raise UsageError(f"{len(records)} records and {len(found)} labels", path, _REMEDY)
    return records, found


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as data, np.load(data, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except OSError as error:
        raise UsageError(f"cannot be read ({error.strerror or error})", path, "check the path") from None
    except (ValueError, BadZipFile, AttributeError, EOFError) as error:
        raise UsageError(f"no arrays ({error})", path, _REMEDY) from None
