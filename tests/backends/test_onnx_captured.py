"""Captured kernels from a hostile store: each is refused before a session exists, and its legal twin runs.

Shapes: B rows, S places, H hidden.
"""

import re
import time
from itertools import pairwise

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import offramp
from offramp.backends import onnx_captured, onnx_checks
from offramp.backends.onnx import OnnxBackend
from offramp.backends.onnx_checks import TooLargeError, _require_extent
from offramp.backends.onnx_operators import Known
from offramp.errors import StoreError
from offramp.store import Store
from tests.backends import captured
from tests.backends.captured import HIDDEN, PLACES, expected, write_captured

FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
node = helper.make_node


def constant(name, *numbers, dtype=np.int64):
    return numpy_helper.from_array(np.array(numbers, dtype), name)


def number(name, value):
    return numpy_helper.from_array(np.array(value), name)


def layer(nodes, constants=(), opset=18, domains=(), functions=()):
    """Return the kernel of a layer whose operations make `extra`, one number that is added."""
    rest = [node("MatMul", ["r0", "w0"], ["m"]), node("Add", ["m", "c0"], ["a"]), node("Add", ["a", "extra"], ["out"])]
    floats = {"r0": ["B", PLACES, HIDDEN], "w0": [HIDDEN, HIDDEN], "c0": [HIDDEN]}
    inputs = [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in floats.items()]
    out = helper.make_tensor_value_info("out", FLOAT, ["B", PLACES, HIDDEN])
    graph = helper.make_graph([*nodes, *rest], "layer", inputs, [out], list(constants))
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=list(functions))
    return model.SerializeToString()


def reduced(name):
    """Reduce a value to the one number that is added."""
    return node("ReduceMax", [name], ["extra"], keepdims=0)


def filled(*sizes):
    return layer([node("ConstantOfShape", ["n"], ["v"]), reduced("v")], [constant("n", *sizes)])


def expanded(*sizes):
    return layer([node("Expand", ["c0", "n"], ["v"]), reduced("v")], [constant("n", *sizes)])


def tiled(times):
    return layer([node("Tile", ["c0", "n"], ["v"]), reduced("v")], [constant("n", times)])


def ranged(limit):
    constants = [number("zero", 0), number("one", 1), number("n", limit)]
    nodes = [node("Range", ["zero", "n", "one"], ["i"]), node("Cast", ["i"], ["v"], to=FLOAT), reduced("v")]
    return layer(nodes, constants)


def products(count, size):
    """Multiply a matrix again and again."""
    nodes = [node("ConstantOfShape", ["n"], ["v0"])]
    nodes += [node("MatMul", [f"v{index}", "v0"], [f"v{index + 1}"]) for index in range(count)]
    return layer([*nodes, reduced(f"v{count}")], [constant("n", size, size)])


def doubled(times):
    """Concatenate a value with itself."""
    nodes = [node("Concat", [f"v{index}"] * 2, [f"v{index + 1}"], axis=0) for index in range(times)]
    return layer([node("Identity", ["c0"], ["v0"]), *nodes, reduced(f"v{times}")])


def by_batch(power):
    """Make a value of B x ... x B numbers."""
    nodes = [
        node("Shape", ["r0"], ["b"], start=0, end=1),
        node("Concat", ["b"] * power, ["n"], axis=0),
        node("ConstantOfShape", ["n"], ["v"]),
        reduced("v"),
    ]
    return layer(nodes)


def chain(operator, count):
    names = ["c0", *(f"v{index}" for index in range(count))]
    return layer([node(operator, [a], [b]) for a, b in pairwise(names)] + [reduced(names[-1])])


def loop():
    body = helper.make_graph(
        [node("Identity", ["go"], ["on"]), node("Identity", ["x"], ["y"])],
        "body",
        [helper.make_tensor_value_info(*each) for each in (("i", INT, []), ("go", BOOL, []), ("x", FLOAT, [HIDDEN]))],
        [helper.make_tensor_value_info(*each) for each in (("on", BOOL, []), ("y", FLOAT, [HIDDEN]))],
    )
    constants = [number("n", 1 << 40), number("yes", True)]
    return layer([node("Loop", ["n", "yes", "c0"], ["v"], body=body), reduced("v")], constants)


