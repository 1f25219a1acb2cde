"""Graphs of segments in PyTorch: they multiply, and nothing else, and free what nothing after needs."""

import gc
import json
import weakref
from itertools import pairwise

import pytest
import torch

from offramp.backends import torch_graphs as segments
from offramp.backends.torch_graphs import CapturedGraph
from offramp.errors import StoreError


def graph(nodes, outputs=("n0",), **inputs):
    tree = {"inputs": {"r": 1, "w": 0, "c": 0, **inputs}, "nodes": nodes, "outputs": list(outputs)}
    return CapturedGraph(json.dumps(tree).encode(), "here")


def v(name):
    return {"v": name}


X = torch.tensor([[1.0, -2.0, 3.0]])


def test_it_runs_operations_one_after_the_other():
    nodes = [
        ["n0", "aten.linear.default", [v("r0"), v("w0"), v("c0")], {}],
        ["n1", "aten.sym_size.int", [v("n0"), 0], {}],
        ["n2", "mul", [v("n1"), 2], {}],
        ["n3", "aten.reshape.default", [v("n0"), [v("n2"), 1]], {}],
        ["n4", "aten.to.dtype", [v("n3"), {"dtype": "float64"}], {}],
        ["n5", "aten.full.default", [[2, 1], {"float": "-inf"}], {"device": {"device": "cuda:0"}}],
    ]
    weight, bias = torch.ones(2, 3), torch.tensor([0.5, 1.5])
    summed, infinite = graph(nodes, ("n4", "n5"), w=1, c=1)(X, weight, bias)
    assert torch.equal(summed, torch.tensor([[2.5], [3.5]], dtype=torch.float64))
    assert torch.equal(infinite, torch.full((2, 1), float("-inf"))), "and on the CPU, wherever it was exported"


def test_values_are_freed_after_their_last_use(monkeypatch):
    seen = []

    def watched(x):
        gc.collect()
        seen.append([reference() is not None for reference in made])
        result = x + 1
        made.append(weakref.ref(result))
        return result

    made = []
    monkeypatch.setitem(segments.NUMBERS, "watched", watched)
    names = ["r0", "n0", "n1", "n2", "n3"]
    chain = [[name, "watched", [v(before)], {}] for before, name in pairwise(names)]
    (last,) = graph(chain, ("n3",))(X)
    assert torch.equal(last, X + 4)
    assert seen == [[], [True], [False, True], [False, False, True]]


def test_what_nothing_uses_is_freed_at_once_and_an_output_never():
    nodes = [["n0", "aten.relu.default", [v("r0")], {}], ["n1", "aten.neg.default", [v("r0")], {}]]
    made = graph(nodes, ("n0",))
    assert {index: set(names) for index, names in made.last.items()} == {1: {"r0", "n1"}}
    assert torch.equal(made(X)[0], X.relu())


FOREIGN = [
    "aten.from_file.default", "aten.from_file.out", "aten.from_file", "prims.add.default", "quantized.add.default",
    "torchvision.nms.default", "builtins.exec", "os.system", "aten", "aten.", "aten..", "", ".", "print", "__import__",
    "aten.__class__.default", "aten.__init__.default", "aten.name.default", "aten.add.__init__", "aten.add.__class__",
    "aten.add.op", "aten.add._schema", "aten._dir.append", "aten.add.Tensor.redispatch", "aten.no_such_thing.default",
    "aten.add.overloads", "aten._assert_async.default",
]  # fmt: skip


@pytest.mark.parametrize("target", FOREIGN)
def test_operations_that_are_not_torchs_own_are_refused(target):
    with pytest.raises(StoreError, match=r"divide the model again"):
        graph([["n0", target, [v("r0")], {}]])


