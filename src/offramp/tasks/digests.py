"""Digests of inputs: the same row is recognised in another file, without keeping the row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from offramp.tasks.arrays import Record
from offramp.tasks.examples import normalised

_WIDEST = {"b": "<i8", "i": "<i8", "u": "<i8", "f": "<f8", "c": "<c16"}
"""Kind of a dtype -> the dtype in which its numbers are compared."""


def row_digests(inputs: Iterable[Any], salt: str, arguments: Sequence[str] = ()) -> np.ndarray:
    """Return a salted digest of 64 bits for each input, uint64 [N].

    Digests are equal for texts that differ in spaces and case only, as they share a split; for records of equal
    numbers, whatever their dtypes and the names of their arguments; and for images whose files are equal.

    Args:
        inputs: texts, pairs of texts, images or records.
        salt: 16 bytes in hexadecimal digits.
        arguments: the arrays that count of a record which has all of them; of others, all arrays count.
    """
    key = bytes.fromhex(salt)
    found = (hashlib.blake2b(_content(item, arguments), digest_size=8, salt=key) for item in inputs)
    return np.array([int.from_bytes(each.digest(), "little") for each in found], np.uint64)


def _content(item: Any, arguments: Sequence[str]) -> bytes:
    if isinstance(item, (str, tuple)):
        return normalised(item).encode("utf-8", "surrogatepass")
    if not isinstance(item, Record):
        return item.read()
    names = arguments if arguments and set(arguments) <= set(item.arrays) else item.arrays
    return b"".join(sorted(_digest_of(item.arrays[name]) for name in names))


def _digest_of(array: np.ndarray) -> bytes:
    numbers = array.astype(_WIDEST.get(array.dtype.kind, array.dtype))
    if numbers.dtype.kind in "fc":
        numbers = numbers + 0.0  # -0.0 becomes 0.0
    return hashlib.blake2b(repr(numbers.shape).encode() + numbers.tobytes()).digest()
