"""Lists of JSON whose elements repeat with counted integers, written once.

A run of elements that differ only in integers which progress arithmetically, as in `layer.3.weight`, becomes one
element `{"repeat": N, "first": [...], "second": [...]}`: N copies of a group of elements, of which the first two are
given. Leading zeros are kept (`layer-09` is followed by `layer-10`). Inner lists are written before outer ones, so a
group may contain such an element whose own `repeat` progresses.

Only lists are written so, and an object with exactly these three keys has no other meaning inside them.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any, List, Sequence, Tuple

from offramp.program.checks import WrongError, read, strict_json

KEYS = ("repeat", "first", "second")
MIN_REPEATS = 3
"""Fewer copies are written out."""
MAX_GROUP = 64
"""Longest group of elements that the writer looks for."""
MAX_EXPANDED_BYTES = 16 << 20
"""Most bytes that the repeats of one manifest may count for; what they become takes about four times as much."""
COPY_BYTES = 64
"""Bytes that a copy, and each of its members, counts as at least: a short one takes time and memory as well."""
_TEXT_FACTOR = 2
"""Bytes that a byte of JSON text counts as."""
_INTEGER = re.compile(r"\d{1,15}")
_MAX_INTEGER = 10**15 - 1
_OVERHEAD_BYTES = len('{"repeat":,"first":[],"second":[]}')


@dataclass(frozen=True)
class _Repeat:
    repeat: int = field(metadata={"low": MIN_REPEATS})
    first: Tuple[Any, ...]
    second: Tuple[Any, ...]


def compress(tree: Any) -> Any:
    """Return a JSON tree with runs of repeating list elements written once; `expand` gives the tree back."""
    if isinstance(tree, dict):
        return {key: compress(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return _compress_list([compress(element) for element in tree])
    return tree


def expand(tree: Any, where: str) -> Any:
    """Return a JSON tree with all repeats written out. Raises WrongError naming what is no repeat or too large."""
    try:
        return _Expansion().expand(tree, where)
    except RecursionError:
        raise WrongError(f"{where} is nested too deeply") from None


class _Form:
    """JSON text of one element, split into its integers (as text) and the pieces between them."""

    def __init__(self, text: str) -> None:
        self.text, self.num_bytes = text, len(text)
        self.pieces, self.integers = _INTEGER.split(text), _INTEGER.findall(text)


class _Series:
    """The texts whose first two members are given; their integers progress arithmetically."""

    def __init__(self, first: _Form, second: _Form) -> None:
        """Raise ValueError if they differ in more than integers."""
        if first.pieces != second.pieces:
            raise ValueError("first and second differ in more than integers")
        self._pieces = first.pieces
        pairs = zip(first.integers, second.integers)
        self._integers = [(int(one), int(other) - int(one), len(one)) for one, other in pairs]
        if self.text(1) != second.text:
            raise ValueError("first and second differ in leading zeros")

    def text(self, index: int) -> str:
        """Return member `index`, from 0. Raises ValueError where an integer leaves its range."""
        text = self._pieces[0]
        for (start, step, width), piece in zip(self._integers, self._pieces[1:]):
            number = start + index * step
            if not 0 <= number <= _MAX_INTEGER:
                raise ValueError(f"a repeated integer becomes {number}")
            text += str(number).zfill(width) + piece
        return text

    def contains(self, form: _Form, index: int) -> bool:
        """Return whether `form` is member `index`."""
        try:
            return form.pieces == self._pieces and form.text == self.text(index)
        except ValueError:
            return False


def _text(part: Any) -> str:
    return json.dumps(part, separators=(",", ":"), ensure_ascii=True)


class _Expansion:
    """The expansion of one manifest, with the bytes of text that it has produced."""

    def __init__(self) -> None:
        self._num_bytes = 0

    def expand(self, tree: Any, where: str) -> Any:
        if isinstance(tree, dict):
            return {key: self.expand(value, f"{where}.{key}") for key, value in tree.items()}
        if not isinstance(tree, list):
            return tree
        found: List[Any] = []
        for index, element in enumerate(tree):
            place = f"{where}[{index}]"
            if isinstance(element, dict) and set(element) == set(KEYS):
                try:
                    found += self._copies(read(_Repeat, element, place), place)
                except WrongError:
                    raise
                except ValueError as error:
                    raise WrongError(f"{place}: {error}") from None
            else:
                found.append(self.expand(element, place))
        return found

    def _copies(self, element: _Repeat, where: str) -> List[Any]:
        """Return all members of a repeat, themselves expanded. Equal members share their trees."""
        count, before = element.repeat, self._num_bytes
        least = COPY_BYTES * (1 + len(element.first))
        first, second = (_Form(_text(members)) for members in (element.first, element.second))
        series = _Series(first, second)
        self._require(count * max(_TEXT_FACTOR * first.num_bytes, least))  # no member is shorter than the first
        if first.text == second.text:
            self._charge(max(_TEXT_FACTOR * first.num_bytes, least))
            members = self.expand(list(element.first), where)
            self._charge((self._num_bytes - before) * (count - 1))
            return members * count
        found: List[Any] = []
        for index in range(count):
            text = series.text(index)
            self._charge(max(_TEXT_FACTOR * len(text), least))
            found += self.expand(strict_json(text.encode()), where)
        return found

    def _charge(self, num_bytes: int) -> None:
        self._require(num_bytes)
        self._num_bytes += num_bytes

    def _require(self, num_bytes: int) -> None:
        """Raise ValueError if another `num_bytes` exceed the limit. Called before the members are made."""
        if self._num_bytes + num_bytes > MAX_EXPANDED_BYTES:
            raise ValueError(f"more than {MAX_EXPANDED_BYTES} bytes are repeated")


def _compress_list(elements: List[Any]) -> List[Any]:
    if len(elements) < MIN_REPEATS:
        return elements
    forms = [_Form(_text(element)) for element in elements]
    if sum(form.num_bytes for form in forms) <= _OVERHEAD_BYTES:
        return elements
    found: List[Any] = []
    start = 0
    while start < len(elements):
        group, count = _best_run(forms, start)
        if count > 1:
            first, second = elements[start : start + group], elements[start + group : start + 2 * group]
            found.append({"repeat": count, "first": first, "second": second})
        else:
            found.append(elements[start])
        start += group * count
    return found


def _best_run(forms: Sequence[_Form], start: int) -> Tuple[int, int]:
    """Return (elements of the group, copies) of the run at `start` that saves the most bytes; (1, 1) if none does."""
    best, most_saved = (1, 1), 0
    for group in range(1, min(MAX_GROUP, (len(forms) - start) // MIN_REPEATS) + 1):
        count = _num_copies(forms, start, group)
        sizes = [form.num_bytes for form in forms[start : start + group * count]]
        saved = sum(sizes[2 * group :]) - _OVERHEAD_BYTES
        if count >= MIN_REPEATS and saved > most_saved:
            best, most_saved = (group, count), saved
            if start + group * count == len(forms):
                break
    return best


def _num_copies(forms: Sequence[_Form], start: int, group: int) -> int:
    try:
        series = [_Series(forms[at], forms[at + group]) for at in range(start, start + group)]
    except ValueError:
        return 0
    for at in range(start + 2 * group, len(forms)):
        index, offset = divmod(at - start, group)
        if not series[offset].contains(forms[at], index):
            return index
    return (len(forms) - start) // group
