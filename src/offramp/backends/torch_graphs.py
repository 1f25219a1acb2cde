"""Captured graphs in PyTorch: a JSON list of operations, run one after the other.

Only the operations of `torch_operations` and a few on numbers are allowed, so a graph from an untrusted store can
compute and has no other effect. `torch_limits` bounds the memory and the time that it takes.
"""

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from offramp.backends.base import REMEDY
from offramp.backends.torch_operations import OPERATIONS
from offramp.errors import StoreError
from offramp.program.checks import WrongError, int_of, read, str_of, strict_json

NUMBERS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "floordiv": operator.floordiv,
    "mod": operator.mod, "truediv": operator.truediv, "neg": operator.neg, "ceil": math.ceil, "floor": math.floor,
    "getitem": operator.getitem, "pow": operator.pow, "le": operator.le, "lt": operator.lt, "ge": operator.ge,
    "gt": operator.gt, "eq": operator.eq, "ne": operator.ne, "max": max, "min": min, "int": int, "float": float,
    "sum": sum,
}  # fmt: skip
"""Operations on numbers that a graph may contain, by their names in graphs."""
UNLISTED = "run it with offramp.stream, or with --trust-kernels if you trust its author"
"""Remedy for a graph with operations outside the table."""
_REFUSED = ("aten.from_file", "aten.save", "aten._assert", "aten._print")
"""Prefixes of `aten` operations that open files, end the process or print: refused from trusted graphs as well."""
_MAY_SHARE = ("aten.dropout.default", "aten.type_as.default", "aten.feature_dropout.default", "aten.einsum.default")
"""Operations that may return their operand, or a view of it, without a schema that says so."""
_UNSET = ("aten.empty.memory_format", "aten.new_empty.default", "aten.empty_like.default")
"""Operations that make values without setting them."""
_MOST_BYTES = 2 << 20
"""Largest graph in bytes that is parsed: as objects it takes 20 times as much."""
_MOST_INPUTS = 1 << 12
_MOST_NODES = 1 << 13
_MOST_LISTED = 1 << 10
"""Most elements of a list of arguments."""
_MOST_LETTERS = 1 << 10
_MAX_DEPTH = 8
"""Deepest nesting of lists in arguments."""
_NODES = tuple[tuple[str, str, tuple[Any, ...], dict[str, Any]], ...]
"""Name of the value, operation, arguments by position and by name of each node."""
_KINDS = {
    "dtype": (
        "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64", "complex64",
        "complex128",
    ),
    "memory_format": ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d"),
    "layout": ("strided",),
}  # fmt: skip
"""Kind of argument -> names in torch that a graph may use."""
_NAMED = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout, "device": torch.device}
"""Arguments of operations that are things of torch."""


class Node(NamedTuple):
    """One operation of a graph."""

    name: str
    """Name of its result."""
    function: Callable[..., Any]
    args: Any
    kwargs: Any
    target: str
    schema: Any
    """The arguments of an operation of `aten`; None of one on numbers."""


