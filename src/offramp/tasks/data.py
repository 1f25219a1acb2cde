"""Labelled data: a specification (`DataSpec`), and the one function that loads what it names (`load`)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, List, Tuple, Union

from offramp.errors import UsageError
from offramp.program.checks import require_known
from offramp.tasks import arrays, images
from offramp.tasks.columns import TEXT_COLUMNS
from offramp.tasks.examples import Example, Splits, cut, ids_by_name, label_notices, parse_label, sorted_labels
from offramp.tasks.frames import frame_name, is_frame
from offramp.tasks.glue import load_files, load_hub, task_of
from offramp.tasks.lines import MAX_PLACES, Log, Notes
from offramp.tasks.metrics import default_metrics
from offramp.tasks.tables import (
    Layout,
    Row,
    label_field,
    label_spelling,
    note_columns,
    read_table,
    require_columns,
    text_columns,
    text_of,
)
from offramp.tasks.text import Text

PathLike = Union[str, "os.PathLike[str]"]
_TYPES = {
    "label_column": (str,), "labels": (tuple, type(None)), "regression": (bool,), "split_seed": (int,),
    "offline": (bool,), "header": (bool, type(None)), "quotes": (bool, type(None)),
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
    train: PathLike | Any | None = None
    """Data of your own that are cut into train, tune and certify: a table (.tsv, .csv, .jsonl, .parquet, a pipe, a data
    set of Hugging Face `datasets`, a frame of pandas), a folder or zip of images with one folder for each class, or an
    .npz of arrays. None: there is only `dev`."""
    dev: PathLike | Any | None = None
    """Data of your own that are only reported; None: a part of `train`."""
    text_column: str | None = None
    """Column of the text in a table; None: `sentence`, or else `text`."""
    pair_column: str | None = None
    """Column of the second text, if the table has pairs; None: `pair`, if there is one."""
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
    format: str | None = None
    """Format of a table; see `tables.Layout`, also for `header` and `quotes`."""
    header: bool | None = None
    quotes: bool | None = None

    def __post_init__(self) -> None:
        for name in ("data", "train", "dev"):
            if getattr(self, name) is not None and not is_frame(getattr(self, name)):
                object.__setattr__(self, name, os.fspath(getattr(self, name)))
        if self.labels is not None:
            object.__setattr__(self, "labels", tuple(self.labels))
        self._require_types()
        own = self.train is not None or self.dev is not None
        if bool(self.task) == own:
            raise UsageError("both a task and a table" if own else "no data", None, _REMEDY)
        if own and self.data:
            raise UsageError("data names a folder of GLUE, and no task is given", self.data, "give a task")
        if self.task:
            task_of(self.task)
            self._require_own_columns()

    def _require_types(self) -> None:
        for name, value in vars(self).items():
            types = _TYPES.get(name, (str, type(None)))
            if type(value) not in types and not (name in ("train", "dev") and is_frame(value)):
                raise ValueError(f"{name} must be {' or '.join(each.__name__ for each in types)}, not {value!r}")
        if self.labels is not None and not (self.labels and all(isinstance(label, str) for label in self.labels)):
            raise ValueError(f"labels must be names, at least one, not {self.labels}")
        if self.labels is not None and self.regression:
            raise ValueError(f"labels must be None for a regression, not {self.labels}")

    def _require_own_columns(self) -> None:
        """Raise UsageError for the layout of a table, which a task of GLUE does not need."""
        given = [
            name
            for name in ("text_column", "pair_column", "format", "header", "quotes")
            if getattr(self, name) is not None
        ]
        given += [] if self.label_column == "label" else ["label_column"]
        if given:
            what = f"a task of GLUE has columns of its own, and {', '.join(given)} would have no effect"
            raise UsageError(what, None, "leave it out, or give a table in place of the task")

    def to_json(self) -> dict[str, Any]:
        """Return the specification as a JSON object, which `from_json` reads.

        Raises ValueError for a table in memory.
        """
        if is_frame(self.train) or is_frame(self.dev):
            raise ValueError("a table in memory has no JSON form: write it to a .parquet file")
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> DataSpec:
        """Read a specification. Raises ValueError for an unknown key, and the errors of the constructor."""
        require_known(cls, tree, "key")
        return cls(**tree)


def load(spec: DataSpec, log: Log = warnings.warn) -> Splits:
    """Load labelled data and cut them into splits.

    A train file is cut into train, tune and certify, and, without a dev file, into dev as well. The split of an example
    depends on its content and `split_seed` only. Scores of your own files are accuracy, or Pearson's and Spearman's
    correlations for a regression. `log` receives what was guessed, and the number of rows that were skipped.

    Raises UsageError for a file that cannot be read or has another layout, a missing column, a label that is not one of
    `labels`, fewer than two labels, and an empty split; SourceError for a failed download; MissingExtraError for a
    library that is not installed.
    """
    if spec.task is None:
        return _load_own(spec, log)
    task = task_of(spec.task)
    if spec.data is not None:
        return load_files(task, Path(spec.data), spec.split_seed, log)
    return load_hub(task, spec.split_seed, offline=spec.offline)


def _load_own(spec: DataSpec, log: Log) -> Splits:
    sources = {"train": spec.train, "dev": spec.dev}
    first = spec.dev if spec.train is None else spec.train
    readers = {name: _readers_of(spec, source, log) for name, source in sources.items() if source is not None}
    labels_of, _ = next(iter(readers.values()))
    labels = () if spec.regression else spec.labels or tuple(labels_of())
    found = {name: examples_of(labels) for name, (_, examples_of) in readers.items()}
    examples = cut(found["train"], "dev" in found, spec.split_seed) if "train" in found else {}
    if "dev" in found:
        examples["dev"] = list(found["dev"])
    where = frame_name(first)
    splits = Splits(Path(where).absolute().stem, labels, default_metrics(labels), examples, cuts_dev=spec.dev is None)
    return splits.require_examples(where)


_Readers = Tuple[Callable[[], List[str]], Callable[[Sequence[str]], Iterator[Example]]]
"""Functions that read one labelled source.

