"""A labelled text, and labels as files write them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from offramp.errors import UsageError
from offramp.tasks.text import Text


@dataclass(frozen=True)
class Example:
    """A text or a pair of texts, and the id of its label; the value itself in a regression."""

    text: Text
    label: int | float


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
