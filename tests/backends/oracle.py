"""Graphs constructed by the package onnx, with whose bytes those of `offramp.backends.onnx_writer` are compared."""

import numpy as np
import onnx
from onnx import helper, numpy_helper

from offramp.backends.onnx_writer import CONTRIB, CONTRIB_OPSET, IR, OPSET


class OracleGraph:
    """The interface of `onnx_writer.Graph`."""

    def __init__(self, name):
        self.name, self.nodes, self.inputs, self.constants = name, [], [], []
        self.opsets = [helper.make_opsetid("", OPSET)]

    def input(self, name, *shape, dtype=np.float32):
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def constant(self, value, dtype=np.float32):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, kind, *inputs, **attributes):
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def contrib(self, kind, *inputs):
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, domain=CONTRIB))
        self.opsets[1:] = [helper.make_opsetid(CONTRIB, CONTRIB_OPSET)]
        return name

    def finish(self, output, *shape):
        self.nodes.append(helper.make_node("Identity", [output], ["out"], name="out"))
        value = helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, self.name, self.inputs, [value], self.constants)
        model = helper.make_model(graph, opset_imports=self.opsets, ir_version=IR, producer_name="offramp")
        return model.SerializeToString(deterministic=True)
