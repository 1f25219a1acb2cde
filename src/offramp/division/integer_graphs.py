"""ONNX graphs whose products of rows and a weight become products of integers.

The weight becomes integers [K, N] under the same name, with one more input for the scales of its outputs. Rows are
rotated and rounded inside the graph, each by its own scale, as kernels of templates do (`backends/onnx_templates.py`):
an answer never depends on the other rows of its batch. Products of the same rows share that.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from offramp.program.narrow import DEFAULTS, LEAST_MAGNITUDE, SCALE, ZERO_POINT, Turned, hadamard, rotation_of, steps_of

CONTRIB = "com.microsoft"
PREFIX = "offramp."
"""Beginning of the names of values that are added to a graph."""


class Port(NamedTuple):
    """A weight of a graph that only products of rows take, and its sizes."""

    is_transposed: bool
    """The weight is [N, K], not [K, N]."""
    inputs: int
    outputs: int

    @property
    def turned(self) -> Turned:
        """Return the form of the integers."""
        return Turned(turn_of(self.inputs), self.is_transposed)


def turn_of(inputs: int) -> int:
    """Return the rotation of rows. It is smaller than they are: libraries multiply a single row in another order than
    the same row among others, and the last bits of an answer must not depend on its batch.
    """
    size = rotation_of(inputs)
    return size if size < inputs else max(size // 2, 1)


@dataclass
class Uses:
    """The weights of a graph that may become integers."""

    ports: dict[str, Port] = field(default_factory=dict)
    results: dict[str, set[int]] = field(default_factory=dict)
    """Weight -> numbers of the graph's results that are its product, perhaps with a bias."""


def uses_of(data: bytes) -> Uses:
    """Return the weights of a graph that may become integers."""
    import onnx

    graph = onnx.load_from_string(data).graph
    outputs, found = [value.name for value in graph.output], Uses()
    shapes = {value.name: _shape(value) for value in graph.input if value.name.startswith("w")}
    for name, shape in shapes.items():
        if len(shape) != 2:
            continue
        uses = list(_uses(graph, name, outputs))
        orders = {order for order, _ in uses}
        if len(orders) != 1 or None in orders:
            continue
        is_transposed = bool(orders.pop())
        sizes = shape[::-1] if is_transposed else shape
        found.ports[name] = Port(is_transposed, *sizes)
        results = {result for _, node in uses for result in _sums(graph, node)}
        found.results[name] = {outputs.index(result) for result in results if result in outputs}
    return found


def _shape(value: Any) -> tuple[int, ...]:
    """Return the sizes of an input of floats; () where they are not fixed."""
    tensor = value.type.tensor_type
    sizes = tuple(each.dim_value for each in tensor.shape.dim)
    return sizes if tensor.elem_type == 1 and all(sizes) else ()


def _uses(graph: Any, name: str, outputs: Sequence[str]) -> Iterator[tuple[bool | None, Any]]:
    """Yield for each use of a weight whether it is transposed, and its product; None for a use of another kind."""
    if name in outputs:
        yield None, None
    for node in graph.node:
        places = [place for place, each in enumerate(node.input) if each == name]
        if not places:
            continue
        about = _attributes(node)
        if node.op_type == "Transpose" and not node.domain and list(about.get("perm", [1, 0])) == [1, 0]:
            for order, product in _uses(graph, node.output[0], outputs):
                yield None if order is None else not order, product
        elif places == [1] and _multiplies_rows(node, about):
            yield bool(about.get("transB", 0)), node
        else:
            yield None, node


def _multiplies_rows(node: Any, about: Mapping[str, Any]) -> bool:
    """Return whether an operation multiplies rows by its second input."""
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return False
    return about.get("alpha", 1.0) == about.get("beta", 1.0) == 1.0 and not about.get("transA", 0)


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def _sums(graph: Any, node: Any) -> Iterator[str]:
    """Yield the results of a product, and of the addition of a bias to it."""
    yield node.output[0]
    for other in graph.node:
        if other.op_type == "Add" and node.output[0] in other.input:
            yield other.output[0]


