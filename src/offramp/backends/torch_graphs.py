"""Graphs of segments in PyTorch: a list of operations of torch's own, as JSON, run one after the other.

Only operations in torch's `aten` namespace, and a few on numbers, are known: a graph from a stranger can multiply, and
nothing else.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import StoreError

NUMBERS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": operator.floordiv,
    "mod": operator.mod, "truediv": operator.truediv, "neg": operator.neg, "ceil": math.ceil, "floor": math.floor,
    "getitem": operator.getitem, "pow": operator.pow, "le": operator.le, "lt": operator.lt, "ge": operator.ge,
    "gt": operator.gt, "eq": operator.eq, "ne": operator.ne, "max": max, "min": min, "int": int, "float": float,
    "sum": sum,
}  # fmt: skip
"""Python's own operations that may stand in a graph, by the name that they have there."""
_REFUSED = ("aten.from_file", "aten._assert", "aten._print")
"""Operations that open files, end the process or speak."""
_MOST_INPUTS = 1 << 16
_DEEPEST = 16
"""Of lists in lists: how deep Python itself goes depends on its version."""
_KINDS = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}
_REMEDY = "divide the model again"


class SegmentGraph(nn.Module):
    """One kind. Raises StoreError for a graph that it does not know."""

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
            raise StoreError(f"no graph of a segment ({type(error).__name__}: {error})", where, _REMEDY) from None
        self._last = self._last_uses()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Values that flow in, then weights, then constants, in the order of the segment; returns what it writes."""
        there: dict[str, Any] = dict(zip(self.inputs, inputs, strict=True))
        for index, (name, function, args, kwargs) in enumerate(self._nodes):
            there[name] = function(*_filled(args, there), **_filled(kwargs, there))
            for done in self._last.get(index, ()):
                del there[done]
        return tuple(there[name] for name in self._outputs)

    def _value(self, part: Any, depth: int = 0) -> Any:
        """An argument of JSON; references stay for later."""
        if depth > _DEEPEST:
            raise ValueError("arguments lie too deep in one another")
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
                    raise ValueError(f"{part[kind]} is no {kind}")
                return found
        return {key: self._value(inner, depth + 1) for key, inner in part.items()}

    def _by_name(self, kwargs: Any) -> dict[str, Any]:
        """Named arguments, whatever they are called: `dtype` is such a name, and a kind of value as well."""
        if not isinstance(kwargs, dict):
            raise TypeError("named arguments are no object")
        return {key: self._value(inner) for key, inner in kwargs.items()}

    def _require_order(self) -> None:
        """Raise ValueError unless each value is made once, and before it is used."""
        there = set(self.inputs)
        for name, _, args, kwargs in self._nodes:
            lost = [used for used in _names([args, kwargs]) if used not in there]
            if lost:
                raise ValueError(f"value {lost[0]!r} is used before it is there")
            if _name(name) in there:
                raise ValueError(f"value {name!r} is made twice")
            there.add(name)
        lost = [name for name in self._outputs if name not in there]
        if lost:
            raise ValueError(f"value {lost[0]!r} is never made")

    def _last_uses(self) -> dict[int, list[str]]:
        """Index of an operation -> values that nothing after it needs."""
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
    """The name of a value."""

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
        raise ValueError(f"operation {target} is not run from a store")
    return found


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MOST_INPUTS:
        raise ValueError(f"{value!r} is no number of inputs")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no name of a value")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError("arguments are no list")
    return value


def _filled(part: Any, there: dict[str, Any]) -> Any:
    if isinstance(part, _Reference):
        return there[part]
    if isinstance(part, list):
        return [_filled(inner, there) for inner in part]
    if isinstance(part, dict):
        return {key: _filled(inner, there) for key, inner in part.items()}
    return part


def _names(part: Any) -> Sequence[str]:
    if isinstance(part, _Reference):
        return [part]
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return [name for each in inner for name in _names(each)]
