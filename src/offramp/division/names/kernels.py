"""ONNX graphs of an encoder, one a kind, with the weights as graph *inputs*: one small session serves every layer,
fed from slots.

Opset 13 and IR 7, so that ONNX Runtime 1.10 runs them: GELU and layer normalisation are spelt out, in the patterns
that ONNX Runtime fuses again. `Gemm` with `transB=1` takes the layout of `nn.Linear` as it lies in the checkpoint. No
initialiser is larger than a few numbers, nothing is external.

Shapes: T tokens of the padded batch (B rows of S), H hidden, I intermediate, E embedding width, C labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from offramp.store.exits import FORMS
from offramp.store.manifest import Encoder

OPSET, IR = 13, 7


def build_graphs(encoder: Encoder, exit_form: str | None) -> dict[str, bytes]:
    """kind -> serialised graph, for every kind that a store of this encoder needs."""
    graphs = {
        "embedding": embedding(encoder),
        "attention": attention(encoder),
        "up": up(encoder),
        "down": down(encoder),
    }
    if encoder.head_activation is not None:
        graphs["head"] = head(encoder)
    if exit_form is not None:
        graphs["exit"] = EXIT_FORMS[exit_form](encoder)
    return graphs


def embedding(encoder: Encoder) -> bytes:
    """Gathered rows [T, E] -> hidden [T, H]: their sum, normalised, projected where the embedding is narrower."""
    g = _Graph("embedding")
    width = encoder.embedding_size
    total = g.op("Add", g.input("word", "T", width), g.input("position", "T", width))
    if encoder.num_token_types:
        total = g.op("Add", total, g.input("type", "T", width))
    hidden = _norm(g, total, encoder, width)
    if width != encoder.hidden_size:
        hidden = _linear(g, hidden, "project", encoder.hidden_size, width)
    return g.finish(hidden, "T", encoder.hidden_size)


def attention(encoder: Encoder) -> bytes:
    """hidden [T, H], mask [B, 1, 1, S] (added to the scores), shape [4] = (B, S, heads, H / heads) -> hidden [T, H]."""
    g = _Graph("attention")
    size = encoder.hidden_size
    x = g.input("hidden", "T", size)
    mask = g.input("mask", "B", 1, 1, "S")
    shape = g.input("shape", 4, dtype=np.int64)

    def heads(role: str, order: list[int]) -> str:
        return g.op("Transpose", g.op("Reshape", _linear(g, x, role, size, size), shape), perm=order)

    query, key, value = heads("q", [0, 2, 1, 3]), heads("k", [0, 2, 3, 1]), heads("v", [0, 2, 1, 3])
    scale = g.constant(1 / math.sqrt(size // encoder.num_heads))
    scores = g.op("Add", g.op("Mul", g.op("MatMul", query, key), scale), mask)
    context = g.op("MatMul", g.op("Softmax", scores, axis=-1), value)
    flat = g.op("Reshape", g.op("Transpose", context, perm=[0, 2, 1, 3]), g.constant([-1, size], np.int64))
    total = g.op("Add", _linear(g, flat, "o", size, size), x)
    return g.finish(_norm(g, total, encoder, size), "T", size)


def up(encoder: Encoder) -> bytes:
    """hidden [T, H] -> inner [T, I]."""
    g = _Graph("up")
    inner = _linear(
        g, g.input("hidden", "T", encoder.hidden_size), "up", encoder.intermediate_size, encoder.hidden_size
    )
    return g.finish(_ACTIVATIONS[encoder.activation](g, inner), "T", encoder.intermediate_size)


def down(encoder: Encoder) -> bytes:
    """inner [T, I] and hidden [T, H] -> hidden [T, H]."""
    g = _Graph("down")
    inner = g.input("inner", "T", encoder.intermediate_size)
    residual = g.input("hidden", "T", encoder.hidden_size)
    total = g.op("Add", _linear(g, inner, "down", encoder.hidden_size, encoder.intermediate_size), residual)
    return g.finish(_norm(g, total, encoder, encoder.hidden_size), "T", encoder.hidden_size)


def head(encoder: Encoder) -> bytes:
    """First token of each row [B, H] -> logits [B, C]."""
    return _two_layers("head", encoder, "")


def exit_mean_linear(encoder: Encoder) -> bytes:
    """hidden [B, S, H] and keep [B, S, 1] (1 = token) -> logits [B, C]: the mean over tokens, then one linear layer."""
    g = _Graph("exit")
    size = encoder.hidden_size
    keep = g.input("keep", "B", "S", 1)
    axis = g.constant([1], np.int64)
    total = g.op("ReduceSum", g.op("Mul", g.input("hidden", "B", "S", size), keep), axis, keepdims=0)
    mean = g.op("Div", total, g.op("ReduceSum", keep, axis, keepdims=0))
    return g.finish(_linear(g, mean, "exit", len(encoder.labels), size), "B", len(encoder.labels))


def exit_cls_linear(encoder: Encoder) -> bytes:
    """First token of each row [B, H] -> logits [B, C]: one linear layer."""
    g = _Graph("exit")
    first = g.input("first", "B", encoder.hidden_size)
    return g.finish(_linear(g, first, "exit", len(encoder.labels), encoder.hidden_size), "B", len(encoder.labels))


def exit_own(encoder: Encoder) -> bytes:
    """First token of each row [B, H] -> logits [B, C]: two layers, as the model's own head."""
    return _two_layers("exit", encoder, "exit.")


