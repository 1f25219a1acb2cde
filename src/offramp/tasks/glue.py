"""The nine tasks of GLUE (Wang et al., ICLR 2019) as one table, and their files as people have them.

Read are the original folders and zips (`CoLA/train.tsv`, `QQP/dev.tsv`, ...) and plain tables named after the task
(`cola/train.tsv` with columns `sentence`, `label`). What a folder lacks is said in `Splits.partial`, never made up:
figures on such data are no GLUE scores. It knows no tokens and no metric's formula.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from offramp.errors import UsageError
from offramp.tasks.examples import Example, Splits, cut, parse_label
from offramp.tasks.tables import Row, field, read_stream, text_of


@dataclass(frozen=True)
class Task:
    """One task. `texts` and `label_columns` list what its columns are called, in one file or another."""

    name: str
    folder: str
    """Of the original download."""
    texts: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...]
    """Names of the label ids; empty for a regression."""
    metrics: tuple[str, ...]
    """Keys of `tasks.metrics.METRICS`; the score is their mean."""
    label_columns: tuple[str, ...] = ("label",)
    dev_splits: tuple[str, ...] = ("dev",)
    headerless: tuple[str, ...] = ()
    """Columns of a file whose first line is data."""
    may_be_torn: bool = False
    """The official file has some lines that lack fields; its own readers pass over them."""


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    task.name: task
    for task in (
        Task(
            "cola",
            "CoLA",
            (("sentence",),),
            ("unacceptable", "acceptable"),
            ("matthews",),
            headerless=("source", "label", "star", "sentence"),
        ),
        Task("sst2", "SST-2", (("sentence",),), ("negative", "positive"), ("accuracy",)),
        Task(
            "mrpc",
            "MRPC",
            (_PAIR, ("#1 String", "#2 String")),
            ("not_equivalent", "equivalent"),
            ("accuracy", "f1"),
            ("label", "Quality"),
        ),
        Task(
            "qqp",
            "QQP",
            (("question1", "question2"),),
            ("not_duplicate", "duplicate"),
            ("accuracy", "f1"),
            ("label", "is_duplicate"),
            may_be_torn=True,
        ),
        Task("stsb", "STS-B", (_PAIR,), (), ("pearson", "spearman"), ("score", "label")),
        Task(
            "mnli",
            "MNLI",
            (("premise", "hypothesis"), _PAIR),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            ("label", "gold_label"),
            ("dev_matched", "dev_mismatched"),
        ),
        Task("qnli", "QNLI", (("question", "sentence"),), _ENTAILMENT, ("accuracy",)),
        Task("rte", "RTE", (_PAIR,), _ENTAILMENT, ("accuracy",)),
        Task("wnli", "WNLI", (_PAIR,), ("not_entailment", "entailment"), ("accuracy",)),
    )
}


def task_of(name: str) -> Task:
    """The task of this name. Raises UsageError naming the known ones."""
    if name not in TASKS:
        raise UsageError(f"unknown task {name!r}", None, f"known are {', '.join(TASKS)}")
    return TASKS[name]


def load_glue(task: Task, data: Path, seed: int = 0) -> Splits:
    """Read a task from the folder that holds GLUE's folders or zips, from one of these, or from its plain tables.

    Train is cut into train, tune and certify by a hash of each text and `seed`. Without a train file, the only file
    that there is is cut into all four. Raises UsageError for another layout, an empty split, or a label outside the
    set, naming file and line.
    """
    files = _find(task, data)
    examples = {name: list(_read(task, *file)) for name, file in files.items()}
    partial = [f"{name} is read from {file[0]}" for name, file in files.items() if Path(file[0]).stem != name]
    missing = [name for name in ("train", *task.dev_splits) if name not in files]
    partial += [f"there is no {name} file" for name in missing]
    whole = "train" if "train" in examples else next(iter(examples))
    has_dev = whole == "train" and bool(set(task.dev_splits) & set(files))
    examples = {**cut(examples.pop(whole), has_dev, seed), **examples}
    return splits_of(task, examples, data, partial=tuple(partial), cuts_dev=not has_dev)


def splits_of(
    task: Task,
    examples: dict[str, list[Example]],
    where: object,
    *,
    partial: tuple[str, ...] = (),
    cuts_dev: bool = False,
) -> Splits:
    """Examples of a task, whose splits must not be empty."""
    return Splits(task.name, task.labels, task.metrics, examples, partial, cuts_dev).require_examples(where)


def example_of(task: Task, row: Row) -> Example:
    """A row as a labelled text. Raises UsageError for a column that is not there, and a label outside the set."""
    texts = next((names for names in task.texts if set(names) <= set(row[1])), task.texts[0])
    label = next((name for name in task.label_columns if name in row[1]), task.label_columns[0])
    return Example(text_of(row, texts), parse_label(field(row, label), task.labels, row[0]))


_File = tuple[str, Callable[[], IO[bytes]]]
"""Path to show, and how to open it."""


def _find(task: Task, data: Path) -> dict[str, _File]:
    """split -> file. What begins with the name of a split is a part of it (`dev_mismatched_1000`, `train_subset`)."""
    for place in (data / task.folder, data / task.name, data / f"{task.folder}.zip", data):
        with _listing(place) as listing:
            found = _match(task, listing)
        if found:
            return found
    what = f"no {' or '.join(('train', *task.dev_splits))} table of {task.name}"
    remedy = f"give the folder that holds {task.folder}/, {task.name}/ or {task.folder}.zip"
    raise UsageError(what, data, remedy)


def _match(task: Task, listing: dict[str, _File]) -> dict[str, _File]:
    found: dict[str, _File] = {}
    for split in ("train", *sorted(task.dev_splits, key=len, reverse=True)):
        stems = sorted((stem for stem in listing if stem.startswith(split)), key=lambda stem: (stem != split, stem))
        if stems:
            found[split] = listing.pop(stems[0])
    return {split: found[split] for split in ("train", *task.dev_splits) if split in found}


@contextmanager
def _listing(place: Path) -> Iterator[dict[str, _File]]:
    """stem -> file, of the TSV tables of a folder or a zip."""
    if place.suffix == ".zip" and place.is_file():
        yield {Path(name).stem: _zipped(place, name) for name in _zip_names(place) if name.endswith(".tsv")}
    elif place.is_dir():
        yield {path.stem: (str(path), lambda path=path: path.open("rb")) for path in sorted(place.glob("*.tsv"))}
    else:
        yield {}


def _zip_names(place: Path) -> list[str]:
    try:
        with zipfile.ZipFile(place) as archive:
            return archive.namelist()
    except zipfile.BadZipFile as error:
        raise UsageError(f"not a whole zip ({error})", place, "download it again") from None


def _zipped(place: Path, name: str) -> _File:
    return f"{place}/{name}", lambda: zipfile.ZipFile(place).open(name)


def _read(task: Task, shown: str, opened: Callable[[], IO[bytes]]) -> Iterator[Example]:
    try:
        columns = _columns(task, opened)
        with opened() as stream:
            for row in read_stream(stream, ".tsv", shown, columns, skip_short=task.may_be_torn):
                yield example_of(task, row)
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"table cannot be read ({error})", shown, "get the data again") from None


def _columns(task: Task, opened: Callable[[], IO[bytes]]) -> tuple[str, ...] | None:
    """The columns of a file whose first line does not name them."""
    with opened() as stream:
        first = stream.readline().decode("utf-8-sig", "replace").rstrip("\r\n").split("\t")
    return task.headerless if task.headerless and not set(task.label_columns) & set(first) else None
