"""Reads an ONNX model from its bytes, without the package `onnx`: a strict reader of a part of its protocol buffers.

Two readers of the same bytes must not see two graphs. So everything that a lenient reader would merge, skip or repair
is refused here: fields that are not listed, a single field that occurs twice, numbers out of range, names that are not
UTF-8. What reaches the file system or runs other graphs is refused by name: external data, functions, strings.
Messages are at most as deep as the tables below, and graphs inside nodes at most `_MAX_DEPTH`.
"""

from __future__ import annotations

import struct
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple, Union

import numpy as np

from offramp.program.checks import WrongError, require_distinct

DTYPES: Mapping[int, str] = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16",
    11: "float64", 12: "uint32", 13: "uint64",
}  # fmt: skip
"""Number of an element type in ONNX -> its name in NumPy. Strings, complex numbers and formats below 16 bits lack."""
MAX_RANK = 12
"""Most axes of a value. Video transformers that cut windows have 8."""
Dimension = Union[int, str, None]
"""Size of an axis, its symbol, or neither."""
Declared = Tuple[str, Optional[Tuple[Dimension, ...]]]
"""Dtype and dimensions of an input or output; None: of any number of axes."""
_MAX_DEPTH = 4
_MAX_MESSAGES = 3 * _MAX_DEPTH + 8
"""Deepest nesting of messages: a graph, an operation and an attribute for each graph, and a type or constant."""
_MOST_MESSAGES = 1 << 16
"""Most messages of a model: an operation has 3 to 12, with its attributes."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Node(NamedTuple):
    """One operation. An input or output that is left out is an empty name."""

    operator: str
    """Name, with the domain unless that is the standard one: `Add`, `com.microsoft.Gelu`."""
    inputs: Tuple[str, ...]
    outputs: Tuple[str, ...]
    attributes: Mapping[str, Any]
    """Name -> int, float, text, tuple of these, array, or Graph."""


class Graph(NamedTuple):
    """Operations on named values, in an order in which each value is made before it is used."""

    inputs: Mapping[str, Declared]
    outputs: Mapping[str, Declared]
    constants: Mapping[str, np.ndarray]
    nodes: Tuple[Node, ...]


class Model(NamedTuple):
    """A graph, and the version of each set of operators that it uses, by domain."""

    graph: Graph
    opsets: Mapping[str, int]


def read_model(data: bytes) -> Model:
    """Return the model that bytes describe. Raises WrongError with the reason for bytes that this reader refuses."""
    tree = _Messages().read(data, "model")
    if "graph" not in tree:
        raise WrongError("the model has no graph")
    if not 3 < tree.get("ir_version", 0) < 64:  # up to 3, an input may replace a constant of the same name
        raise WrongError(f"the version of the format is {tree.get('ir_version')}")
    domains = [_domain(entry) for entry in tree.get("opsets", ())]
    require_distinct(domains, "the domain")
    opsets = {domain: entry.get("version", 0) for domain, entry in zip(domains, tree.get("opsets", ()))}
    return Model(_graph(tree["graph"], 0), opsets)


def _domain(tree: Mapping[str, Any]) -> str:
    return "" if tree.get("domain") == "ai.onnx" else tree.get("domain", "")


# A message: number of a field -> its name, its kind, whether it may occur several times. A kind is a key of `_SCALARS`,
# "skip" for documentation, "refuse", or another message.
_Field = Tuple[str, str, bool]
_MESSAGES: Dict[str, Dict[int, _Field]] = {
    "model": {
        1: ("ir_version", "int", False), 2: ("producer", "skip", False), 3: ("producer", "skip", False),
        4: ("domain", "skip", False), 5: ("version", "int", False), 6: ("doc", "skip", False),
        7: ("graph", "graph", False), 8: ("opsets", "opset", True), 14: ("metadata", "skip", True),
        20: ("training", "refuse", True), 25: ("functions", "refuse", True), 26: ("devices", "refuse", True),
    },
    "opset": {1: ("domain", "text", False), 2: ("version", "int", False)},
    "graph": {
        1: ("nodes", "node", True), 2: ("name", "skip", False), 5: ("constants", "tensor", True),
        10: ("doc", "skip", False), 11: ("inputs", "value", True), 12: ("outputs", "value", True),
        13: ("inner", "value", True), 14: ("quantization", "refuse", True),
        15: ("sparse constants", "refuse", True), 16: ("metadata", "skip", True),
    },
    "node": {
        1: ("inputs", "text", True), 2: ("outputs", "text", True), 3: ("name", "skip", False),
        4: ("operator", "text", False), 5: ("attributes", "attribute", True), 6: ("doc", "skip", False),
        7: ("domain", "text", False), 8: ("overload", "refuse", False), 9: ("metadata", "skip", True),
        10: ("devices", "refuse", True),
    },
    "attribute": {
        1: ("name", "text", False), 2: ("f", "float", False), 3: ("i", "int", False), 4: ("s", "text", False),
        5: ("t", "tensor", False), 6: ("g", "graph", False), 7: ("floats", "float", True), 8: ("ints", "int", True),
        9: ("strings", "text", True), 10: ("tensors", "refuse", True), 11: ("graphs", "refuse", True),
        13: ("doc", "skip", False), 14: ("types", "refuse", False), 15: ("types", "refuse", True),
        20: ("type", "int", False), 21: ("references", "refuse", False), 22: ("sparse tensors", "refuse", False),
        23: ("sparse tensors", "refuse", True),
    },
    "tensor": {
        1: ("dims", "int", True), 2: ("dtype", "int", False), 3: ("segments", "refuse", False),
        4: ("float_data", "float", True), 5: ("int32_data", "int", True), 6: ("strings", "refuse", True),
        7: ("int64_data", "int", True), 8: ("name", "text", False), 9: ("raw", "bytes", False),
        10: ("double_data", "double", True), 11: ("uint64_data", "int", True), 12: ("doc", "skip", False),
        13: ("external data", "refuse", True), 14: ("external data", "zero", False), 16: ("metadata", "skip", True),
    },
    "value": {
        1: ("name", "text", False), 2: ("type", "type", False), 3: ("doc", "skip", False),
        4: ("metadata", "skip", True),
    },
    "type": {
        1: ("tensor", "tensor type", False), 4: ("sequences", "refuse", False), 5: ("maps", "refuse", False),
        6: ("denotation", "skip", False), 7: ("opaque types", "refuse", False), 8: ("sparse tensors", "refuse", False),
        9: ("optional values", "refuse", False),
    },
    "tensor type": {1: ("dtype", "int", False), 2: ("shape", "shape", False)},
    "shape": {1: ("dims", "dimension", True)},
    "dimension": {1: ("size", "int", False), 2: ("symbol", "text", False), 3: ("denotation", "skip", False)},
}  # fmt: skip
_SCALARS = {"int": _VARINT, "zero": _VARINT, "float": _FIXED32, "double": _FIXED64}
"""Kind -> wire type of its numbers, which may also be packed. All other kinds have the wire type of bytes."""


class _Messages:
    """Reads messages inside one another, up to a number of them: one takes 2 bytes, and a hundred in memory."""

    def __init__(self) -> None:
        self._left = _MOST_MESSAGES

    def read(self, data: bytes, kind: str, depth: int = 0) -> Dict[str, Any]:
        """Return the fields of a message by name; those that may occur several times as lists."""
        self._left -= 1
        if depth > _MAX_MESSAGES or self._left < 0:
            raise WrongError("graphs are nested too deeply" if self._left >= 0 else "it has too many operations")
        fields, found = _MESSAGES[kind], {}
        for number, wire, value in _fields(data):
            if number not in fields:
                raise WrongError(f"field {number} of the message {kind!r} is not known")
            name, inner, is_repeated = fields[number]
            if inner == "refuse":
                raise WrongError(f"it has {name}")
            expected = _SCALARS.get(inner, _BYTES)
            if wire != expected and not (wire == _BYTES and is_repeated):
                raise WrongError(f"field {number} of the message {kind!r} has the wire type {wire}")
            if is_repeated and wire != expected:
                found.setdefault(name, []).extend(_numbers(value, expected))
                continue
            value = self.read(value, inner, depth + 1) if inner in _MESSAGES else _value(value, inner, name)
            if is_repeated:
                found.setdefault(name, []).append(value)
            elif name in found and inner != "skip":
                raise WrongError(f"field {number} of the message {kind!r} occurs twice")
            else:
                found[name] = value
        return found


def _value(value: Any, kind: str, name: str) -> Any:
    if kind == "zero" and value:
        raise WrongError(f"it has {name}")
    if kind == "text":
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise WrongError("a name is not UTF-8") from None
    if kind == "float":
        return struct.unpack("<f", value)[0]
    if kind == "double":
        return struct.unpack("<d", value)[0]
    return None if kind == "skip" else value


def _numbers(data: bytes, wire: int) -> List[Any]:
    """Return packed numbers."""
    if wire != _VARINT:
        size, letter = (4, "f") if wire == _FIXED32 else (8, "d")
        if len(data) % size:
            raise WrongError("packed numbers end in the middle")
        return list(struct.unpack(f"<{len(data) // size}{letter}", data))
    found, place = [], 0
    while place < len(data):
        number, place = _varint(data, place)
        found.append(number)
    return found


def _fields(data: bytes) -> Iterator[Tuple[int, int, Any]]:
    """Yield (number, wire type, value) of each field: an integer, or bytes."""
    place, end = 0, len(data)
    while place < end:
        key, place = _varint(data, place)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, place = _varint(data, place)
            yield number, wire, value
            continue
        if wire == _BYTES:
            size, place = _varint(data, place)
        else:
            size = {_FIXED32: 4, _FIXED64: 8}.get(wire, -1)
        if not 0 <= size <= end - place:
            raise WrongError("not an ONNX model: a field is longer than its message, or of an unknown wire type")
        yield number, wire, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> Tuple[int, int]:
    """Return the signed 64-bit integer at a place, and the place after it."""
    number = shift = 0
    while True:
        if place >= len(data) or shift > 63:
            raise WrongError("not an ONNX model: a number has no end")
        byte = data[place]
        place += 1
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    if number >> 64:
        raise WrongError("not an ONNX model: a number has more than 64 bits")
    return (number - (1 << 64) if number >> 63 else number), place


def _graph(tree: Mapping[str, Any], depth: int) -> Graph:
    """Return a graph in which each value is made once, and before it is used."""
    if depth > _MAX_DEPTH:
        raise WrongError("graphs are nested too deeply")
    if tree.get("inner") and not depth:  # graphs inside operations are refused by their operator
        raise WrongError("it has shapes of inner values")
    constants = {each.get("name", ""): _array(each) for each in tree.get("constants", ())}
    inputs, outputs = (
        {each.get("name", ""): _type(each) if not depth else ("", None) for each in tree.get(part, ())}
        for part in ("inputs", "outputs")
    )
    nodes = tuple(_node(each, depth) for each in tree.get("nodes", ()))
    makers = (tree.get("constants", ()), tree.get("inputs", ()))
    names = [each.get("name", "") for part in makers for each in part]
    require_distinct([*names, *(name for node in nodes for name in node.outputs if name)], "the value")
    require_distinct([each.get("name", "") for each in tree.get("outputs", ())], "the output")
    return Graph(inputs, outputs, constants, nodes)


def _type(tree: Mapping[str, Any]) -> Declared:
    """Return dtype and dimensions of an input or output."""
    tensor = tree.get("type", {}).get("tensor", {})
    if "shape" not in tensor:
        return _dtype(tensor), None
    return _dtype(tensor), tuple(each.get("size", each.get("symbol")) for each in tensor["shape"].get("dims", ()))


def _dtype(tree: Mapping[str, Any]) -> str:
    if tree.get("dtype") not in DTYPES:
        raise WrongError(f"values of the element type {tree.get('dtype')}")
    return DTYPES[tree["dtype"]]


def _node(tree: Mapping[str, Any], depth: int) -> Node:
    domain, name = _domain(tree), tree.get("operator", "")
    require_distinct([each.get("name", "") for each in tree.get("attributes", ())], "the attribute")
    attributes = {each.get("name", ""): _attribute(each, depth) for each in tree.get("attributes", ())}
    operator = f"{domain}.{name}" if domain else name
    return Node(operator, tuple(tree.get("inputs", ())), tuple(tree.get("outputs", ())), attributes)


_ATTRIBUTES = {1: "f", 2: "i", 3: "s", 4: "t", 5: "g", 6: "floats", 7: "ints", 8: "strings"}
"""Number of a type of attributes -> field of its value."""


def _attribute(tree: Mapping[str, Any], depth: int) -> Any:
    """Return the value of an attribute: that of its type, and there must be no other."""
    field = _ATTRIBUTES.get(tree.get("type", 0))
    if field is None or any(tree.get(other) for other in _ATTRIBUTES.values() if other != field):
        raise WrongError(f"the attribute {tree.get('name')!r} has the type {tree.get('type')}, and another value")
    if field in ("t", "g") and field not in tree:
        raise WrongError(f"the attribute {tree.get('name')!r} has no value")
    if field == "t":
        return _array(tree["t"])
    if field == "g":
        return _graph(tree["g"], depth + 1)
    value = tree.get(field, {"f": 0.0, "i": 0, "s": ""}.get(field, []))
    return tuple(value) if isinstance(value, list) else value


_LISTS = {"float32": "float_data", "float64": "double_data", "int64": "int64_data", "uint64": "uint64_data",
          "uint32": "uint64_data"}  # fmt: skip
"""Element type -> list of its numbers, where that is not `int32_data`."""
_BITS = {"float16": "uint16", "bool": "uint8"}
"""Element type -> type of the integers that stand for it in a list."""
_MOST_ELEMENTS = 1 << 32
"""Largest product of the sizes of a constant, zeros left out: NumPy refuses larger ones in several ways."""


def _array(tree: Mapping[str, Any]) -> np.ndarray:
    """Return a constant. The number of its elements must be the product of its sizes."""
    dtype, name, dims = _dtype(tree), tree.get("name", ""), tree.get("dims", ())
    count = most = 1
    for size in dims:
        count, most = count * size, most * max(size, 1)
        if size < 0 or most > _MOST_ELEMENTS or len(dims) > MAX_RANK:
            raise WrongError(f"the constant {name!r} has the sizes {dims[:MAX_RANK]}")
    lists = {key: tree[key] for key in {"int32_data", *_LISTS.values()} if tree.get(key)}
    if "raw" in tree and not lists:
        num_bytes = count * np.dtype(dtype).itemsize
        if len(tree["raw"]) != num_bytes:
            raise WrongError(f"the constant {name!r} has {len(tree['raw'])} bytes, not {num_bytes}")
        array = np.frombuffer(tree["raw"], np.dtype(_BITS.get(dtype, dtype)).newbyteorder("<"))
    else:
        found, stored = lists.pop(_LISTS.get(dtype, "int32_data"), []), np.dtype(_BITS.get(dtype, dtype))
        if lists or "raw" in tree:
            raise WrongError(f"the constant {name!r} has its numbers in two places")
        if len(found) != count:
            raise WrongError(f"the constant {name!r} has {len(found)} numbers, not {count}")
        if stored.kind in "iu" and found:
            limits = np.iinfo(stored)
            if min(found) < limits.min or max(found) > limits.max:
                raise WrongError(f"the constant {name!r} has numbers out of range")
        array = np.array(found, stored)
    if dtype == "bool" and count and array.max() > 1:
        raise WrongError(f"the constant {name!r} has numbers out of range")
    return array.view(dtype).reshape(dims)