def identity_graph(name):
    made = helper.make_tensor_value_info(name, FLOAT, [HIDDEN])
    return helper.make_graph([node("Identity", ["c0"], [name])], name, [], [made])


def branch():
    sides = [identity_graph(name) for name in ("p", "q")]
    chosen = node("If", ["yes"], ["v"], then_branch=sides[0], else_branch=sides[1])
    return layer([chosen, reduced("v")], [number("yes", True)])


def nested(depth):
    """A graph inside a graph, `depth` times."""
    inner = identity_graph("v0")
    for index in range(1, depth):
        made = helper.make_tensor_value_info(f"v{index}", FLOAT, [HIDDEN])
        step = node("If", ["yes"], [f"v{index}"], then_branch=inner, else_branch=inner)
        inner = helper.make_graph([step], f"g{index}", [], [made])
    return layer([node("If", ["yes"], ["v"], then_branch=inner, else_branch=inner), reduced("v")],
                 [number("yes", True)])  # fmt: skip


def functions():
    """2^30 operations, by functions that call one another twice."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("evil", 1)]
    made = [helper.make_function("evil", "f0", ["x"], ["y"], [node("Identity", ["x"], ["y"])], opsets)]
    for index in range(1, 31):
        calls = [node(f"f{index - 1}", ["x"], ["z"], domain="evil"), node(f"f{index - 1}", ["z"], ["y"], domain="evil")]
        made.append(helper.make_function("evil", f"f{index}", ["x"], ["y"], calls, opsets))
    return layer([node("f30", ["c0"], ["v"], domain="evil"), reduced("v")], domains=["evil"], functions=made)


def divided(number, dtype=np.int32):
    nodes = [
        node("Cast", ["c0"], ["i"], to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype))),
        node("Div", ["i", "n"], ["q"]),
        node("Cast", ["q"], ["v"], to=FLOAT),
        reduced("v"),
    ]
    return layer(nodes, [constant("n", number, dtype=dtype)])


def convolved(**attributes):
    kernel = numpy_helper.from_array(np.ones((1, PLACES, 1), np.float32), "k")
    return layer([node("Conv", ["r0", "k"], ["v"], **attributes), reduced("v")], [kernel])


def joined(operator):
    """Split a vector and join its parts."""
    parts = [node("Split", ["c0"], ["p", "q"], num_outputs=2), node("Concat", ["p", "q"], ["v"], axis=0)]
    if operator != "Split":
        parts = [node(operator, ["c0"], ["s"]), node("ConcatFromSequence", ["s"], ["v"], axis=0)]
    return layer([*parts, reduced("v")])


def foreign(operator):
    """An operator of Microsoft's domain."""
    domain = "com.microsoft"
    return layer([node(operator, ["w0"], ["v"], domain=domain), reduced("v")], domains=[domain])


def shaped(by_values):
    """Reshape by the sizes of an input, or by its values."""
    nodes = [node("Cast", ["c0"], ["i"], to=INT)] if by_values else [node("Shape", ["c0"], ["i"])]
    return layer([*nodes, node("Reshape", ["c0", "i"], ["v"]), reduced("v")])