def narrow_graph(data: bytes, ports: Mapping[str, Port]) -> bytes:
    """Return a graph that takes integers and their scales in place of these weights."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load_from_string(data)
    graph, writer = model.graph, _Writer()
    matrices = dict(zip(ports, ports, strict=True))
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in matrices:
            matrices[node.output[0]] = matrices[node.input[0]]
        elif len(node.input) > 1 and node.input[1] in matrices:
            port = matrices[node.input[1]]
            writer.product(node, port, ports[port])
        else:
            writer.nodes.append(node)
    inputs = []
    for value in deepcopy(list(graph.input)):
        port = ports.get(value.name)
        if port is None:
            inputs.append(value)
            continue
        sizes = [port.inputs, port.outputs]
        inputs.append(helper.make_tensor_value_info(value.name, TensorProto.INT8, sizes))
        inputs.append(helper.make_tensor_value_info(value.name + SCALE, TensorProto.FLOAT, sizes[1:]))
    nodes = deepcopy(writer.nodes)  # they are parts of the list that is replaced
    for part, values in ((graph.node, nodes), (graph.input, inputs)):
        del part[:]
        part.extend(values)
    graph.initializer.extend(writer.constants.values())
    if all(each.domain != CONTRIB for each in model.opset_import):
        model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    return model.SerializeToString(deterministic=True)


class _Rows(NamedTuple):
    """Rows of a value as integers [T, K], and their scales [T, 1]."""

    integers: str
    scale: str


class _Writer:
    """The operations of a new graph, and the constants that they take."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self._rows: dict[str, _Rows] = {}
        self._number = 0

    def product(self, node: Any, weight: str, port: Port) -> None:
        """Add the product of integers in place of one of floats; its result has the same name."""
        rows, zero = self._rounded(node.input[0], port), self._constant("zero", DEFAULTS[ZERO_POINT], np.uint8)
        operands = (rows.integers, weight, self._constant("one", 1.0), weight + SCALE, zero)
        product = self._add("MatMulIntegerToFloat", *operands, domain=CONTRIB)
        if node.op_type == "Gemm":
            bias = node.input[2] if len(node.input) > 2 else ""
            product = self._add("Mul", product, rows.scale, result="" if bias else node.output[0])
            if bias:
                self._add("Add", product, bias, result=node.output[0])
            return
        product = self._add("Mul", product, rows.scale)
        outputs = self._constant(f"outputs.{port.outputs}", [port.outputs], np.int64)
        shape = self._add("Concat", self._add("Shape", node.input[0], end=-1), outputs, axis=0)
        self._add("Reshape", product, shape, result=node.output[0])

    def _rounded(self, x: str, port: Port) -> _Rows:
        """Rotate and round the rows of a value, once."""
        if x in self._rows:
            return self._rows[x]
        width, turn = port.inputs, port.turned.rotation
        flat = self._flat(x, width)
        if turn > 1:
            matrix = self._constant(f"rotation.{turn}", hadamard(turn))
            flat = self._flat(self._add("MatMul", self._flat(x, turn), matrix), width)
        below, above = steps_of({})
        last = self._constant("last", [-1], np.int64)
        largest = self._add("ReduceMax", flat, last, keepdims=0)
        least = self._add("ReduceMin", flat, last, keepdims=0)
        least = self._add("Mul", least, self._constant("low", -above / below))
        magnitude = self._add("Max", largest, least, self._constant("tiny", LEAST_MAGNITUDE))
        scale = self._add("Div", magnitude, self._constant("above", float(above)))
        zero = self._constant("zero", DEFAULTS[ZERO_POINT], np.uint8)
        zeros = self._add("Expand", zero, self._add("Shape", scale))
        integers = self._add("QuantizeLinear", flat, scale, zeros, axis=0)
        column = self._add("Unsqueeze", scale, self._constant("second", [1], np.int64))
        self._rows[x] = _Rows(integers, column)
        return self._rows[x]

    def _flat(self, x: str, width: int) -> str:
        return self._add("Reshape", x, self._constant(f"rows.{width}", [-1, width], np.int64))

    def _constant(self, name: str, value: Any, dtype: type = np.float32) -> str:
        from onnx import numpy_helper

        name = PREFIX + name
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(value, dtype), name)
        return name

    def _add(self, kind: str, *inputs: str, result: str = "", domain: str = "", **attributes: Any) -> str:
        from onnx import helper

        self._number += 1
        result = result or f"{PREFIX}{self._number}"
        self.nodes.append(helper.make_node(kind, inputs, [result], domain=domain, **attributes))
        return result
