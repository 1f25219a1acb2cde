"""Cutting examples into splits by their text alone: a text is never in two of them, and more examples move none."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from offramp.tasks.text import Text

Item = TypeVar("Item")


def split_by_text(
    items: Iterable[Item], text_of: Callable[[Item], Text], shares: Mapping[str, float], seed: int = 0
) -> dict[str, list[Item]]:
    """Divide into the splits that `shares` names, about so large, in the order given.

    Texts that are equal but for spaces and case fall together. Raises ValueError unless the shares sum to 1.
    """
    if abs(sum(shares.values()) - 1) > 1e-9:
        raise ValueError(f"shares must sum to 1, not to {sum(shares.values())}")
    splits: dict[str, list[Item]] = {name: [] for name in shares}
    for item in items:
        splits[_split_of(normalised(text_of(item)), shares, seed)].append(item)
    return splits


def normalised(text: Text) -> str:
    """A text, or a pair joined by a line break, as equal texts share it."""
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