CASES = {
    "terabyte": (lambda: filled(1 << 20, 1 << 18), r"values take \d+\.0 MiB, more", lambda: filled(64, 64)),
    "two gigabytes": (lambda: filled(1 << 29), r"values take 2048\.0 MiB", lambda: filled(1 << 20)),
    "expand": (lambda: expanded(1 << 12, 1 << 14, HIDDEN), r"values take \d+\.0", lambda: expanded(1 << 10, HIDDEN)),
    "tile": (lambda: tiled(1 << 30), r"values take \d+\.0 MiB", lambda: tiled(1 << 10)),
    "range": (lambda: ranged(1 << 40), r"values take \d+\.0 MiB", lambda: ranged(1 << 10)),
    "concat": (lambda: doubled(40), r"Concat makes 2.2e\+12 numbers", lambda: doubled(8)),
    "one product": (lambda: products(1, 1800), r"needs \S+ multiply-adds more", lambda: products(1, 100)),
    "400 products": (lambda: products(400, 200), r"values take", lambda: products(400, 16)),
    "endless": (loop, r"needs the operator Loop, which a store may not contain", lambda: chain("Identity", 3)),
    "branch": (branch, r"needs the operator If, ", lambda: chain("Relu", 1)),
    "deep": (lambda: nested(8), r"graphs are nested too deeply", lambda: chain("Identity", 8)),
    "functions": (functions, r"it has functions", lambda: chain("Identity", 30)),
    "many": (lambda: chain("Identity", 5000), r"it has 5004 operations, more than 4096", lambda: chain("Abs", 500)),
    "random": (
        lambda: layer([node("RandomNormal", [], ["v"], shape=[4]), reduced("v")]),
        r"needs the operator RandomNormal",
        lambda: layer([node("Constant", [], ["v"], value=constant("", 1, dtype=np.float32)), reduced("v")]),
    ),
    "sequence": (lambda: joined("SplitToSequence"), r"the operator SplitToSequence", lambda: joined("Split")),
    "domain": (
        lambda: foreign("Inverse"), r"needs the operator com.microsoft.Inverse", lambda: foreign("Gelu")
    ),
    "attribute": (
        lambda: layer([node("Softmax", ["c0"], ["v"], dim=0), reduced("v")]),
        r"needs the attribute 'dim' of Softmax",
        lambda: layer([node("Softmax", ["c0"], ["v"], axis=0), reduced("v")]),
    ),
    "later version": (
        lambda: layer([node("Relu", ["c0"], ["v"]), reduced("v")], opset=24),
        r"needs version 24 of the operators 'ai.onnx'",
        lambda: layer([node("Relu", ["c0"], ["v"]), reduced("v")], opset=17),
    ),
    "by values": (lambda: shaped(True), r"the shape depends on the values of inputs", lambda: shaped(False)),
    "by zero": (lambda: divided(0), r"Div does not take an integer divisor of 0 or -1", lambda: divided(2)),
    "by minus one": (lambda: divided(-1), r"divisor of 0 or -1", lambda: divided(-2)),
    "no stride": (lambda: convolved(strides=[0]), r"Conv does not take windows", lambda: convolved(strides=[2])),
    "no dilation": (lambda: convolved(dilations=[0]), r"Conv does not take", lambda: convolved(dilations=[1])),
    "no groups": (lambda: convolved(group=0), r"Conv does not take", lambda: convolved(group=1)),
    "not a graph": (lambda: b"\x0a" * 100, r"not an ONNX model|field 1", lambda: chain("Abs", 1)),
}  # fmt: skip
"""Name -> a hostile kernel, what is said of it, and its legal twin."""


def store_with(path, monkeypatch, data):
    """Write a store whose layers run this graph."""
    honest = captured.onnx_graphs()
    monkeypatch.setattr(captured, "onnx_graphs", lambda: {**honest, "layer": data})
    return write_captured(path)


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_kernel_is_refused_before_a_session_exists(name, tmp_path, monkeypatch):
    make, mention, _ = CASES[name]
    path = store_with(tmp_path / "store", monkeypatch, make())
    monkeypatch.setattr(onnx_captured, "open_session", lambda *_: pytest.fail("it was loaded"))
    began = time.perf_counter()
    with Store(path) as store, pytest.raises(StoreError, match=f"graph 'layer' is refused: .*({mention})"):
        OnnxBackend(store, 1)
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize("name", CASES)
def test_its_legal_twin_runs(name, tmp_path, monkeypatch):
    with Store(store_with(tmp_path / "store", monkeypatch, CASES[name][2]())) as store:
        backend = OnnxBackend(store, 1)
        backend.warm_up(2, 1)
        backend.close()


def inputs_of(rows):
    return {
        "r0": np.zeros((rows, PLACES, HIDDEN), np.float32),
        "w0": np.zeros((HIDDEN, HIDDEN), np.float32),
        "c0": np.zeros(HIDDEN, np.float32),
    }


@pytest.mark.parametrize(("power", "runs"), [(2, True), (6, False)])
def test_sizes_are_checked_for_each_shape_of_the_inputs(power, runs, tmp_path, monkeypatch):
    """B^6 numbers are few for one row; for 32 rows they are 4 GiB."""
    with Store(store_with(tmp_path / "store", monkeypatch, by_batch(power))) as store:
        backend = OnnxBackend(store, 1)
        backend.warm_up(2, 1)
        if runs:
            backend.warm_up(32, 1)
        else:
            with pytest.raises(StoreError, match=r"graph 'layer' is refused: its values take 4096\.0 MiB"):
                backend.warm_up(32, 1)
        backend.close()


