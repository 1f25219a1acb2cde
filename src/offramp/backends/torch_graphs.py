"""Captured graphs in PyTorch: a JSON list of operations, run one after the other.

Only operations of torch's `aten` namespace and a few on numbers are allowed, so a graph from an untrusted store can
compute and has no other effect.
"""

import json
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backends.base import REMEDY
from offramp.errors import StoreError
from offramp.program.checks import WrongError, int_of, read, str_of

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
_NODES = tuple[tuple[str, str, tuple[Any, ...], dict[str, Any]], ...]
"""Name of the value, operation, arguments by position and by name of each node."""
_KINDS = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}


class CapturedGraph(nn.Module):
    """One captured kernel. Raises StoreError for bytes that are not a graph and for operations that are not allowed."""

    def __init__(self, data: bytes, where: object) -> None:
        super().__init__()
        try:
            tree = json.loads(data)
            counts = {letter: int_of(tree["inputs"][letter], "a number of inputs", 0, _MOST_INPUTS) for letter in "rwc"}
            self.inputs = [f"{letter}{i}" for letter, count in counts.items() for i in range(count)]
            self._nodes = [
                (name, _function(target), _value(args), {key: _value(inner) for key, inner in kwargs.items()})
                for name, target, args, kwargs in read(_NODES, tree["nodes"], "nodes")
            ]
            self._outputs = read(tuple[str, ...], tree["outputs"], "outputs")
            self._last = self._last_uses()
        except (WrongError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StoreError(f"not a captured graph ({type(error).__name__}: {error})", where, REMEDY) from None

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs. `inputs` are values that the step reads, then weights, then constants, as in `inputs`."""
        values: dict[str, Any] = dict(zip(self.inputs, inputs, strict=True))
        for index, (name, function, args, kwargs) in enumerate(self._nodes):
            values[name] = function(*_filled(args, values), **_filled(kwargs, values))
            for ended in self._last.get(index, ()):
                del values[ended]
        return tuple(values[name] for name in self._outputs)

    def _last_uses(self) -> dict[int, list[str]]:
        """Return index of an operation -> values that no later operation uses.

        Raises ValueError unless each value is made once, and before it is used.
        """
        made, last = set(self.inputs), dict[str, int]()
        uses = [(name, _names([args, kwargs])) for name, _, args, kwargs in self._nodes]
        for index, (name, used) in enumerate([*uses, ("", self._outputs)]):  # the last use is that of the outputs
            missing = [each for each in used if each not in made]
            if missing:
                raise ValueError(f"value {missing[0]!r} is used before it is made")
            if name in made:
                raise ValueError(f"value {name!r} is made twice")
            made.add(name)
            last.update(dict.fromkeys((name, *used), index))
        found = defaultdict[int, list[str]](list)
        for name in last.keys() - {"", *self._outputs}:
            found[last[name]].append(name)
        return found


class _Reference(str):
    """Name of a value, as an argument of an operation."""

    __slots__ = ()


def _value(part: Any, depth: int = 0) -> Any:
    """Return an argument decoded from JSON, with references to values left in place."""
    if depth > _MAX_DEPTH:
        raise ValueError("arguments are nested too deeply")
    if isinstance(part, (list, tuple)):
        return [_value(inner, depth + 1) for inner in part]
    if not isinstance(part, dict):
        return part
    if len(part) != 1 or not part.keys() <= {"v", "float", "device", *_KINDS}:
        return {key: _value(inner, depth + 1) for key, inner in part.items()}
    ((kind, inner),) = part.items()
    if kind == "v":
        return _Reference(str_of(inner, "a value"))
    if kind == "float":
        return float(inner)
    if kind == "device":
        return torch.device("cpu")
    found = getattr(torch, inner)
    if not isinstance(found, _KINDS[kind]):
        raise ValueError(f"{inner} is not a {kind}")
    return found


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
