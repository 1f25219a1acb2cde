"""Labelled examples in splits, how they are cut into splits, and how labels are parsed.

An example is assigned to a split by its content alone: copies fall into the same split, and further examples move none.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from offramp.errors import UsageError, shown
from offramp.tasks.lines import MAX_PLACES
from offramp.tasks.tables import same_label
from offramp.tasks.text import Text

TRAIN_SHARES = {"train": 0.8, "tune": 0.1, "certify": 0.1}
"""Fractions of a train file, where there is a dev file. Dev is only reported."""
WHOLE_SHARES = {"train": 0.6, "tune": 0.1, "certify": 0.1, "dev": 0.2}
"""Fractions of a single file, where there is no dev file."""
_MAX_NUMERIC_LABELS = 100
"""Number of distinct labels above which numeric labels are taken for values of a regression."""
_MAX_COUNTED_LABELS = 12
"""Most labels whose rows are counted one by one in a message."""

_MAX_VALUE = 3.4028234663852886e38
"""Largest 32-bit float, in which the values of a regression are computed."""

Item = TypeVar("Item")


class Example(NamedTuple):
    """An input with its label."""

    text: Any
    """A text, a pair of texts, an image (`tasks.images.Image`) or a record (`tasks.arrays.Record`)."""
    label: int | float
    """Id of the label; the value itself in a regression."""


@dataclass(frozen=True)
class Splits:
    """Labelled examples by split: `train`, `tune`, `certify`, and `dev` (MNLI: `dev_matched`, `dev_mismatched`)."""

    name: str
    """Name of the task."""
    labels: tuple[str, ...]
    """Names of the label ids; empty for a regression."""
    metrics: tuple[str, ...]
    """Keys of `tasks.metrics.METRICS`; the score is their mean."""
    examples: dict[str, list[Example]]
    partial: tuple[str, ...] = ()
    """Reasons why a score on these data is not the official score of the task, one sentence each."""
    cuts_dev: bool = False
    """True if dev was cut from the same file as train."""

    def require_examples(self, where: object) -> Splits:
        """Return these splits. Raises UsageError if one of them is empty."""
        for name, found in self.examples.items():
            if not found:
                raise UsageError(f"split {name} of {self.name} is empty", where, "give more data")
        return self

    def named(self, names: Sequence[str]) -> dict[str, list[Example]]:
        """Return the splits of these names; `dev` selects both dev splits of MNLI. Raises UsageError for an unknown
        name.
        """
        found: dict[str, list[Example]] = {}
        for name in names:
            known = [split for split in self.examples if split == name or (name == "dev" and split.startswith("dev"))]
            if not known:
                raise UsageError(f"unknown split {name!r}", None, f"known are {', '.join(self.examples)}")
            found.update((split, self.examples[split]) for split in known)
        return found


def cut(examples: Iterable[Example], has_dev: bool, seed: int) -> dict[str, list[Example]]:
    """Cut examples into train, tune and certify, and into dev as well unless `has_dev`.

    Inputs that are not text are assigned by their bytes, so that copies of an image fall into the same split.
    """
    shares = TRAIN_SHARES if has_dev else WHOLE_SHARES
    return split_by_text(examples, lambda example: _identity(example.text), shares, seed)


def split_by_text(
    items: Iterable[Item], text_of: Callable[[Item], Text], shares: Mapping[str, float], seed: int = 0
) -> dict[str, list[Item]]:
    """Divide items into the splits named in `shares`, in approximately these fractions, preserving order.

    The split is chosen by a hash of the text and `seed`. Texts that differ in spaces and case only share a split.
    Raises ValueError unless the shares sum to 1.
    """
    if abs(sum(shares.values()) - 1) > 1e-9:
        raise ValueError(f"shares must sum to 1, not to {sum(shares.values())}")
    splits: dict[str, list[Item]] = {name: [] for name in shares}
    for item in items:
        splits[_split_of(normalised(text_of(item)), shares, seed)].append(item)
    return splits


def normalised(text: Text) -> str:
    """Return a text with single spaces and folded case; a pair of texts is joined by a line break."""
    parts = [text] if isinstance(text, str) else text
    return "\n".join(" ".join(part.split()).casefold() for part in parts)


def _split_of(text: str, shares: Mapping[str, float], seed: int) -> str:
    digest = hashlib.sha256(f"{seed}\n{text}".encode("utf-8", "surrogatepass")).digest()
    position = int.from_bytes(digest[:6], "big") / 2**48
    for name, share in shares.items():
        if position < share:
            return name
        position -= share
    return list(shares)[-1]  # rounding


def digest(examples: Iterable[tuple[Any, int | float]]) -> str:
    """Return the sha256 of the examples in order: of texts (for other inputs, of their bytes) and labels."""
    found = hashlib.sha256()
    for text, label in examples:
        found.update(json.dumps([_identity(text), label]).encode() + b"\n")
    return found.hexdigest()


def _identity(content: Any) -> Text:
    """Return a text unchanged; for other inputs, the sha256 of their bytes."""
    return content if isinstance(content, (str, tuple)) else hashlib.sha256(content.read()).hexdigest()


def counted(labels_N: Sequence[int | float], labels: Sequence[str]) -> str:
    """Return the number of rows of each label, or the range of the values of a regression, in words."""
    if not labels:
        return f"values from {min(labels_N):g} to {max(labels_N):g}"
    counts = [labels_N.count(number) for number in range(len(labels))]
    if len(labels) > _MAX_COUNTED_LABELS:
        return f"{len(labels)} labels of {min(counts)} to {max(counts)} rows each"
    return ", ".join(f"{shown(label)} {count}" for label, count in zip(labels, counts))


def spread(examples: Sequence[Item], num_rows: int | None) -> list[Item]:
    """Return at most `num_rows` examples, evenly spaced; all of them if None."""
    if num_rows is None or num_rows >= len(examples):
        return list(examples)
    return [examples[index * len(examples) // num_rows] for index in range(num_rows)]


def label_ids(labels: Sequence[str], model_labels: Sequence[str]) -> list[int] | None:
    """Return the model's id of each label; [] for a regression; None if the model has other labels.

    Names that differ in case and spaces only are equal, unless two of the model's do. A model with the default names of
    transformers (`LABEL_0`, ...) takes the labels in their own order.
    """
    if not labels or set(labels) == set(model_labels):
        return [list(model_labels).index(label) for label in labels]
    wanted, own = ([normalised(label) for label in side] for side in (labels, model_labels))
    if len(set(own)) == len(own) == len(wanted) and set(own) == set(wanted):
        return [own.index(label) for label in wanted]
    return list(range(len(labels))) if _are_default(model_labels, len(labels)) else None


def _are_default(model_labels: Sequence[str], number: int) -> bool:
    """Return whether labels are the names that transformers gives where a config has none."""
    return list(model_labels) == [f"LABEL_{index}" for index in range(number)]


def label_notice(labels: Sequence[str], model_labels: Sequence[str]) -> str | None:
    """Return a notice that a model has no names of labels, and how its ids are read; None if it has names."""
    if not labels or set(labels) == set(model_labels) or not _are_default(model_labels, len(labels)):
        return None
    taken = ", ".join(f"{name} = {shown(label)}" for name, label in zip(model_labels, labels))
    return f"the model does not name its labels, which are read in the order of the data: {taken}"


def sorted_labels(found: set[str], column: str, where: object) -> list[str]:
    """Return the labels found in a column, sorted, numbers by value.

    Raises UsageError for fewer than two labels, and for more than 100 numbers, which are values of a regression.
    """
    if len(found) < 2:
        what = f"column {column!r} has {len(found)} different labels"
        raise UsageError(what, where, "a classifier needs at least two; --regression for values")
    if len(found) > _MAX_NUMERIC_LABELS and None not in map(_float, found):
        raise UsageError(f"column {column!r} has {len(found)} different numbers", where, "--regression for values")
    return sorted(found, key=lambda label: (int(label) if _is_id(label) and len(label) < 19 else 0, label))


def label_notices(labels: Sequence[str]) -> list[str]:
    """Return notices of labels that may not be the classes that were meant."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(normalised(label), []).append(label)
    names = (" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1)
    found = [f"the labels {each} differ in case or spaces only, and are classes of their own" for each in names]
    values = [_float(label) for label in labels]
    if None not in values and not all(map(_is_id, labels)):
        found.append("the labels are numbers, and each is a class (--regression predicts values)")
    return found


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def ids_by_name(found: Iterable[str], labels: Sequence[str], are_given: bool) -> tuple[dict[str, int], str | None]:
    """Return the id of each label of data by its name, and a notice where names are taken for others.

    Where `are_given`, by a model for example, labels may differ from the names in case and spaces, unless two names do;
    and where none is a name, they may be ids.
    """
    written = set(found)
    names = {same_label(label): number for number, label in reversed(list(enumerate(labels)))}
    folded = {normalised(label): number for number, label in enumerate(labels)}
    if not are_given or written <= names.keys():
        return names, None
    if len(folded) == len(labels) and {normalised(label) for label in written} <= folded.keys():
        ids, how = {label: folded[normalised(label)] for label in written}, "the model's labels, whatever their case"
    elif not written & names.keys() and written <= {str(number) for number in range(len(labels))}:
        ids, how = {str(number): number for number in range(len(labels))}, "ids of the model's labels"
    else:
        return names, None
    taken = sorted(written - names.keys(), key=lambda label: (len(label), label))[:MAX_PLACES]
    return ids, f"labels are read as {how}: {', '.join(f'{shown(label)} = {labels[ids[label]]}' for label in taken)}"


def parse_label(text: str, labels: Sequence[str], where: object, ids: Mapping[str, int] | None = None) -> int | float:
    """Parse a label: one of `ids`, or without them a name or an id; a number if `labels` is empty.

    Raises UsageError that names `where`.
    """
    if not labels:
        value = _float(text)
        if value is None or not abs(value) <= _MAX_VALUE:
            is_large = value is not None and math.isfinite(value)
            kind = "number of 32 bits" if is_large else "number" if value is None else "finite number"
            raise UsageError(f"{text!r} is not a {kind}", where, "correct the line")
        return value
    if ids is None:
        if text in labels:
            return labels.index(text)
        if _is_id(text) and int(text) < len(labels):
            return int(text)
    elif text in ids:
        return ids[text]
    raise UsageError(f"label {text!r} is none of {', '.join(labels)}", where, "correct the line")
