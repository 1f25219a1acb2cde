"""JSON trees read as dataclasses: every value is checked against the annotation and the metadata of its field.

The metadata of a field apply to all parts of its annotation:

    pattern      regular expression that strings and keys match as a whole
    choices      allowed strings
    low, high    range of integers; without them 0 to 2^53
    most         longest list
"""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping as AbstractMapping
from collections.abc import Sequence as AbstractSequence
from dataclasses import fields, is_dataclass
from functools import lru_cache, partial
from typing import Any, Callable, Container, Dict, Iterable, Mapping, Optional, Sequence, Set, Tuple, Union

MAX_RANK = 64
"""Largest number of dimensions of a tensor or axes of a value."""
NAMED: Mapping[str, Any] = {"pattern": re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")}
"""Metadata of names of kernels, stages and shards: safe as parts of file names and in messages."""
POSITIVE: Mapping[str, Any] = {"low": 1}
_Reader = Callable[[Any, str], Any]
_NAMES = {int: "a number", float: "a number", str: "a string", type(None): "null"}


class WrongError(ValueError):
    """A value of a JSON tree that is not allowed."""


def read(kind: Any, tree: Any, where: str) -> Any:
    """Return a JSON tree as a value of `kind`. Raises WrongError naming the place, which begins with `where`.

    Args:
        kind: a dataclass, whose fields must all be there and no other; str, int, float, bool or Any; or Optional,
            Union of scalars, Tuple, Sequence, Mapping or Dict of these.
    """
    try:
        return _reader(kind, {})(tree, where)
    except RecursionError:
        raise WrongError(f"{where} is nested too deeply") from None


def int_of(value: Any, where: str, low: int = 0, high: int = 1 << 53) -> int:
    """Return an integer from `low` to `high`; a boolean is none."""
    if type(value) is not int or not low <= value <= high:
        raise WrongError(f"{where} must be an integer from {low} to {high}, not {value!r}")
    return value


def str_of(value: Any, where: str, pattern: Optional[re.Pattern] = None, choices: Sequence[str] = ()) -> str:
    """Return a string that matches the pattern and is one of the choices, if they are given."""
    if choices and value not in choices:
        raise WrongError(f"{where} must be one of {choices}, not {value!r}")
    if not isinstance(value, str) or (pattern is not None and not pattern.fullmatch(value)):
        raise WrongError(f"{where} must be a string{' like ' + pattern.pattern if pattern else ''}, not {value!r}")
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


def _float_of(value: Any, where: str) -> float:
    if type(value) not in (int, float):
        raise WrongError(f"{where} must be a number, not {value!r}")
    return value


def _bool_of(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise WrongError(f"{where} must be true or false, not {value!r}")
    return value


_SCALARS: Dict[Any, Tuple[_Reader, Tuple[str, ...]]] = {
    str: (str_of, ("pattern", "choices")),
    int: (int_of, ("low", "high")),
    float: (_float_of, ()),
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
    if origin is Union:
        return _union_reader(parts, rules)
    if origin is tuple or origin is AbstractSequence:
        return _list_reader(parts if origin is tuple else (*parts, ...), rules)
    if origin in (dict, AbstractMapping):
        return _map_reader(parts[1], rules)
    assert kind is Any, f"{kind!r} has no reader; modules of dataclasses that are read must not postpone annotations"
    return lambda tree, where: tree


@lru_cache(maxsize=None)
def _object_reader(kind: Any) -> _Reader:
    readers = [(each.name, _reader(each.type, each.metadata)) for each in fields(kind)]
    names = {name for name, _ in readers}

    def read_object(tree: Any, where: str) -> Any:
        if not isinstance(tree, dict):
            raise WrongError(f"{where} must be an object")
        if tree.keys() != names:
            missing, unknown = sorted(names - tree.keys()), sorted(tree.keys() - names)
            wrong = f"lacks {missing}" if missing else f"has unknown keys {unknown}"
            raise WrongError(f"{where or 'the object'} {wrong}")
        before = where + "." if where else ""
        return kind(*[read_field(tree[name], before + name) for name, read_field in readers])

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
            raise WrongError(f"{where} must be {expected}, not {tree!r}")
        return found(tree, where)

    return read_union


def _list_reader(parts: Tuple[Any, ...], rules: Mapping[str, Any]) -> _Reader:
    readers, most = [_reader(part, rules) for part in parts if part is not ...], rules.get("most")
    first, is_open, is_indexed = readers[0], parts[-1] is ..., is_dataclass(parts[0])

    def read_list(tree: Any, where: str) -> Tuple[Any, ...]:
        if not isinstance(tree, list):
            raise WrongError(f"{where} must be a list")
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
            raise WrongError(f"{where} must be an object")
        return {
            read_key(key, where): read_value(part, f"{where}.{key}" if is_named else where)
            for key, part in tree.items()
        }

    return read_map