def test_work_is_summed_over_a_pass(tmp_path, monkeypatch):
    """One call of a kernel is allowed, and not a thousand of them."""
    with Store(store_with(tmp_path / "store", monkeypatch, products(1, 600))) as store:
        backend = OnnxBackend(store, 1)
        for module in (onnx_checks, onnx_captured):
            monkeypatch.setattr(module, "MOST_FREE_WORK", 300_000_000)
        with pytest.raises(StoreError, match="multiply-adds more than its inputs account for"):
            backend.warm_up(2, 1)
        for module in (onnx_checks, onnx_captured):
            monkeypatch.setattr(module, "MOST_FREE_WORK", 600_000_000)
        backend.warm_up(2, 1)
        backend.close()


def test_values_that_a_program_keeps_are_counted(tmp_path):
    """64 MiB of results beside a kernel that may take 32 MiB."""
    with Store(write_captured(tmp_path / "store")) as store:
        backend = OnnxBackend(store, 1)
        step = next(iter(store.program.steps()))
        for size, runs in ((1 << 20, True), (64 << 20, False)):
            state = backend.begin({"x": inputs_of(2)["r0"]}, None, (2, 1))
            state.values["kept"] = np.zeros(size, np.int8)
            state.made_bytes = size
            if runs:
                backend.run(state, step, {"w0": inputs_of(2)["w0"]})
            else:
                with pytest.raises(StoreError, match=r"values of the program take 64\.0 MiB beside it"):
                    backend.run(state, step, {"w0": inputs_of(2)["w0"]})
        backend.close()


def test_operations_are_counted_over_all_kernels_of_a_store(tmp_path, monkeypatch):
    """The two kernels of the store have 4 and 3."""
    with Store(write_captured(tmp_path / "store")) as store:
        monkeypatch.setattr(onnx_captured, "MOST_STORE_NODES", 6)
        with pytest.raises(StoreError, match="graph 'mean' is refused: the graphs of the store have more than 6 op"):
            OnnxBackend(store, 1)
        monkeypatch.setattr(onnx_captured, "MOST_STORE_NODES", 7)
        OnnxBackend(store, 1).close()


def test_a_kernel_is_inferred_once_for_each_shape(tmp_path, monkeypatch):
    calls = []
    infer = onnx_captured.sizes_of
    monkeypatch.setattr(onnx_captured, "sizes_of", lambda *given: calls.append(1) or infer(*given))
    with Store(write_captured(tmp_path / "store")) as store:
        backend = OnnxBackend(store, 1)
        backend.warm_up(3, 1)
        known = len(calls)
        backend.warm_up(3, 1)
        assert known == len(calls)
        backend.warm_up(4, 1)
        assert len(calls) == known + 2
        backend.close()


def test_trusted_kernels_may_have_other_operators_and_no_other_sizes(tmp_path, monkeypatch):
    random = layer([node("RandomNormal", [], ["v"], shape=[4]), reduced("v")])
    with Store(store_with(tmp_path / "store", monkeypatch, random)) as store:
        with pytest.raises(StoreError, match=re.escape("or with --trust-kernels if you trust who made the store")):
            OnnxBackend(store, 1)
        backend = OnnxBackend(store, 1, trust_kernels=True)
        backend.warm_up(2, 1)
        backend.close()
    for name in ("terabyte", "functions", "deep", "many", "one product"):
        path, refused = store_with(tmp_path / name, monkeypatch, CASES[name][0]()), pytest.raises(StoreError)
        with Store(path) as store, refused as caught:
            OnnxBackend(store, 1, trust_kernels=True)
        assert "is refused" in str(caught.value)


ANSI = "\x1b[31mred\nforged: line"