EXIT_FORMS: dict[str, Callable[[Encoder], bytes]] = {
    "mean-linear": exit_mean_linear,
    "cls-linear": exit_cls_linear,
    "own": exit_own,
    "own-shared": exit_own,
}
assert tuple(EXIT_FORMS) == FORMS


def _two_layers(name: str, encoder: Encoder, prefix: str) -> bytes:
    g = _Graph(name)
    assert encoder.head_activation is not None
    size = encoder.hidden_size
    dense = _linear(g, g.input("first", "B", size), prefix + "dense", size, size)
    logits = _linear(g, _ACTIVATIONS[encoder.head_activation](g, dense), prefix + "out", len(encoder.labels), size)
    return g.finish(logits, "B", len(encoder.labels))


class _Graph:
    """A graph under construction; names are made up, inputs keep theirs."""

    def __init__(self, name: str) -> None:
        self.name, self.nodes, self.inputs, self.constants = name, [], [], []

    def input(self, name: str, *shape: int | str, dtype: type = np.float32) -> str:
        from onnx import helper

        self.inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape))
        return name

    def constant(self, value: float | list[int], dtype: type = np.float32) -> str:
        from onnx import numpy_helper

        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def finish(self, output: str, *shape: int | str) -> bytes:
        import onnx
        from onnx import helper

        self.nodes.append(helper.make_node("Identity", [output], ["out"], name="out"))
        value = helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, self.name, self.inputs, [value], self.constants)
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR, producer_name="offramp"
        )
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString(deterministic=True)


def _linear(g: _Graph, x: str, role: str, outputs: int, inputs: int) -> str:
    """x W^T + b with `role`.weight [outputs, inputs] and `role`.bias [outputs] as graph inputs."""
    return g.op("Gemm", x, g.input(role + ".weight", outputs, inputs), g.input(role + ".bias", outputs), transB=1)


def _norm(g: _Graph, x: str, encoder: Encoder, width: int) -> str:
    centred = g.op("Sub", x, g.op("ReduceMean", x, axes=[-1]))
    variance = g.op("ReduceMean", g.op("Pow", centred, g.constant(2.0)), axes=[-1])
    deviation = g.op("Sqrt", g.op("Add", variance, g.constant(encoder.norm_epsilon)))
    scaled = g.op("Mul", g.op("Div", centred, deviation), g.input("norm.weight", width))
    return g.op("Add", scaled, g.input("norm.bias", width))


def _gelu(g: _Graph, x: str) -> str:
    erf = g.op("Erf", g.op("Div", x, g.constant(math.sqrt(2))))
    return g.op("Mul", g.op("Mul", x, g.op("Add", erf, g.constant(1.0))), g.constant(0.5))


def _gelu_tanh(g: _Graph, x: str) -> str:
    cube = g.op("Mul", g.op("Pow", x, g.constant(3.0)), g.constant(0.044715))
    inner = g.op("Tanh", g.op("Mul", g.op("Add", x, cube), g.constant(math.sqrt(2 / math.pi))))
    return g.op("Mul", g.op("Mul", x, g.op("Add", inner, g.constant(1.0))), g.constant(0.5))


def _silu(g: _Graph, x: str) -> str:
    return g.op("Mul", x, g.op("Sigmoid", x))


def _plain(kind: str) -> Callable[[_Graph, str], str]:
    return lambda g, x: g.op(kind, x)


_ACTIVATIONS: dict[str, Callable[[_Graph, str], str]] = {
    "gelu": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": _plain("Relu"),
    "silu": _silu,
    "swish": _silu,
    "tanh": _plain("Tanh"),
}
