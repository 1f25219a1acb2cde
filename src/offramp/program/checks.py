"""JSON trees read as dataclasses: every value is checked against the annotation and the metadata of its field.

The metadata of a field apply to all parts of its annotation:

    pattern      regular expression that strings and keys match as a whole
    choices      allowed strings
    low, high    range of numbers; without them integers from 0 to 2^53, and any float
    most         longest list
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import types
import typing
from collections.abc import Mapping as AbstractMapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache, partial
from typing import Any, Callable, Container, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple, Union

from offramp.units import format_size

MAX_RANK = 32
"""Largest number of dimensions of a tensor or axes of a value: those of NumPy before 2."""
_MOST_ELEMENTS = 1 << 50
"""Largest product of the sizes of a shape, those of 0 left out: libraries refuse larger ones in several ways."""
NAMED: Mapping[str, Any] = {"pattern": re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")}
"""Metadata of names of kernels, stages and shards: safe as parts of file names and in messages."""
POSITIVE: Mapping[str, Any] = {"low": 1}
_Reader = Callable[[Any, str], Any]
_NAMES = {int: "a number", float: "a number", str: "a string", bool: "true or false", type(None): "null"}
_MOST_DIGITS, _MOST_FOREIGN_DIGITS = 20, 40
"""Most characters of an integer, whose parsing takes quadratic time; transformers writes 10^30 for "unlimited"."""
_LONG_NUMBER = re.compile(rb"(?:^|[:,\[\s-])(?:\d{%d}|[\d.]+[eE]\+?\d{3})" % _MOST_DIGITS)
"""Beginning of every number that is too long, or may be beyond the range of a float, and of few other texts."""
MOST_PARSED_BYTES = 56 << 20
"""Most memory that a JSON text may take while it is parsed, by `parsed_bytes`, unless its reader allows more."""
_HARMLESS_BYTES = 256 << 10
"""Length up to which no JSON text takes that memory: a byte stands for 60 at most, in a list of empty lists."""
_VALUE_BYTES, _MEMBER_BYTES = 72, 160
"""Memory of a value, and that of its name where it is a member of an object: a string, and its places in two tables."""
_WIDEST = re.compile(rb"[\xf0-\xf4]|\\u[dD][89abAB]")
"""Beginning of a letter beyond the first 65,536 of Unicode: all letters of its string take 4 bytes each, else 2."""
_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxother = _shortener.maxlong = 100
_short = _shortener.repr
"""Function that returns a value as text, or a part of it where it is long or deeply nested."""


class WrongError(ValueError):
    """A value of a JSON tree that is not allowed."""


def strict_json(data: bytes, *, is_foreign: bool = False, most_bytes: int = MOST_PARSED_BYTES) -> Any:
    """Parse JSON, refusing everything that two parsers could read differently. Raises ValueError.

    Refused are duplicate keys, NaN, numbers beyond the range of a float or with more than 20 digits (parsing them takes
    quadratic time), nesting deeper than the stack of the interpreter, and texts that take too much memory.

    Args:
        is_foreign: transformers wrote the file: NaN, infinities and integers of 40 digits are read.
        most_bytes: the most memory that parsing may take, the text included.
    """
    if len(data) > _HARMLESS_BYTES and parsed_bytes(data) > most_bytes:
        raise ValueError(f"parsing its {format_size(len(data))} may take {format_size(parsed_bytes(data))} of memory")
    hooks: Dict[str, Any] = {} if is_foreign else {"parse_constant": _finite_float}
    if _LONG_NUMBER.search(data):  # hooks for all numbers take as long as the rest
        hooks["parse_int"] = partial(_short_int, most=_MOST_FOREIGN_DIGITS if is_foreign else _MOST_DIGITS)
        hooks.update({} if is_foreign else {"parse_float": _finite_float})
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique, **hooks)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parsed_bytes(data: bytes) -> int:
    """Return an upper bound on the memory that parsing takes: the bytes, their text, its strings, and the values."""
    letter_bytes = 1 if data.isascii() and b"\\u" not in data else 4 if _WIDEST.search(data) else 2
    num_values = sum(map(data.count, (b",", b"[", b"{")))
    return len(data) * (1 + 2 * letter_bytes) + _VALUE_BYTES * num_values + _MEMBER_BYTES * data.count(b":")


def _unique(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        seen: Set[str] = set()
        raise ValueError(f"duplicate key {_short(next(k for k, _ in pairs if k in seen or seen.add(k)))}")
    return tree


def _short_int(text: str, most: int) -> int:
    if len(text) > most:
        raise ValueError(f"number with {len(text)} digits")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.40} is not a finite number")
    return value


def read(kind: Any, tree: Any, where: str, *, fills: bool = False) -> Any:
    """Return a JSON tree as a value of `kind`. Raises WrongError naming the place, which begins with `where`.

    Args:
        kind: a dataclass, whose fields must all be there and no other; str, int, float, bool or Any; or Optional,
            Union of scalars, Tuple, Sequence, Mapping or Dict of these.
        fills: fields of the dataclass `kind` that have a default may be absent.
    """
    try:
        return (_object_reader(kind, True) if fills else _reader(kind, {}))(tree, where)
    except RecursionError:
        raise WrongError(f"{where or 'it'} is nested too deeply") from None


def read_used(kind: Any, tree: Any, where: str = "") -> Any:
    """Return the keys of an object that are fields of the dataclass `kind`; other keys are free. See `read`."""
    if isinstance(tree, dict):
        tree = {each.name: tree[each.name] for each in fields(kind) if each.name in tree}
    return read(kind, tree, where, fills=True)


def parse(kind: Any, data: bytes, where: str = "", *, fills: bool = False) -> Any:
    """Return the JSON in a file as a value of `kind`, see `read`. Raises WrongError."""
    try:
        tree = strict_json(data)
    except ValueError as error:
        raise WrongError(f"not JSON ({error})") from None
    return read(kind, tree, where, fills=fills)


def int_of(value: Any, where: str, low: int = 0, high: int = 1 << 53) -> int:
    """Return an integer from `low` to `high`; a boolean is none."""
    if type(value) is not int or not low <= value <= high:
        raise WrongError(f"{where} must be an integer from {low} to {high}, not {_short(value)}")
    return value


def require_shape(sizes: Iterable[int], where: str) -> None:
    """Raise WrongError for a shape that no array can have, although a size of 0 lets it have no elements."""
    if math.prod(size for size in sizes if size) > _MOST_ELEMENTS:
        raise WrongError(f"{where} has sizes that no array can have")


def str_of(value: Any, where: str, pattern: Optional[re.Pattern] = None, choices: Sequence[str] = ()) -> str:
    """Return a string that matches the pattern and is one of the choices, if they are given."""
    if choices and value not in choices:
        raise WrongError(f"{where} must be one of {choices}, not {_short(value)}")
    if not isinstance(value, str) or (pattern is not None and not pattern.fullmatch(value)):
        raise WrongError(
            f"{where} must be a string{' like ' + pattern.pattern if pattern else ''}, not {_short(value)}"
        )
    return value


def require_distinct(names: Iterable[str], what: str) -> None:
    """Raise WrongError for the first name that occurs twice."""
    seen: Set[str] = set()
    for name in names:
        if name in seen:
            raise WrongError(f"{what} {name!r} is listed twice")
        seen.add(name)


def require_listed(names: Iterable[str], known: Container[str], what: str) -> None:
    """Raise WrongError for the first name that is not among the known ones."""
    for name in names:
        if name not in known:
            raise WrongError(f"{what} {name!r}, which is not listed")


def require_known(kind: type, tree: Mapping[str, Any], what: str) -> None:
    """Raise ValueError naming the keys of `tree` that are no fields of the dataclass `kind`, and listing the fields."""
    known = [each.name for each in fields(kind)]
    unknown = sorted(set(tree) - set(known))
    if unknown:
        raise ValueError(f"unknown {what} {', '.join(unknown)}; known: {', '.join(known)}")


def _float_of(value: Any, where: str, low: float = -math.inf, high: float = math.inf) -> float:
    if type(value) not in (int, float) or not low <= value <= high:
        limits = "" if low == -high else f" from {low:g} to {high:g}"
        raise WrongError(f"{where} must be a number{limits}, not {_short(value)}")
    return value


def _bool_of(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise WrongError(f"{where} must be true or false, not {_short(value)}")
    return value


_SCALARS: Dict[Any, Tuple[_Reader, Tuple[str, ...]]] = {
    str: (str_of, ("pattern", "choices")),
    int: (int_of, ("low", "high")),
    float: (_float_of, ("low", "high")),
    bool: (_bool_of, ()),
}
"""Type -> its reader, and the metadata that it takes."""


def _reader(kind: Any, rules: Mapping[str, Any]) -> _Reader:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind in _SCALARS:
        check, known = _SCALARS[kind]
        given = {key: rules[key] for key in known if key in rules}
        return partial(check, **given) if given else check
    if is_dataclass(kind):
        return _object_reader(kind)
    if origin in (Union, getattr(types, "UnionType", Union)):
        return _union_reader(parts, rules)
    if origin is tuple or origin is AbstractSequence:
        return _list_reader(parts if origin is tuple else (*parts, ...), rules)
    if origin in (dict, AbstractMapping):
        return _map_reader(parts[1], rules)
    assert kind is Any, f"{kind!r} has no reader; modules of dataclasses that are read must not postpone annotations"
    return lambda tree, where: tree


@lru_cache(maxsize=None)
def _object_reader(kind: Any, fills: bool = False) -> _Reader:
    readers = [(each.name, _reader(each.type, each.metadata)) for each in fields(kind)]
    names = {name for name, _ in readers}
    needed = {each.name for each in fields(kind) if not fills or each.default is MISSING}

    def read_object(tree: Any, where: str) -> Any:
        if not isinstance(tree, dict):
            raise WrongError(f"{where or 'it'} must be an object, not {_short(tree)}")
        if not needed <= tree.keys() <= names:
            missing, unknown = sorted(needed - tree.keys()), sorted(tree.keys() - names)
            wrong = f"lacks {missing}" if missing else f"has unknown keys {_short(unknown)}"
            raise WrongError(f"{where or 'it'} {wrong}")
        before = where + "." if where else ""
        return kind(**{name: read_field(tree[name], before + name) for name, read_field in readers if name in tree})

    return read_object


def _union_reader(members: Tuple[Any, ...], rules: Mapping[str, Any]) -> _Reader:
    readers = {member: _reader(member, rules) for member in members if member is not type(None)}
    only = next(iter(readers.values())) if len(readers) == 1 else None
    expected = " or ".join(dict.fromkeys(_NAMES[member] for member in members if member in _NAMES))

    def read_union(tree: Any, where: str) -> Any:
        if tree is None and type(None) in members:
            return None
        found = only or readers.get(type(tree))
        if found is None:
            raise WrongError(f"{where} must be {expected}, not {_short(tree)}")
        return found(tree, where)

    return read_union


def _list_reader(parts: Tuple[Any, ...], rules: Mapping[str, Any]) -> _Reader:
    readers, most = [_reader(part, rules) for part in parts if part is not ...], rules.get("most")
    first, is_open, is_indexed = readers[0], parts[-1] is ..., is_dataclass(parts[0])

    def read_list(tree: Any, where: str) -> Tuple[Any, ...]:
        if not isinstance(tree, list):
            raise WrongError(f"{where} must be a list, not {_short(tree)}")
        if is_open and most is not None and len(tree) > most:
            raise WrongError(f"{where} has {len(tree)} elements, at most {most} are read")
        if not is_open and len(tree) != len(readers):
            raise WrongError(f"{where} must have {len(readers)} elements, not {len(tree)}")
        if is_indexed:
            return tuple([first(part, f"{where}[{i}]") for i, part in enumerate(tree)])
        if is_open:
            return tuple([first(part, where) for part in tree])
        return tuple([reader(part, where) for reader, part in zip(readers, tree)])

    return read_list


def _map_reader(kind: Any, rules: Mapping[str, Any]) -> _Reader:
    read_key, read_value, is_named = _reader(str, rules), _reader(kind, rules), is_dataclass(kind)

    def read_map(tree: Any, where: str) -> Dict[str, Any]:
        if not isinstance(tree, dict):
            raise WrongError(f"{where} must be an object, not {_short(tree)}")
        return {
            read_key(key, where): read_value(part, f"{where}.{key}" if is_named else where)
            for key, part in tree.items()
        }

    return read_map
