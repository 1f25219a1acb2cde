"""The nine tasks of GLUE (Wang et al., ICLR 2019), read from files or from the hub.

Files are the original folders and zips (`CoLA/train.tsv`, `QQP/dev.tsv`, ...) or plain tables in a folder named after
the task (`cola/train.tsv` with columns `sentence`, `label`). Missing files are listed in `Splits.partial`: scores on
partial data are not GLUE scores. The hub's data set is `nyu-mll/glue`, read by the `datasets` library.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Callable, Tuple

from offramp.errors import SourceError, UsageError, disk_full, import_error, missing
from offramp.store.files import open_plain
from offramp.tasks.examples import Example, Splits, cut, parse_label
from offramp.tasks.lines import Log, Notes, silent
from offramp.tasks.tables import Layout, Row, field, read_stream, text_of

REPOSITORY = "nyu-mll/glue"
REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
"""Commit of the hub's data set: scores of another day are scores on the same rows."""
_HUB_REMEDY = "check the network and run again: complete files are kept; or give GLUE's files with --data DIR"


@dataclass(frozen=True)
class Task:
    """A task of GLUE, and the names of its columns in the files that exist."""

    name: str
    folder: str
    """Folder name in the original download."""
    texts: tuple[tuple[str, ...], ...]
    """Alternative names of the text column, or of both text columns."""
    labels: tuple[str, ...]
    """Names of the label ids; empty for a regression."""
    metrics: tuple[str, ...]
    """Keys of `tasks.metrics.METRICS`; the score is their mean."""
    label_columns: tuple[str, ...] = ("label",)
    """Alternative names of the label column."""
    dev_splits: tuple[str, ...] = ("dev",)
    headerless: tuple[str, ...] = ()
    """Columns of the original file without a header line."""
    has_short_rows: bool = False
    """True if the official file has rows that lack fields. The official readers skip them."""


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    task.name: task
    for task in (
        Task("cola", "CoLA", (("sentence",),), ("unacceptable", "acceptable"), ("matthews",),
             headerless=("source", "label", "star", "sentence")),
        Task("sst2", "SST-2", (("sentence",),), ("negative", "positive"), ("accuracy",)),
        Task("mrpc", "MRPC", (_PAIR, ("#1 String", "#2 String")), ("not_equivalent", "equivalent"), ("accuracy", "f1"),
             ("label", "Quality")),
        Task("qqp", "QQP", (("question1", "question2"),), ("not_duplicate", "duplicate"), ("accuracy", "f1"),
             ("label", "is_duplicate"), has_short_rows=True),
        Task("stsb", "STS-B", (_PAIR,), (), ("pearson", "spearman"), ("score", "label")),
        Task("mnli", "MNLI", (("premise", "hypothesis"), _PAIR), ("entailment", "neutral", "contradiction"),
             ("accuracy",), ("label", "gold_label"), ("dev_matched", "dev_mismatched")),
        Task("qnli", "QNLI", (("question", "sentence"),), _ENTAILMENT, ("accuracy",)),
        Task("rte", "RTE", (_PAIR,), _ENTAILMENT, ("accuracy",)),
        Task("wnli", "WNLI", (_PAIR,), ("not_entailment", "entailment"), ("accuracy",)),
    )
}  # fmt: skip


def task_of(name: str) -> Task:
    """Return the task of this name. Raises UsageError that lists the known names."""
    if name not in TASKS:
        raise UsageError(f"unknown task {name!r}", None, f"known are {', '.join(TASKS)}")
    return TASKS[name]


def load_files(task: Task, data: Path, seed: int = 0, log: Log = silent) -> Splits:
    """Read a task from the folder of GLUE's folders or zips, from one of these folders, or from plain tables.

    Train is cut into train, tune and certify. Without a train file, the only file is cut into all four splits. `log`
    receives the number of rows that were skipped.

    Raises UsageError for another layout, an empty split, or an unknown label, with file and line.
    """
    if not data.exists():
        raise missing(data)
    files = _find(task, data)
    odd = Notes(log)
    examples = {name: list(_read(task, odd, *file)) for name, file in files.items()}
    odd.report()
    notes = [f"{name} is read from {file[0]}" for name, file in files.items() if Path(file[0]).stem != name]
    notes += [f"there is no {name} file" for name in ("train", *task.dev_splits) if name not in files]
    whole = "train" if "train" in examples else next(iter(examples))
    has_dev = whole == "train" and bool(set(task.dev_splits) & set(files))
    examples = {**cut(examples.pop(whole), has_dev, seed), **examples}
    splits = Splits(task.name, task.labels, task.metrics, examples, tuple(notes), not has_dev)
    return splits.require_examples(data)


