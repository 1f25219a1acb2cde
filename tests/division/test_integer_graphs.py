"""Graphs with integers in place of float weights: which weights, equal sums, and rows that do not depend on others.

Shapes: B rows, S tokens, K inputs and N outputs of a product.
"""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from offramp.backends.onnx_checks import checked_model, sizes_of
from offramp.backends.onnx_operators import Known
from offramp.division.integer_graphs import narrow_graph, turn_of, uses_of
from offramp.division.names.narrow import quantise
from offramp.program.narrow import SCALE

K, N = 64, 32
RNG = np.random.default_rng(0)


def graph_of(nodes, weights, rank=2):
    """A graph `out` of x [B, ..., K] and of weights, by name."""
    inputs = {"r0": ["B", 3, K][3 - rank :] if rank == 3 else ["B", K], **weights}
    declared = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [None] * rank)
    made = [helper.make_node(kind, given, [result], **more) for kind, given, result, more in nodes]
    graph = helper.make_graph(made, "g", declared, [out])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()


MATMUL = [("MatMul", ["r0", "w0"], "y", {}), ("Relu", ["y"], "out", {})]
TRANSPOSED = [("Transpose", ["w0"], "t", {"perm": [1, 0]}), ("MatMul", ["r0", "t"], "y", {}), MATMUL[1]]
GEMM = [("Gemm", ["r0", "w0", "w1"], "y", {"transB": 1}), MATMUL[1]]
PLAIN_GEMM = [("Gemm", ["r0", "w0"], "y", {}), MATMUL[1]]
TWICE = [
    ("MatMul", ["r0", "w0"], "a", {}), ("MatMul", ["r0", "w1"], "b", {}), ("Add", ["a", "b"], "c", {}),
    ("Relu", ["c"], "out", {}),
]  # fmt: skip
GRAPHS = {
    "matmul": (MATMUL, {"w0": [K, N]}, 3),
    "transposed": (TRANSPOSED, {"w0": [N, K]}, 3),
    "square": (TRANSPOSED, {"w0": [K, K]}, 2),
    "gemm": (GEMM, {"w0": [N, K], "w1": [N]}, 2),
    "plain gemm": (PLAIN_GEMM, {"w0": [K, N]}, 2),
    "shared rows": (TWICE, {"w0": [K, N], "w1": [K, N]}, 3),
}


def run(data, feeds):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


@pytest.mark.parametrize("name", GRAPHS)
def test_products_of_integers_are_near_those_of_floats(name):
    """For rows of very different sizes, each by its own scale; a row alone has the bits that it has among others."""
    nodes, weights, rank = GRAPHS[name]
    floats = {each: RNG.standard_normal(shape).astype(np.float32) for each, shape in weights.items()}
    x = RNG.standard_normal((7, 3, K)[: 3 if rank == 3 else 1] + (() if rank == 3 else (K,))).astype(np.float32)
    x *= 10.0 ** np.arange(-3, 4).reshape(-1, *[1] * (rank - 1)).astype(np.float32)
    data, ports = graph_of(nodes, weights, rank), uses_of(graph_of(nodes, weights, rank)).ports
    assert set(ports) == {each for each, shape in weights.items() if len(shape) == 2}
    made, integers = narrow_graph(data, ports), dict(floats)
    for port, form in ports.items():
        weight_OI = floats[port] if form.is_transposed else floats[port].T
        chunks = [np.ascontiguousarray(weight_OI).reshape(-1)]
        found = quantise(port, chunks, weight_OI.shape, None, turn_of(form.inputs), np.empty(0, np.int64))
        integers |= {port: np.ascontiguousarray(found.integers_OI.T), port + SCALE: found.scale_O}
    wanted, found = run(data, {"r0": x, **floats}), run(made, {"r0": x, **integers})
    assert found.shape == wanted.shape
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(one - other).max() < 0.04 * np.abs(other).max()
    for rows in (slice(0, 1), slice(4, 5), slice(2, 5)):
        assert np.array_equal(run(made, {"r0": x[rows], **integers}), found[rows])
    nodes = [node.op_type for node in onnx.load_from_string(made).graph.node]
    assert nodes.count("QuantizeLinear") == 1 and nodes.count("MatMulIntegerToFloat") == len(ports)
    known = {each: Known(array.dtype.name, array.shape) for each, array in {"r0": x, **integers}.items()}
    assert sizes_of(checked_model(made), known).values["out"].shape == wanted.shape, "readers of stores take it"


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ([("MatMul", ["w0", "r0"], "out", {})], {"w0": [K, N]}),
        ([("MatMul", ["w0", "w0"], "out", {})], {"w0": [K, K]}),
        ([*MATMUL[:1], ("Gather", ["w0", "r0"], "z", {}), ("Add", ["y", "z"], "out", {})], {"w0": [K, N]}),
        ([("MatMul", ["r0", "w0"], "a", {}), *TRANSPOSED[:1], ("MatMul", ["a", "t"], "out", {})], {"w0": [K, K]}),
        ([("Gemm", ["r0", "w0"], "out", {"alpha": 0.5})], {"w0": [K, N]}),
        ([("Gemm", ["r0", "w0"], "out", {"transA": 1})], {"w0": [K, N]}),
        ([("Transpose", ["w0"], "t", {"perm": [0, 1]}), ("MatMul", ["r0", "t"], "out", {})], {"w0": [K, N]}),
        ([("MatMul", ["r0", "w0"], "out", {})], {"w0": [2, K, N]}),
        ([("MatMul", ["r0", "w0"], "out", {})], {"w0": ["K", N]}),
        ([("Identity", ["r0"], "out", {})], {"w0": [K, N]}),
        ([("Add", ["r0", "w0"], "out", {})], {"w0": [K, K]}),
    ],
)
def test_weights_that_do_other_things_stay_floats(nodes, weights):
    assert not uses_of(graph_of(nodes, weights)).ports


def test_the_product_that_is_a_result_is_named():
    biased = [*MATMUL[:1], ("Add", ["y", "w1"], "out", {})]
    for nodes in (biased, [("MatMul", ["r0", "w0"], "out", {})]):
        assert uses_of(graph_of(nodes, {"w0": [K, N], "w1": [N]})).results == {"w0": {0}}
    assert uses_of(graph_of(MATMUL, {"w0": [K, N]})).results == {"w0": set()}


@pytest.mark.parametrize(("inputs", "rotation"), [(64, 32), (128, 64), (192, 64), (96, 32), (2, 1), (7, 1), (1, 1)])
def test_rows_are_rotated_in_two_parts_at_least(inputs, rotation):
    assert turn_of(inputs) == rotation
