"""Labelled data: a specification (`DataSpec`), and the one function that loads what it names (`load`)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, List, Tuple, Union

from offramp.errors import UsageError
from offramp.tasks import arrays, images
from offramp.tasks.examples import Example, Splits, cut, parse_label, sorted_labels
from offramp.tasks.glue import load_files, load_hub, task_of
from offramp.tasks.metrics import default_metrics
from offramp.tasks.tables import field, read_table, text_of

TEXT_COLUMN = "sentence"
"""Name of the text column of a table, unless the specification names another."""
PathLike = Union[str, "os.PathLike[str]"]
_TYPES = {
    "label_column": (str,), "labels": (tuple, type(None)), "regression": (bool,), "split_seed": (int,),
    "offline": (bool,),
}  # fmt: skip
"""Types of the fields that are not a string or None."""
_REMEDY = "give a task, or a train or dev file with the names of its columns"


@dataclass(frozen=True)
class DataSpec:
    """Labelled data: either a task of GLUE, or files of your own. Checked when it is made, except for file contents.

    Raises ValueError for a value of the wrong type, UsageError for fields that contradict each other.
    """

    task: str | None = None
    """Name of a GLUE task: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli."""
    data: PathLike | None = None
    """Folder of GLUE's folders or zips; None: the hub's data set."""
    train: PathLike | None = None
    """File of your own that is cut into train, tune and certify: a table (.tsv, .csv, .jsonl, .parquet), a folder or
    zip of images with one folder for each class, or an .npz of arrays. None: there is only `dev`."""
    dev: PathLike | None = None
    """File of your own that is only reported; None: a part of `train`."""
    text_column: str | None = None
    """Column of the text in a table; None: `sentence`."""
    pair_column: str | None = None
    """Column of the second text, if the table has pairs."""
    label_column: str = "label"
    """Column of a table, or array of an .npz, with the labels."""
    labels: tuple[str, ...] | None = None
    """Names of the label ids in your own files; None: the labels of the first file, sorted. Unused for GLUE tasks."""
    regression: bool = False
    """True if the labels in your own files are numbers to be predicted."""
    split_seed: int = 0
    """Seed of the hash by which examples are assigned to splits."""
    offline: bool = False
    """True to read the hub's data set from the local cache only."""

    def __post_init__(self) -> None:
        for name in ("data", "train", "dev"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        if self.labels is not None:
            object.__setattr__(self, "labels", tuple(self.labels))
        self._require_types()
        own = self.train or self.dev
        if bool(self.task) == bool(own):
            raise UsageError("both a task and a table" if own else "no data", None, _REMEDY)
        if own and self.data:
            raise UsageError("data names a folder of GLUE, and no task is given", self.data, "give a task")
        if self.task:
            task_of(self.task)

    def _require_types(self) -> None:
        for name, value in vars(self).items():
            types = _TYPES.get(name, (str, type(None)))
            if type(value) not in types:
                raise ValueError(f"{name} must be {' or '.join(each.__name__ for each in types)}, not {value!r}")
        if self.labels is not None and not (self.labels and all(isinstance(label, str) for label in self.labels)):
            raise ValueError(f"labels must be names, at least one, not {self.labels}")
        if self.labels is not None and self.regression:
            raise ValueError(f"labels must be None for a regression, not {self.labels}")

    def to_json(self) -> dict[str, Any]:
        """Return the specification as a JSON object, which `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> DataSpec:
        """Read a specification. Raises ValueError for an unknown key, and the errors of the constructor."""
        unknown = sorted(set(tree) - {each.name for each in fields(cls)})
        if unknown:
            raise ValueError(f"unknown key {unknown[0]!r}, known are {', '.join(each.name for each in fields(cls))}")
        return cls(**tree)


def load(spec: DataSpec) -> Splits:
    """Load labelled data and cut them into splits.

    A train file is cut into train, tune and certify, and, without a dev file, into dev as well. The split of an example
    depends on its content and `split_seed` only. Scores of your own files are accuracy, or Pearson's and Spearman's
    correlations for a regression.

    Raises UsageError for a file that cannot be read or has another layout, a missing column, a label that is not one of
    `labels`, fewer than two labels, and an empty split; SourceError for a failed download; MissingExtraError for a
    library that is not installed.
    """
    if spec.task is None:
        return _load_own(spec)
    task = task_of(spec.task)
    if spec.data is not None:
        return load_files(task, Path(spec.data), spec.split_seed)
    return load_hub(task, spec.split_seed, offline=spec.offline)


def _load_own(spec: DataSpec) -> Splits:
    train, dev = (Path(path) if path else None for path in (spec.train, spec.dev))
    first = train or dev
    assert first is not None
    labels_of, examples_of = _readers_of(spec)
    labels = () if spec.regression else spec.labels or tuple(labels_of(first))
    examples = {} if train is None else cut(examples_of(train, labels), dev is not None, spec.split_seed)
    if dev is not None:
        examples["dev"] = list(examples_of(dev, labels))
    name = first.absolute().stem
    return Splits(name, labels, default_metrics(labels), examples, cuts_dev=dev is None).require_examples(first)


_Readers = Tuple[Callable[[Path], List[str]], Callable[[Path, Sequence[str]], Iterator[Example]]]
"""Functions that read one kind of labelled file.

The first returns the labels that occur in a file, sorted. The second yields its examples, whose labels must be among
those given.
"""


def _readers_of(spec: DataSpec) -> _Readers:
    """Return the readers for the files of a specification, chosen by their suffixes."""
    paths = [str(path) for path in (spec.train, spec.dev) if path]
    if all(path.endswith(arrays.SUFFIX) for path in paths):
        column = spec.label_column
        return partial(arrays.array_labels, column=column), partial(arrays.labelled_records, column=column)
    if not all(images.is_image_source(path) for path in paths):
        return partial(_table_labels, spec), partial(_table_examples, spec)
    if spec.regression:
        raise UsageError("folders of images have classes, and this is a regression", paths[0], "use a classifier")
    if spec.text_column or spec.pair_column:
        raise UsageError("text_column and pair_column are for texts, the data are images", paths[0], "leave them out")
    return images.class_names, images.labelled_images


def _table_labels(spec: DataSpec, path: Path) -> list[str]:
    column = spec.label_column
    return sorted_labels({label for row in read_table(path) if (label := field(row, column)).strip()}, column, path)


def _table_examples(spec: DataSpec, path: Path, labels: Sequence[str]) -> Iterator[Example]:
    texts = (spec.text_column or TEXT_COLUMN, *([spec.pair_column] if spec.pair_column else []))
    for row in read_table(path):
        label = field(row, spec.label_column)
        empty = next((name for name in (*texts, spec.label_column) if not field(row, name).strip()), None)
        if empty is not None:
            raise UsageError(f"column {empty!r} is empty", row[0], "correct the row, or drop it")
        if labels and label not in labels:  # ids are not accepted: label 2 of ("1", "2") is "2"
            raise UsageError(f"label {label!r} is none of {', '.join(labels)}", row[0], "correct the line")
        yield Example(text_of(row, texts), parse_label(label, labels, row[0]))