def load_hub(task: Task, seed: int = 0, *, offline: bool = False, repository: str = REPOSITORY) -> Splits:
    """Read a task from the hub, or, if `offline`, from its cache. `repository` may be a folder of the same layout.

    Raises SourceError for a failed or interrupted download, UsageError as `load_files`, MissingExtraError without the
    datasets library.
    """
    tables = _download(task.name, repository, offline)
    examples = cut(_examples_of_hub(task, tables, "train", repository), True, seed)
    for split in task.dev_splits:
        examples[split] = _examples_of_hub(task, tables, split.replace("dev", "validation"), repository)
    return Splits(task.name, task.labels, task.metrics, examples).require_examples(repository)


def _example_of(task: Task, row: Row) -> Example:
    """Convert a row. Raises UsageError for a missing column and an unknown label."""
    texts = next((names for names in task.texts if set(names) <= set(row[1])), task.texts[0])
    label = next((name for name in task.label_columns if name in row[1]), task.label_columns[0])
    return Example(text_of(row, texts), parse_label(field(row, label), task.labels, row[0]))


_File = Tuple[str, Callable[[], IO[bytes]]]
"""Path for messages, and a function that opens the file."""


def _find(task: Task, data: Path) -> dict[str, _File]:
    """Return split -> file. A file whose name begins with a split is a part of it (`dev_mismatched_1000`)."""
    splits = ("train", *task.dev_splits)
    for place in (data / task.folder, data / task.name, data / f"{task.folder}.zip", data):
        listing, found = _listing(place), {}
        for split in sorted(splits, key=len, reverse=True):  # `dev_mismatched` before `dev`
            stems = [stem for stem in listing if stem.startswith(split)]
            if stems:
                found[split] = listing.pop(min(stems, key=lambda stem: (stem != split, stem)))
        if found:
            return {split: found[split] for split in splits if split in found}
    remedy = f"give the folder that holds {task.folder}/, {task.name}/ or {task.folder}.zip"
    raise UsageError(f"no {' or '.join(splits)} table of {task.name}", data, remedy)


def _listing(place: Path) -> dict[str, _File]:
    """Return the TSV tables of a folder or a zip by stem."""
    if not (place.suffix == ".zip" and place.is_file()):
        return {path.stem: (str(path), partial(_open, path)) for path in sorted(place.glob("*.tsv"))}
    try:
        archive = zipfile.ZipFile(place)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise UsageError(f"not a whole zip ({error})", place, "download it again") from None
    names = [name for name in archive.namelist() if name.endswith(".tsv")]
    return {Path(name).stem: (f"{place}/{name}", partial(archive.open, name)) for name in names}


def _open(path: Path) -> IO[bytes]:
    return os.fdopen(open_plain(path), "rb")


def _read(task: Task, notes: Notes, shown: str, opened: Callable[[], IO[bytes]]) -> Iterator[Example]:
    try:
        with opened() as stream:
            first = stream.readline().decode("utf-8-sig", "replace").rstrip("\r\n").split("\t")
        is_headerless = task.headerless and not set(task.label_columns) & set(first)
        with opened() as stream:
            columns = task.headerless if is_headerless else ()
            layout = Layout("tsv", quotes=False, columns=columns, skips_short=task.has_short_rows)
            for row in read_stream(stream, shown, layout, notes):
                yield _example_of(task, row)
    except (OSError, zipfile.BadZipFile, RuntimeError, zlib.error) as error:  # RuntimeError: a password, a method
        raise UsageError(f"table cannot be read ({error})", shown, "get the data again") from None


def _download(name: str, repository: str, offline: bool) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise import_error(error, "datasets", "data") from None
    config = datasets.DownloadConfig(local_files_only=offline)
    try:
        revision = None if Path(repository).is_dir() else REVISION
        return datasets.load_dataset(repository, name, revision=revision, download_config=config)
    except Exception as error:  # the library passes on errors of its file systems and formats
        full = disk_full(error, repository)
        if full is not None:
            raise full from error
        what = f"GLUE's {name} cannot be loaded ({type(error).__name__}: {error})"
        raise SourceError(what, repository, _HUB_REMEDY) from error


def _examples_of_hub(task: Task, tables: Any, split: str, repository: str) -> list[Example]:
    if split not in tables:
        raise SourceError(f"no split {split!r}, found {', '.join(tables)}", repository, _HUB_REMEDY)
    where = f"{repository}:{task.name}:{split}"
    rows = ({key: str(cell) for key, cell in row.items()} for row in tables[split])
    return [_example_of(task, (f"{where}:{number}", row)) for number, row in enumerate(rows)]