@pytest.mark.parametrize(
    "argument",
    [
        {"dtype": "load"}, {"dtype": "float32.is_complex"}, {"dtype": "strided"}, {"dtype": 3}, {"layout": "float32"},
        {"memory_format": "nn"}, {"float": "much"}, {"float": [1]}, {"v": ["n0"]}, {"v": 7},
    ],
    ids=str,
)  # fmt: skip
def test_arguments_of_another_kind_are_refused(argument):
    with pytest.raises(StoreError, match="not a captured graph"):
        graph([["n0", "aten.relu.default", [v("r0"), argument], {}]])


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\xff", b"{}", b"[]", b"7", b'{"inputs": {}, "nodes": [], "outputs": []}',
        b'{"inputs": {"r": 1, "w": 0, "c": -1}, "nodes": [["n0"]], "outputs": []}',
        b'{"inputs": {"r": "1", "w": 0, "c": 0}, "nodes": [], "outputs": []}',
        b'{"inputs": {"r": 1, "w": 0, "c": 0}, "nodes": [], "outputs": 3}',
        b'{"inputs": {"r": 1, "w": 0, "c": 0}, "nodes": [["n0", 7, [], {}]], "outputs": []}',
        b'{"inputs": {"r": 1, "w": 0, "c": 0}, "nodes": [["n0", "aten.relu.default", 1, {}]], "outputs": []}',
        b'{"inputs": {"r": 1, "w": 0, "c": 0}, "nodes": [["n0", "aten.relu.default", [], [1]]], "outputs": []}',
        b'{"inputs": {"r": 70000, "w": 0, "c": 0}, "nodes": [], "outputs": []}',
        b'{"inputs": {"r": 1, "w": 0, "c": 0}, "nodes": ' + b"[" * 100_000 + b"]" * 100_000 + b', "outputs": []}',
        b'{"inputs": {"r": 1, "w": 0, "c": 0}, "nodes": [["n0", "aten.relu.default", '
        + b"[" * 40 + b"]" * 40 + b', {}]], "outputs": []}',
    ],
    ids=lambda data: data[:70].decode("latin-1"),
)  # fmt: skip
def test_what_is_no_graph_is_refused(data):
    with pytest.raises(StoreError):
        CapturedGraph(data, "here")


def captured_graph(args=(), inputs=1, nodes=1, size=0):
    """A graph of so many operations, inputs and bytes, and with more arguments of each operation."""
    made = [[f"n{index}", "aten.relu.default", [v("r0"), *args], {}] for index in range(nodes)]
    tree = {"inputs": {"r": inputs, "w": 0, "c": 0}, "nodes": made, "outputs": []}
    return CapturedGraph(json.dumps(tree).encode().ljust(size), "here")


def nested(depth):
    return [nested(depth - 1)] if depth else []


EDGES = {
    "bytes": lambda more: captured_graph(size=(2 << 20) + more),
    "inputs": lambda more: captured_graph(inputs=(1 << 12) + more),
    "operations": lambda more: captured_graph(nodes=(1 << 13) + more),
    "list": lambda more: captured_graph([[0] * ((1 << 10) + more)]),
    "letters": lambda more: captured_graph(["x" * ((1 << 10) + more)]),
    "depth": lambda more: captured_graph([nested(7 + more)]),
    "number": lambda more: captured_graph([(1 << 63) - 1 + more]),
    "negative number": lambda more: captured_graph([-(1 << 63) - more]),
}


@pytest.mark.parametrize("name", EDGES)
def test_the_largest_graphs_are_read_and_larger_ones_are_not(name):
    assert EDGES[name](0)
    with pytest.raises(StoreError, match="not a captured graph"):
        EDGES[name](1)


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ([["n0", "aten.relu.default", [v("later")], {}]], ["n0"]),
        ([["n0", "aten.relu.default", [v("n0")], {}]], ["n0"]),
        ([["n1", "aten.relu.default", [v("n0")], {}], ["n0", "aten.relu.default", [v("r0")], {}]], ["n1"]),
        ([["n0", "aten.relu.default", [v("r0")], {}]], ["n9"]),
        ([["n0", "aten.relu.default", [v("r0")], {}], ["n0", "aten.neg.default", [v("r0")], {}]], ["n0"]),
        ([["r0", "aten.relu.default", [v("r0")], {}]], ["r0"]),
    ],
    ids=["not there", "itself", "not there yet", "an answer that is not there", "twice", "an input made anew"],
)
def test_values_that_are_not_there_and_values_made_twice_are_refused(nodes, outputs):
    with pytest.raises(StoreError, match="value"):
        graph(nodes, outputs)
