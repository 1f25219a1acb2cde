"""ONNX graphs of encoder kernels, derived from template and attributes, with the weights as graph *inputs*.

One small session serves every layer. Graphs of templates that lie in a store are never read: anybody may have
written them.

Opset 13 and IR 7 run on ONNX Runtime 1.10. GELU and layer normalisation are written as elementary operations, in the
patterns that ONNX Runtime fuses again. `Gemm` with `transB=1` takes the layout of `nn.Linear` as it lies in the
checkpoint. No initialiser is larger than a rotation (4 KiB), nothing is external.

Kernels with integer weights quantise each token row by itself, then multiply integers (`offramp.program.narrow`).

Shapes: T tokens of the padded batch (B rows of S), H hidden, I intermediate, E embedding width, C labels, R outputs of
a block, of which each step has its own number.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple, Union

import numpy as np

from offramp.backends.onnx_writer import Graph
from offramp.program.heads import HeadForm
from offramp.program.narrow import (
    EXACT,
    LEAST_MAGNITUDE,
    ROTATION,
    SUFFIX,
    ZERO_POINT,
    hadamard,
    option,
    steps_of,
)
from offramp.program.program import Kernel

Sizes = Mapping[str, Any]
"""Attributes of a kernel."""
Size = Union[int, str]
"""Size of an axis, or its name where each call has another."""
Linear = Callable[[str, Size, int], str]
"""Function (role, outputs, inputs) that adds a linear layer to a graph, with its weights as graph inputs, and returns
the name of its result."""
INTEGER_PRODUCT = "MatMulIntegerToFloat"
"""Operator of ONNX Runtime that multiplies integers, then by the scale of each output."""
UNFUSED = ("BiasGeluFusion",)
"""Optimisers of graphs that make kernels slower. A fused `BiasGelu` has a buffer of the size of its result besides it,
where `Add` writes to the buffer of its input."""
LinearOf = Callable[[Graph, str, Sizes], Linear]
"""Function that prepares a value [T, inputs] of a graph for any number of linear layers. The attributes of the kernel
may say that its rows are rotated, or that some inputs are exact."""


def _linear(g: Graph, x: str, role: str, outputs: Size, inputs: int) -> str:
    """x W^T + b with `role`.weight [outputs, inputs] and `role`.bias [outputs] as graph inputs."""
    return g.op("Gemm", x, g.input(role + ".weight", outputs, inputs), g.input(role + ".bias", outputs), transB=1)


def _floats(g: Graph, x: str, sizes: Sizes) -> Linear:
    return partial(_linear, g, x)


def _integers(g: Graph, x: str, sizes: Sizes) -> Linear:
    """Quantise the rows of x, each by its own scale, for any number of products with integer weights.

    `QuantizeLinear` takes a scale for each row, as rows are its axis 0, and rounds halves to even. A row of zeros has a
    scale near 0, not 0.
    """
    x, exact = _rotated(g, x, sizes), option(sizes, EXACT)
    below, above = steps_of(sizes)
    largest, least = g.op("ReduceMax", x, axes=[-1], keepdims=0), g.op("ReduceMin", x, axes=[-1], keepdims=0)
    magnitude = g.op("Max", largest, g.op("Mul", least, g.constant(-above / below)), g.constant(LEAST_MAGNITUDE))
    scale_T = g.op("Div", magnitude, g.constant(float(above)))
    zero = g.constant(option(sizes, ZERO_POINT), np.uint8)
    integers = g.op("QuantizeLinear", x, scale_T, g.op("Expand", zero, g.op("Shape", scale_T)), axis=0)
    scale_T1, one = g.op("Unsqueeze", scale_T, g.constant([1], np.int64)), g.constant(1.0)

    def linear(role: str, outputs: Size, inputs: int) -> str:
        weight = g.input(role + ".weight", inputs, outputs, dtype=np.int8)
        product = g.contrib(INTEGER_PRODUCT, integers, weight, one, g.input(role + ".scale", outputs), zero)
        more = g.input(role + ".bias", outputs)
        if exact:
            chosen = g.op("Gather", x, g.input(role + ".channels", exact, dtype=np.int64), axis=1)
            more = g.op("Gemm", chosen, g.input(role + ".exact", exact, outputs), more)
        return g.op("Add", g.op("Mul", product, scale_T1), more)

    return linear


def _rotated(g: Graph, x: str, sizes: Sizes) -> str:
    """Multiply rows by the matrix of the rotation, a part of them at a time."""
    size = option(sizes, ROTATION)
    if size == 1:
        return x
    turned = g.op("MatMul", g.op("Reshape", x, g.constant([-1, size], np.int64)), g.constant(hadamard(size)))
    return g.op("Reshape", turned, g.constant([-1, sizes.get("num_inputs", sizes.get("hidden_size"))], np.int64))


def graph_of(kernel: Kernel, form: Optional[HeadForm] = None) -> bytes:
    """Return the serialised graph of a kernel; `form` is that of the exit heads, which only the template `exit` takes.

    Raises KeyError for another template than those of BUILDERS and `exit`.
    """
    if kernel.template == "exit":
        assert form is not None, "exit heads are loaded where the store has exits"
        return exit_head(kernel.attributes, form)
    return BUILDERS[kernel.template](kernel.attributes)


def embedding(sizes: Sizes) -> bytes:
    """Gathered rows [T, E] -> hidden [T, H]: their sum, normalised, projected where the embedding is narrower."""
    g = Graph("embedding")
    width = sizes["embedding_size"]
    total = g.op("Add", g.input("word", "T", width), g.input("position", "T", width))
    if sizes["num_token_types"]:
        total = g.op("Add", total, g.input("type", "T", width))
    hidden = _norm(g, total, sizes, width)
    if width != sizes["hidden_size"]:
        hidden = _linear(g, hidden, "project", sizes["hidden_size"], width)
    return g.finish(hidden, "T", sizes["hidden_size"])


def attention(sizes: Sizes, linear_of: LinearOf = _floats) -> bytes:
    """hidden [T, H], mask [B, 1, 1, S] (added to the scores), shape [4] = (B, S, heads, H / heads) -> hidden [T, H]."""
    g = Graph("attention")
    size = sizes["hidden_size"]
    x = g.input("hidden", "T", size)
    context = _attend(g, linear_of(g, x, sizes), (size, size), size // sizes["num_heads"])
    flat = g.op("Reshape", context, g.constant([-1, size], np.int64))
    total = g.op("Add", linear_of(g, flat, {})("o", size, size), x)
    return g.finish(_norm(g, total, sizes, size), "T", size)


def up(sizes: Sizes, linear_of: LinearOf = _floats) -> bytes:
    """hidden [T, H] -> inner [T, I]."""
    g = Graph("up")
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    result = linear_of(g, g.input("hidden", "T", hidden), sizes)("up", inner, hidden)
    return g.finish(_ACTIVATIONS[sizes["activation"]](g, result), "T", inner)


def down(sizes: Sizes, linear_of: LinearOf = _floats) -> bytes:
    """inner [T, I] and hidden [T, H] -> hidden [T, H]."""
    g = Graph("down")
    hidden, width = sizes["hidden_size"], sizes["intermediate_size"]
    inner = g.input("inner", "T", width)
    residual = g.input("hidden", "T", hidden)
    total = g.op("Add", linear_of(g, inner, sizes)("down", hidden, width), residual)
    return g.finish(_norm(g, total, sizes, hidden), "T", hidden)


def heads(sizes: Sizes, linear_of: LinearOf = _floats) -> bytes:
    """hidden [T, H], mask, shape (as `attention`), flat [2] = (T, R) -> context [T, R] of the heads of a block."""
    g = Graph("heads")
    size = sizes["hidden_size"]
    linear = linear_of(g, g.input("hidden", "T", size), sizes)
    context = _attend(g, linear, ("R", size), sizes["head_size"])
    return g.finish(g.op("Reshape", context, g.input("flat", 2, dtype=np.int64)), "T", "R")


def product(sizes: Sizes, linear_of: LinearOf = _floats) -> bytes:
    """x [T, inputs] -> [T, R], for T rows of any kind."""
    g = Graph("product")
    inputs = sizes["num_inputs"]
    result = linear_of(g, g.input("x", "T", inputs), sizes)("product", "R", inputs)
    return g.finish(result if sizes["activation"] is None else _ACTIVATIONS[sizes["activation"]](g, result), "T", "R")


def join_norm(sizes: Sizes) -> bytes:
    """joined [T, H], which is made of the blocks, and hidden [T, H] -> hidden [T, H]."""
    g = Graph("join-norm")
    size = sizes["hidden_size"]
    total = g.op("Add", g.input("joined", "T", size), g.input("hidden", "T", size))
    return g.finish(_norm(g, total, sizes, size), "T", size)


def head(sizes: Sizes) -> bytes:
    """First token of each row [B, H] -> logits [B, C]."""
    return _two_layers("head", sizes, "")


def exit_head(sizes: Sizes, form: HeadForm) -> bytes:
    """Value after a layer -> logits [B, C].

    The mean is taken over hidden [B, S, H] and keep [B, S, 1] (1 = token); other forms take the first token [B, H].
    """
    if form.depth == 2:
        return _two_layers("exit", sizes, "exit.")
    g = Graph("exit")
    size, num_labels = sizes["hidden_size"], sizes["num_labels"]
    if form.pool == "first":
        pooled = g.input("first", "B", size)
    else:
        keep = g.input("keep", "B", "S", 1)
        axis = g.constant([1], np.int64)
        total = g.op("ReduceSum", g.op("Mul", g.input("hidden", "B", "S", size), keep), axis, keepdims=0)
        pooled = g.op("Div", total, g.op("ReduceSum", keep, axis, keepdims=0))
    return g.finish(_linear(g, pooled, "exit", num_labels, size), "B", num_labels)


def _two_layers(name: str, sizes: Sizes, prefix: str) -> bytes:
    g = Graph(name)
    size, num_labels = sizes["hidden_size"], sizes["num_labels"]
    dense = _linear(g, g.input("first", "B", size), prefix + "dense", size, size)
    logits = _linear(g, _ACTIVATIONS[sizes["activation"]](g, dense), prefix + "out", num_labels, size)
    return g.finish(logits, "B", num_labels)


_NARROW: Dict[str, Callable[..., bytes]] = {
    "attention": attention, "up": up, "down": down, "heads": heads, "product": product,
}  # fmt: skip
"""Builders of templates that have a twin with integer weights."""
BUILDERS: Dict[str, Callable[[Sizes], bytes]] = {
    "embedding": embedding, **_NARROW, "join-norm": join_norm, "head": head,
    **{name + SUFFIX: partial(builder, linear_of=_integers) for name, builder in _NARROW.items()},
}  # fmt: skip
"""Builder of each template; exit heads also depend on their form."""


def _attend(g: Graph, linear: Linear, shape_of_weights: Tuple[Size, int], head_size: int) -> str:
    """Linear layers of x [T, inputs] -> context [B, S, heads, head size] of the heads that the outputs of q, k, v are.

    Graph inputs are mask [B, 1, 1, S], shape [4] = (B, S, heads, head size), weights and biases.
    """
    mask = g.input("mask", "B", 1, 1, "S")
    shape = g.input("shape", 4, dtype=np.int64)

    def heads(role: str, order: List[int]) -> str:
        return g.op("Transpose", g.op("Reshape", linear(role, *shape_of_weights), shape), perm=order)

    query, key, value = heads("q", [0, 2, 1, 3]), heads("k", [0, 2, 3, 1]), heads("v", [0, 2, 1, 3])
    scale = g.constant(1 / math.sqrt(head_size))
    scores = g.op("Add", g.op("Mul", g.op("MatMul", query, key), scale), mask)
    return g.op("Transpose", g.op("MatMul", g.op("Softmax", scores, axis=-1), value), perm=[0, 2, 1, 3])


def _norm(g: Graph, x: str, sizes: Sizes, width: int) -> str:
    centred = g.op("Sub", x, g.op("ReduceMean", x, axes=[-1]))
    variance = g.op("ReduceMean", g.op("Pow", centred, g.constant(2.0)), axes=[-1])
    deviation = g.op("Sqrt", g.op("Add", variance, g.constant(sizes["norm_epsilon"])))
    scaled = g.op("Mul", g.op("Div", centred, deviation), g.input("norm.weight", width))
    return g.op("Add", scaled, g.input("norm.bias", width))


def _gelu(g: Graph, x: str) -> str:
    erf = g.op("Erf", g.op("Div", x, g.constant(math.sqrt(2))))
    return g.op("Mul", g.op("Mul", x, g.op("Add", erf, g.constant(1.0))), g.constant(0.5))


def _gelu_tanh(g: Graph, x: str) -> str:
    cube = g.op("Mul", g.op("Pow", x, g.constant(3.0)), g.constant(0.044715))
    inner = g.op("Tanh", g.op("Mul", g.op("Add", x, cube), g.constant(math.sqrt(2 / math.pi))))
    return g.op("Mul", g.op("Mul", x, g.op("Add", inner, g.constant(1.0))), g.constant(0.5))


def _silu(g: Graph, x: str) -> str:
    return g.op("Mul", x, g.op("Sigmoid", x))


_ACTIVATIONS: Dict[str, Callable[[Graph, str], str]] = {
    "gelu": _gelu, "gelu_new": _gelu_tanh, "gelu_pytorch_tanh": _gelu_tanh, "silu": _silu, "swish": _silu,
    "relu": lambda g, x: g.op("Relu", x), "tanh": lambda g, x: g.op("Tanh", x),
}  # fmt: skip
