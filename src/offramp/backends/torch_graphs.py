"""Captured graphs in PyTorch: a JSON list of operations, run one after the other.

Only operations of torch's `aten` namespace and a few on numbers are allowed, so a graph from an untrusted store can
compute and has no other effect.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backends.base import REMEDY
from offramp.errors import StoreError

NUMBERS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": operator.floordiv,
    "mod": operator.mod, "truediv": operator.truediv, "neg": operator.neg, "ceil": math.ceil, "floor": math.floor,
    "getitem": operator.getitem, "pow": operator.pow, "le": operator.le, "lt": operator.lt, "ge": operator.ge,
    "gt": operator.gt, "eq": operator.eq, "ne": operator.ne, "max": max, "min": min, "int": int, "float": float,
    "sum": sum,
}  # fmt: skip
"""Operations on numbers that a graph may contain, by their names in graphs."""
_REFUSED = ("aten.from_file", "aten._assert", "aten._print")
"""Prefixes of `aten` operations that open files, end the process or print."""
_MOST_INPUTS = 1 << 16
_MAX_DEPTH = 16
"""Deepest nesting of lists in arguments. Python's own limit depends on its version."""
_KINDS = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}


class CapturedGraph(nn.Module):
    """One captured kernel. Raises StoreError for bytes that are not a graph and for operations that are not allowed."""

    def __init__(self, data: bytes, where: object) -> None:
        super().__init__()
        try:
            tree = json.loads(data)
            counts = [_count(tree["inputs"][letter]) for letter in "rwc"]
            self.inputs = [f"{letter}{i}" for letter, count in zip("rwc", counts, strict=True) for i in range(count)]
            self._nodes = [
                (name, _function(target), _list(self._value(args)), self._by_name(kwargs))
                for name, target, args, kwargs in tree["nodes"]
            ]
            self._outputs = [_name(name) for name in tree["outputs"]]
            self._require_order()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StoreError(f"not a captured graph ({type(error).__name__}: {error})", where, REMEDY) from None
        self._last = self._last_uses()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs. `inputs` are values that the step reads, then weights, then constants, as in `inputs`."""
        values: dict[str, Any] = dict(zip(self.inputs, inputs, strict=True))
        for index, (name, function, args, kwargs) in enumerate(self._nodes):
            values[name] = function(*_filled(args, values), **_filled(kwargs, values))
            for ended in self._last.get(index, ()):
                del values[ended]
        return tuple(values[name] for name in self._outputs)

    def _value(self, part: Any, depth: int = 0) -> Any:
        """Return an argument decoded from JSON, with references to values left in place."""
        if depth > _MAX_DEPTH:
            raise ValueError("arguments are nested too deeply")
        if isinstance(part, list):
            return [self._value(inner, depth + 1) for inner in part]
        if not isinstance(part, dict):
            return part
        if set(part) == {"v"}:
            return _Reference(_name(part["v"]))
        if set(part) == {"float"}:
            return float(part["float"])
        if set(part) == {"device"}:
            return torch.device("cpu")
        for kind, cls in _KINDS.items():
            if set(part) == {kind}:
                found = getattr(torch, part[kind])
                if not isinstance(found, cls):
                    raise ValueError(f"{part[kind]} is not a {kind}")
                return found
        return {key: self._value(inner, depth + 1) for key, inner in part.items()}

    def _by_name(self, kwargs: Any) -> dict[str, Any]:
        """Return the named arguments. Their names are free: `dtype` can be one, and is a kind of value as well."""
        if not isinstance(kwargs, dict):
            raise TypeError("named arguments are not an object")
        return {key: self._value(inner) for key, inner in kwargs.items()}

    def _require_order(self) -> None:
        """Raise ValueError unless each value is made once, and before it is used."""
        made = set(self.inputs)
        for name, _, args, kwargs in self._nodes:
            missing = [used for used in _names([args, kwargs]) if used not in made]
            if missing:
                raise ValueError(f"value {missing[0]!r} is used before it is made")
            if _name(name) in made:
                raise ValueError(f"value {name!r} is made twice")
            made.add(name)
        missing = [name for name in self._outputs if name not in made]
        if missing:
            raise ValueError(f"value {missing[0]!r} is never made")

    def _last_uses(self) -> dict[int, list[str]]:
        """Return index of an operation -> values that no later operation uses."""
        last: dict[str, int] = {}
        for index, (name, _, args, kwargs) in enumerate(self._nodes):
            for used in (name, *_names([args, kwargs])):
                last[used] = index
        found: dict[int, list[str]] = {}
        for name, index in last.items():
            if name not in self._outputs:
                found.setdefault(index, []).append(name)
        return found


class _Reference(str):
    """Name of a value, as an argument of an operation."""

    __slots__ = ()


def _function(target: str) -> Callable[..., Any]:
    if target in NUMBERS:
        return NUMBERS[target]
    namespace, _, rest = target.partition(".")
    name, _, overload = rest.partition(".")
    found = None
    if namespace == "aten" and not target.startswith(_REFUSED):
        found = getattr(getattr(torch.ops.aten, name, None), overload or "default", None)
    if not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"operation {target} is not allowed in a store")
    return found


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MOST_INPUTS:
        raise ValueError(f"{value!r} is not a number of inputs")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not the name of a value")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("arguments are not a list")
    return value


def _filled(part: Any, values: dict[str, Any]) -> Any:
    if isinstance(part, _Reference):
        return values[part]
    if isinstance(part, list):
        return [_filled(inner, values) for inner in part]
    if isinstance(part, dict):
        return {key: _filled(inner, values) for key, inner in part.items()}
    return part


def _names(part: Any) -> Sequence[str]:
    if isinstance(part, _Reference):
        return [part]
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return [name for each in inner for name in _names(each)]
