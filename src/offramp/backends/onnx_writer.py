"""ONNX graphs as bytes without the package `onnx`: protobuf's encoding of the messages that graphs of templates need.

A message is a sequence of fields: a key (number and wire type), then an integer of variable length, or bytes after
their length. The bytes are those of `SerializeToString` of the package `onnx`, which tests compare.

Numbers of fields: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from typing import List, Mapping, Sequence, Union

import numpy as np

OPSET, IR = 13, 7
"""Versions that ONNX Runtime 1.10 reads."""
CONTRIB, CONTRIB_OPSET = "com.microsoft", 1
"""Domain of the operators that ONNX Runtime adds to the standard, and its version."""
Scalar = Union[int, str, bytes]
_MODEL = {"ir_version": 1, "producer_name": 2, "graph": 7, "opset_import": 8}
_OPSET_ID = {"domain": 1, "version": 2}
_GRAPH = {"node": 1, "name": 2, "initializer": 5, "input": 11, "output": 12}
_NODE = {"input": 1, "output": 2, "name": 3, "op_type": 4, "attribute": 5, "domain": 7}
_ATTRIBUTE = {"name": 1, "i": 3, "ints": 8, "type": 20}
_TENSOR = {"dims": 1, "data_type": 2, "name": 8, "raw_data": 9}
_VALUE_INFO, _TYPE, _TENSOR_TYPE = {"name": 1, "type": 2}, {"tensor_type": 1}, {"elem_type": 1, "shape": 2}
_SHAPE, _DIMENSION = {"dim": 1}, {"dim_value": 1, "dim_param": 2}
_DATA_TYPES = {np.float32: 1, np.uint8: 2, np.int8: 3, np.int64: 7}
_INT, _INTS = 2, 7
"""Types of attributes."""
_VARINT, _BYTES = 0, 2
"""Wire types."""


class Graph:
    """A graph under construction. Nodes and constants are numbered, inputs keep their names."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes: List[bytes] = []
        self._inputs: List[bytes] = []
        self._constants: List[bytes] = []
        self._opsets = {"": OPSET}

    def input(self, name: str, *shape: Union[int, str], dtype: type = np.float32) -> str:
        """Add an input, whose axes are sizes or names. Returns its name."""
        self._inputs.append(_value_info(name, shape, dtype))
        return name

    def constant(self, value: Union[float, List[int], List[List[float]]], dtype: type = np.float32) -> str:
        """Add a constant. Returns its name."""
        name, array = f"c{len(self._constants)}", np.asarray(value, dtype)
        about = {"dims": array.shape, "data_type": _DATA_TYPES[dtype], "name": name}
        self._constants.append(_message(_TENSOR, raw_data=array.tobytes(), **about))
        return name

    def op(self, kind: str, *inputs: str, **attributes: Union[int, List[int]]) -> str:
        """Add a node. Returns the name of its result."""
        name = f"n{len(self._nodes)}"
        self._add_node(kind, inputs, name, [_attribute(key, attributes[key]) for key in sorted(attributes)])
        return name

    def contrib(self, kind: str, *inputs: str) -> str:
        """Add a node of an operator that ONNX Runtime adds to the standard. Returns the name of its result."""
        name = f"n{len(self._nodes)}"
        self._opsets[CONTRIB] = CONTRIB_OPSET
        self._add_node(kind, inputs, name, [], [CONTRIB])
        return name

    def finish(self, output: str, *shape: Union[int, str]) -> bytes:
        """Return the model whose result is `out`, a copy of `output`."""
        self._add_node("Identity", [output], "out", [])
        values = {"input": self._inputs, "output": _value_info("out", shape, np.float32)}
        graph = _message(_GRAPH, node=self._nodes, name=self._name, initializer=self._constants, **values)
        opsets = [_message(_OPSET_ID, domain=domain, version=version) for domain, version in self._opsets.items()]
        return _message(_MODEL, ir_version=IR, producer_name="offramp", graph=graph, opset_import=opsets)

    def _add_node(
        self, kind: str, inputs: Sequence[str], name: str, attributes: Sequence[bytes], domain: Sequence[str] = ()
    ) -> None:
        about = {"op_type": kind, "attribute": attributes, "domain": domain}
        self._nodes.append(_message(_NODE, input=inputs, output=name, name=name, **about))


def _attribute(name: str, value: Union[int, List[int]]) -> bytes:
    if isinstance(value, int):
        return _message(_ATTRIBUTE, name=name, i=value, type=_INT)
    return _message(_ATTRIBUTE, name=name, ints=value, type=_INTS)


def _value_info(name: str, shape: Sequence[Union[int, str]], dtype: type) -> bytes:
    axes = [_message(_DIMENSION, **{"dim_param" if isinstance(axis, str) else "dim_value": axis}) for axis in shape]
    tensor = _message(_TENSOR_TYPE, elem_type=_DATA_TYPES[dtype], shape=_message(_SHAPE, dim=axes))
    return _message(_VALUE_INFO, name=name, type=_message(_TYPE, tensor_type=tensor))


def _message(numbers: Mapping[str, int], **fields: Union[Scalar, Sequence[Scalar]]) -> bytes:
    """Return a message with its fields in the order of their numbers; a field that is repeated takes a list."""
    data = bytearray()
    for name, number in numbers.items():
        value = fields.get(name, ())
        for each in (value,) if isinstance(value, (int, str, bytes)) else value:
            if isinstance(each, int):
                data += _varint(number << 3 | _VARINT) + _varint(each)
            else:
                content = each.encode() if isinstance(each, str) else each
                data += _varint(number << 3 | _BYTES) + _varint(len(content)) + content
    return bytes(data)


def _varint(value: int) -> bytes:
    """Return an integer in groups of 7 bits, the lowest first; negative ones as their 64-bit complement."""
    value &= (1 << 64) - 1
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    data.append(value)
    return bytes(data)
