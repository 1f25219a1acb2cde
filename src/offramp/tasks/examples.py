"""Labelled texts and images in splits, and labels as files write them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from offramp.errors import UsageError
from offramp.tasks.splits import Item, split_by_text
from offramp.tasks.text import Text

TRAIN_SHARES = {"train": 0.8, "tune": 0.1, "certify": 0.1}
"""How a train file is cut; dev is only ever reported."""
WHOLE_SHARES = {"train": 0.6, "tune": 0.1, "certify": 0.1, "dev": 0.2}
"""How a single file is cut where there is no other."""


class Readable(Protocol):
    """What is classified and is no text, such as an image: two are equal if their bytes are."""

    def read(self) -> bytes:
        """All of it."""
        ...


Input = TypeVar("Input", bound=Text | Readable)


class Example(NamedTuple, Generic[Input]):
    """What is classified, and the id of its label; the value itself in a regression."""

    text: Input
    """A text, a pair of texts, or an image (`tasks.images.Image`)."""
    label: int | float


@dataclass(frozen=True)
class Splits(Generic[Input]):
    """Examples by split: `train`, `tune`, `certify`, and `dev` (MNLI: `dev_matched`, `dev_mismatched`)."""

    name: str
    """Of the task."""
    labels: tuple[str, ...]
    """Names of the label ids; empty for a regression."""
    metrics: tuple[str, ...]
    """Keys of `tasks.metrics.METRICS`; the score is their mean."""
    examples: dict[str, list[Example[Input]]]
    partial: tuple[str, ...] = ()
    """Why a score on these is none of the task's, a sentence each; empty if it is one."""

    cuts_dev: bool = False
    """Dev was cut from the same file as train."""

    def require_examples(self, where: object) -> Splits[Input]:
        """These splits. Raises UsageError if one of them is empty."""
        for name, found in self.examples.items():
            if not found:
                raise UsageError(f"split {name} of {self.name} is empty", where, "give more data")
        return self

    def named(self, names: Sequence[str]) -> dict[str, list[Example[Input]]]:
        """The splits of these names; `dev` is all that there are of MNLI's. Raises UsageError for an unknown one."""
        found: dict[str, list[Example[Input]]] = {}
        for name in names:
            known = [split for split in self.examples if split == name or (name == "dev" and split.startswith("dev"))]
            if not known:
                raise UsageError(f"unknown split {name!r}", None, f"known are {', '.join(self.examples)}")
            found.update((split, self.examples[split]) for split in known)
        return found


def cut(examples: Iterable[Example[Input]], has_dev: bool, seed: int) -> dict[str, list[Example[Input]]]:
    """Train, tune and certify, by a hash of each text and `seed`; also dev, unless there is one elsewhere.

    Of what is no text the bytes are hashed, so that copies of an image fall together wherever they lie.
    """
    shares = TRAIN_SHARES if has_dev else WHOLE_SHARES
    return split_by_text(examples, lambda example: _identity(example.text), shares, seed)


def digest(examples: Iterable[tuple[Text | Readable, int | float]]) -> str:
    """sha256 of texts, or of the bytes of what is none, and labels, in order."""
    found = hashlib.sha256()
    for text, label in examples:
        found.update(json.dumps([_identity(text), label]).encode() + b"\n")
    return found.hexdigest()


def _identity(content: Text | Readable) -> Text:
    """Equal for what is equal: a text itself, the sha256 of all else."""
    return content if isinstance(content, (str, tuple)) else hashlib.sha256(content.read()).hexdigest()


def label_ids(labels: Sequence[str], own: Sequence[str]) -> list[int] | None:
    """The id of each label in a model whose own these are; None if the model knows others.

    No labels: a regression, which has no ids. A model whose labels are numbered as transformers numbers labels without
    names takes them as they come.
    """
    if not labels or set(labels) == set(own):
        return [list(own).index(label) for label in labels]
    nameless = list(own) == [f"LABEL_{index}" for index in range(len(labels))]
    return list(range(len(labels))) if nameless else None


def spread(examples: Sequence[Item], num_rows: int | None) -> list[Item]:
    """At most so many of them, evenly spaced; all if None."""
    if num_rows is None or num_rows >= len(examples):
        return list(examples)
    return [examples[index * len(examples) // num_rows] for index in range(num_rows)]


def parse_label(text: str, labels: Sequence[str], where: object) -> int | float:
    """A label by its name or its id; without `labels`, a number. Raises UsageError naming the line."""
    if not labels:
        return _number(text, where)
    if text in labels:
        return labels.index(text)
    if text.isascii() and text.isdigit() and int(text) < len(labels):
        return int(text)
    raise UsageError(f"label {text!r} is none of {', '.join(labels)}", where, "correct the line")


def _number(text: str, where: object) -> float:
    try:
        value = float(text)
    except ValueError:
        raise UsageError(f"{text!r} is not a number", where, "correct the line") from None
    if not math.isfinite(value):
        raise UsageError(f"{text!r} is not a finite number", where, "correct the line")
    return value