class CapturedGraph(nn.Module):
    """One captured kernel. `trusted`: operations of `aten` that are not in the table are allowed.

    Raises StoreError for bytes that are not a graph and for operations that are not allowed.
    """

    def __init__(self, data: bytes, where: object, *, trusted: bool = False) -> None:
        super().__init__()
        self._writes, self._given = False, set[int]()
        try:
            if len(data) > _MOST_BYTES:
                raise ValueError(f"{len(data)} bytes, and at most {_MOST_BYTES} are read")
            tree = strict_json(data)
            counts = {letter: int_of(tree["inputs"][letter], "a number of inputs", 0, _MOST_INPUTS) for letter in "rwc"}
            self.inputs = [f"{letter}{i}" for letter, count in counts.items() for i in range(count)]
            listed = read(_NODES, tree["nodes"], "nodes")
            if len(listed) > _MOST_NODES:
                raise ValueError(f"{len(listed)} operations, and at most {_MOST_NODES} are run")
            self.nodes = [self._node(*each) for each in listed]
            self.outputs = read(tuple[str, ...], tree["outputs"], "outputs")
            self.last = self._last_uses()
            self._written = self._written_reads() if self._writes else set[str]()
        except (WrongError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StoreError(f"not a captured graph ({type(error).__name__}: {error})", where, REMEDY) from None
        self.unlisted = sorted({node.target for node in self.nodes} - OPERATIONS.keys() - NUMBERS.keys())
        if self.unlisted and not trusted:
            raise StoreError(f"operation {self.unlisted[0]} is none of those that kernels may use", where, UNLISTED)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs. `inputs` are values that the step reads, then weights, then constants, as in `inputs`."""
        values = self.start(inputs)
        for index, (name, function, args, kwargs, _, _) in enumerate(self.nodes):
            values[name] = function(*filled(args, values), **filled(kwargs, values))
            for ended in self.last.get(index, ()):
                del values[ended]
        return tuple(values[name] for name in self.outputs)

    def start(self, inputs: Sequence[Tensor]) -> dict[str, Any]:
        """Return the values before the first operation: copies of those that operations write to. Note which memory
        they must not write to.
        """
        if self._writes:
            self._given = set(map(storage_of, inputs))
        values: dict[str, Any] = dict(zip(self.inputs, inputs, strict=True))
        values.update({name: values[name].clone() for name in self._written})
        return values

    def _node(self, name: str, target: str, args: Any, kwargs: dict[str, Any]) -> Node:
        given = _value(args), {key: _value(part) for key, part in kwargs.items()}
        if target in NUMBERS:
            return Node(name, NUMBERS[target], *given, target, None)
        found: Any = self._operation(target)
        for i, each in enumerate(found._schema.arguments):
            inner = given[0][i] if i < len(args) else given[1].get(each.name)
            if inner is not None and not isinstance(inner, _NAMED.get(each.name, object)):
                raise ValueError(f"{each.name} of {target} is not a {each.name}")  # torch takes any number for it
        written = [(i, each) for i, each in enumerate(found._schema.arguments) if _is_written(each)]
        function = self._checked(found, written) if written else _zeroed(found) if target in _UNSET else found
        return Node(name, function, *given, target, found._schema)

    @staticmethod
    def _operation(target: str) -> torch._ops.OpOverload:
        namespace, _, rest = target.partition(".")
        name, _, overload = rest.partition(".")
        found = None
        if namespace == "aten" and not target.startswith(_REFUSED):
            found = getattr(getattr(torch.ops.aten, name, None), overload or "default", None)
        if not isinstance(found, torch._ops.OpOverload):
            raise ValueError(f"operation {target} is not allowed in a store")
        return found

    def _checked(self, function: Callable[..., Any], written: Sequence[tuple[int, Any]]) -> Callable[..., Any]:
        """Return an operation that writes to its arguments, and refuses to write to inputs of the graph."""
        self._writes = True

        def write(*args: Any, **kwargs: Any) -> Any:
            for index, argument in written:
                tensor = args[index] if index < len(args) else kwargs.get(argument.name)
                if not isinstance(tensor, Tensor) or storage_of(tensor) in self._given:
                    raise ValueError(f"operation {function} writes to an input of the graph")
            return function(*args, **kwargs)

        return write

    def _written_reads(self) -> set[str]:
        """Return the values of other steps that operations write to, as far as schemas tell that views share memory."""
        shares: dict[str, set[str]] = {name: {name} for name in self.inputs if name[0] == "r"}
        written = set[str]()
        for node in self.nodes:
            arguments = [] if node.schema is None else node.schema.arguments
            for i, argument in enumerate(arguments):
                given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
                roots = {root for name in _names(given) for root in shares.get(name, ())}
                if argument.alias_info is not None or node.target in _MAY_SHARE:
                    shares[node.name] = shares.get(node.name, set()) | roots
                if _is_written(argument):
                    written |= roots
            if node.schema is None:
                shares[node.name] = {root for name in _names(node.args) for root in shares.get(name, ())}
        return written

    def _last_uses(self) -> dict[int, list[str]]:
        """Return index of an operation -> values that no later operation uses.

        Raises ValueError unless each value is made once, and before it is used.
        """
        made, last = set(self.inputs), dict[str, int]()
        uses = [(node.name, _names([node.args, node.kwargs])) for node in self.nodes]
        for index, (name, used) in enumerate([*uses, ("", self.outputs)]):  # the last use is that of the outputs
            missing = [each for each in used if each not in made]
            if missing:
                raise ValueError(f"value {missing[0]!r} is used before it is made")
            if name in made:
                raise ValueError(f"value {name!r} is made twice")
            made.add(name)
            last.update(dict.fromkeys((name, *used), index))
        found = defaultdict[int, list[str]](list)
        for name in last.keys() - {"", *self.outputs}:
            found[last[name]].append(name)
        return found


def _zeroed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an operation that makes zeros in place of memory that other code has used."""
    return lambda *args, **kwargs: function(*args, **kwargs).zero_()


class _Reference(str):
    """Name of a value, as an argument of an operation."""

    __slots__ = ()


def storage_of(tensor: Tensor) -> int:
    """Return what identifies the memory of a tensor while it lives. Views have that of their base."""
    return tensor.untyped_storage()._cdata


def filled(part: Any, values: dict[str, Any]) -> Any:
    """Return arguments with values in place of the references to them."""
    if isinstance(part, _Reference):
        return values[part]
    if isinstance(part, list):
        return [filled(inner, values) for inner in part]
    if isinstance(part, dict):
        return {key: filled(inner, values) for key, inner in part.items()}
    return part


def _value(part: Any, depth: int = 0) -> Any:
    """Return an argument decoded from JSON, with references to values left in place."""
    if depth > _MAX_DEPTH:
        raise ValueError("arguments are nested too deeply")
    if isinstance(part, (list, tuple)):
        if len(part) > _MOST_LISTED:
            raise ValueError(f"a list of {len(part)} arguments, and at most {_MOST_LISTED} are taken")
        return [_value(inner, depth + 1) for inner in part]
    if isinstance(part, str) and len(part) > _MOST_LETTERS:
        raise ValueError(f"a text of {len(part)} letters, and at most {_MOST_LETTERS} are taken")
    if type(part) is int and not -(1 << 63) <= part < 1 << 63:
        raise ValueError("a number that does not fit 64 bits")
    return _named(part) if isinstance(part, dict) else part


def _named(part: dict[str, Any]) -> Any:
    """Return an argument that has no JSON form of its own."""
    if len(part) != 1:
        raise ValueError(f"an argument of {len(part)} kinds")
    ((kind, inner),) = part.items()
    if kind == "v":
        return _Reference(str_of(inner, "a value"))
    if kind == "float":
        return float(inner)
    if kind == "device":
        return torch.device("cpu")
    if inner not in _KINDS.get(kind, ()):
        raise ValueError(f"{inner} is not a {kind}")
    return getattr(torch, inner)


def _is_written(argument: Any) -> bool:
    """Return whether an operation writes to an argument of its schema."""
    return argument.alias_info is not None and argument.alias_info.is_write


def _names(part: Any) -> Sequence[str]:
    if isinstance(part, _Reference):
        return [part]
    inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return [name for each in inner for name in _names(each)]