The first returns the labels that occur, sorted. The second yields the examples, whose labels must be among those given.
"""


def _readers_of(spec: DataSpec, source: Any, log: Log) -> _Readers:
    """Return the readers of a source. Files are of one kind, which their suffixes tell."""
    own = [each for each in (spec.train, spec.dev) if each is not None]
    paths = [str(each) for each in own if not is_frame(each)]
    has_frames = len(paths) < len(own)
    if not has_frames and all(path.endswith(arrays.SUFFIX) for path in paths):
        if spec.text_column or spec.pair_column:
            what = "text_column and pair_column are for texts, the data are arrays"
            raise UsageError(what, paths[0], "leave them out")
        column = spec.label_column
        return partial(arrays.array_labels, Path(source), column), partial(_records, Path(source), column, log)
    if has_frames or not all(images.is_image_source(path) for path in paths):
        rows = list(_table_rows(spec, source, log))
        return partial(_table_labels, spec, source, rows, log), partial(_table_examples, spec, rows, log)
    if spec.regression:
        raise UsageError("folders of images have classes, and this is a regression", paths[0], "use a classifier")
    if spec.text_column or spec.pair_column:
        raise UsageError("text_column and pair_column are for texts, the data are images", paths[0], "leave them out")
    return partial(images.class_names, Path(source)), partial(images.labelled_images, Path(source))


def _records(path: Path, column: str, log: Log, labels: Sequence[str]) -> Iterator[Example]:
    return arrays.labelled_records(path, labels, column, log)


_Labelled = Tuple[str, Text, str]
"""Position of a row, its text, and its label as text."""


def _table_rows(spec: DataSpec, source: Any, log: Log) -> Iterator[_Labelled]:
    """Yield the rows of a table. Raises UsageError that names the first odd row and counts the others."""
    notes, odd = Notes(log), []
    first: tuple[str, ...] = ()
    spellings: dict[str, set[str]] = {}
    for row in read_table(source, Layout(spec.format, spec.header, spec.quotes), notes):
        columns = text_columns(row, first[0] if first else spec.text_column, spec.pair_column)
        if not first:
            if spec.label_column in columns:
                what = f"text and label are both read from the column {spec.label_column!r}"
                raise UsageError(what, row[0], "name another column with --text-column or --label-column")
            require_columns(row, (*columns, spec.label_column))
            is_only = columns == TEXT_COLUMNS[:1] and not row[1].keys() & set(TEXT_COLUMNS[1:])
            if not is_only and columns not in ((spec.text_column,), (spec.text_column, spec.pair_column)):
                notes.log(f"{row[0]}: texts are read from the column {' and '.join(map(repr, columns))}")
            first = columns
        note_columns(row, columns, first, notes)
        try:
            found = _labelled(row, columns, spec.label_column)
        except UsageError as error:
            odd.append(error)
            continue
        spellings.setdefault(found[2], set()).add(label_spelling(row[1][spec.label_column]))
        yield found
    if odd:
        places = ", ".join(str(error.where) for error in odd[1 : MAX_PLACES + 1])
        others = f" ({len(odd) - 1} other rows are odd: {places})" if places else ""
        raise UsageError(odd[0].what + others, odd[0].where, odd[0].remedy)
    for label, several in sorted(spellings.items()):
        if len(several) > 1 and not spec.regression:
            notes.log(f"{frame_name(source)}: the labels {' and '.join(sorted(several))} are one class, {label}")
    notes.report()


def _labelled(row: Row, columns: Sequence[str], label_column: str) -> _Labelled:
    """Return the text and the label of a row. Raises UsageError if one is absent, null, empty or of another type."""
    text, label = text_of(row, columns), label_field(row, label_column)
    cells = dict(zip(columns, [text] if isinstance(text, str) else text))
    empty = next((name for name, cell in {**cells, label_column: label}.items() if not cell.strip()), None)
    if empty is not None:
        raise UsageError(f"column {empty!r} is empty", row[0], "correct the row, or drop it")
    return row[0], text, label


def _table_labels(spec: DataSpec, source: Any, rows: Sequence[_Labelled], log: Log) -> list[str]:
    labels = sorted_labels({label for _, _, label in rows}, spec.label_column, frame_name(source))
    for notice in label_notices(labels):
        log(f"{frame_name(source)}: {notice}")
    return labels


def _table_examples(spec: DataSpec, rows: Sequence[_Labelled], log: Log, labels: Sequence[str]) -> Iterator[Example]:
    """Yield the examples. Raises UsageError for a label that the model does not have."""
    ids, notice = ids_by_name((label for _, _, label in rows), labels, spec.labels is not None)
    if notice is not None:
        log(f"{rows[0][0]}: {notice}")
    for place, text, label in rows:
        yield Example(text, parse_label(label, labels, place, ids))  # label 2 of ("1", "2") is "2"
