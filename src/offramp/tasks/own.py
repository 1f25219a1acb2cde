"""Anyone's own labelled tables: a train file, and a dev file if there is one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from offramp.errors import UsageError
from offramp.tasks.examples import Example, Splits, cut, parse_label
from offramp.tasks.metrics import default_metrics
from offramp.tasks.tables import Row, field, read_table, text_of


@dataclass(frozen=True)
class Columns:
    """What the columns are called."""

    text: str
    label: str
    pair: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """One or two."""
        return (self.text,) if self.pair is None else (self.text, self.pair)


def load_own(
    train: Path | None, dev: Path | None, columns: Columns, labels: Sequence[str] | None = None, seed: int = 0
) -> Splits:
    """Cut the train file into train, tune and certify, and, without a dev file, into dev as well.

    Args:
        train: may be None where `labels` are given: then there is dev alone.
        labels: the name of each label id; none: a regression. None: the labels that the train file has, sorted.

    Scores are accuracy, or Pearson's and Spearman's correlations. Raises UsageError for a column that is not there, a
    label outside the set, an empty file or split, NaN; MissingExtraError for Parquet without pyarrow.
    """
    file = train or dev
    if file is None:
        raise UsageError("no table", None, "name one")
    if labels is None:
        labels = _labels(file, columns.label)
    examples = {} if train is None else cut(_read(train, columns, labels), dev is not None, seed)
    if dev is not None:
        examples["dev"] = list(_read(dev, columns, labels))
    splits = Splits(file.stem, tuple(labels), default_metrics(labels), examples, cuts_dev=dev is None)
    return splits.require_examples(file)


def _labels(train: Path, column: str) -> list[str]:
    return in_order({label for row in read_table(train) if (label := field(row, column)).strip()}, column, train)


def in_order(found: set[str], column: str, where: object) -> list[str]:
    """The labels of a column, sorted. Raises UsageError for fewer than two, and for so many numbers that they are
    values.
    """
    if len(found) < 2:
        what = f"column {column!r} has {len(found)} different labels"
        raise UsageError(what, where, "a classifier needs at least two; --regression for values")
    if len(found) > len(_MANY) and all(_is_number(label) for label in found):
        raise UsageError(f"column {column!r} has {len(found)} different numbers", where, "--regression for values")
    return sorted(found, key=_natural)


_MANY = range(100)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _natural(label: str) -> tuple[int, str]:
    """Numbers by their value: 2 before 10."""
    return (int(label), label) if label.isascii() and label.isdigit() and len(label) < 19 else (0, label)


def _read(path: Path, columns: Columns, labels: Sequence[str]) -> Iterator[Example]:
    for row in read_table(path):
        yield _example(row, columns, labels)


def _example(row: Row, columns: Columns, labels: Sequence[str]) -> Example:
    label = field(row, columns.label)
    empty = next((name for name in (*columns.texts, columns.label) if not field(row, name).strip()), None)
    if empty is not None:
        raise UsageError(f"column {empty!r} is empty", row[0], "correct the row, or drop it")
    if labels and label not in labels:  # ids are no names here: label 2 of ("1", "2") is "2"
        raise UsageError(f"label {label!r} is none of {', '.join(labels)}", row[0], "correct the line")
    return Example(text_of(row, columns.texts), parse_label(label, labels, row[0]))