def test_names_in_graphs_reach_the_terminal_escaped(tmp_path, monkeypatch, capfd):
    """At load and at run, in what is printed and in what is raised."""
    indices = [numpy_helper.from_array(np.array([99]), "n")]
    fails = layer([node("Gather", ["c0", "n"], ["v"], name=ANSI), reduced("v")], indices)
    with Store(store_with(tmp_path / "run", monkeypatch, fails)) as store:
        backend = OnnxBackend(store, 1)
        with pytest.raises(StoreError) as caught:
            backend.warm_up(2, 1)
        assert caught.value.__cause__ is None and caught.value.__suppress_context__
    odd = layer([node("Relu", [ANSI], ["v"]), reduced("v")])
    with Store(store_with(tmp_path / "load", monkeypatch, odd)) as store, pytest.raises(StoreError) as also:
        OnnxBackend(store, 1)
    texts = [str(caught.value), str(also.value), *capfd.readouterr()]
    assert not [text for text in texts if "\x1b" in text or "\n" in text]


def test_answers_are_those_of_numpy(tmp_path):
    x = np.random.default_rng(1).standard_normal((3, PLACES, HIDDEN)).astype(np.float32)
    with Store(write_captured(tmp_path / "store")) as store:
        backend = OnnxBackend(store, 1)
        state = backend.begin({"x": x}, None, (3, 1))
        arrays = {name: array for tensors in captured.weights().values() for name, array in tensors.items()}
        for step in store.program.steps():
            backend.run(state, step, {role: arrays[name] for role, name in step.weights.items()})
        np.testing.assert_allclose(backend.logits(state), expected(x)[1], rtol=1e-5)
        backend.close()


def endless_answer():
    """The last kernel with a loop that is endless with real weights, and empty with the zeros of a warm-up."""
    body = helper.make_graph(
        [node("Identity", ["go"], ["on"]), node("Identity", ["x"], ["y"])],
        "body",
        [value("i", INT), value("go", BOOL), value("x", FLOAT, "B", HIDDEN)],
        [value("on", BOOL), value("y", FLOAT, "B", HIDDEN)],
    )
    nodes = [
        node("Abs", ["w0"], ["size"]),
        node("ReduceMax", ["size"], ["most"], keepdims=0),
        node("Mul", ["most", "large"], ["long"]),
        node("Cast", ["long"], ["times"], to=INT),
        node("ReduceMean", ["r0"], ["m"], axes=[1], keepdims=0),
        node("Loop", ["times", "yes", "m"], ["same"], body=body),
        node("Transpose", ["w0"], ["t"]),
        node("MatMul", ["same", "t"], ["out"]),
    ]
    inputs = [value("r0", FLOAT, "B", PLACES, HIDDEN), value("w0", FLOAT, 2, HIDDEN)]
    constants = [number("large", np.float32(1e15)), number("yes", True)]
    graph = helper.make_graph(nodes, "mean", inputs, [value("out", FLOAT, "B", 2)], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def value(name, kind, *shape):
    return helper.make_tensor_value_info(name, kind, shape)


def test_a_deadline_stops_a_kernel_and_its_rows_have_the_last_answer(tmp_path, monkeypatch):
    x = np.random.default_rng(1).standard_normal((PLACES, HIDDEN)).astype(np.float32)
    honest = captured.onnx_graphs()
    monkeypatch.setattr(captured, "onnx_graphs", lambda: {**honest, "mean": endless_answer()})
    path = write_captured(tmp_path / "store")
    with offramp.load(path, deadline="0.2s", trust_kernels=True, threads=1) as classifier:
        began = time.perf_counter()
        (result,) = classifier.predict([{"x": x}])
        assert 0.2 < time.perf_counter() - began < 10
        assert (result.exit_stage, classifier.counts.num_cut, classifier.counts.num_late) == (1, 1, 1)
        (again,) = classifier.predict([{"x": x}])  # the guard has learned that the kernel is too slow
        assert (again.label, classifier.counts.num_cut, classifier.counts.num_late) == (result.label, 2, 1)
        logits = expected(x[np.newaxis])[0][0]
        assert result.label == captured.LABELS[int(logits.argmax())]


def test_values_without_elements_have_few_places():
    """An operation goes through the places of their other axes, which take no memory and count for no work."""
    _require_extent(Known("float32", (1 << 20, 0)))
    with pytest.raises(TooLargeError, match="a value of the shape"):
        _require_extent(Known("float32", (1 << 20, 0, 1 << 10)))
