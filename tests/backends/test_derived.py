"""Graphs of templates that lie in a store are never read: the answers are those of the same store without graphs."""

import os
import shutil
from hashlib import sha256

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from offramp.backends.onnx import OnnxBackend
from offramp.backends.onnx_session import arena_array, reserve_arena
from offramp.backends.onnx_templates import graph_of
from offramp.store import Store
from offramp.store.exits import read_exits
from tests.backends.driver import answer, begin, exit_answer, mask_of, run
from tests.store.old_formats import encoder_store
from tests.store.small import reseal, tree_of


def model(nodes, initializers=()):
    """A graph with the inputs and the result of the kernel `up` of the store, 32 to 64."""
    floats = TensorProto.FLOAT
    shapes = {"hidden": ["T", 32], "up.weight": [64, 32], "up.bias": [64]}
    inputs = [helper.make_tensor_value_info(name, floats, shape) for name, shape in shapes.items()]
    out = [helper.make_tensor_value_info("out", floats, ["T", 64])]
    graph = helper.make_graph(nodes, "up", inputs, out, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7).SerializeToString()


def endless():
    """A loop that never ends, instead of the kernel."""
    info, floats = helper.make_tensor_value_info, TensorProto.FLOAT
    given = [info("at", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("x", floats, None)]
    kept = [helper.make_node("Identity", ["go"], ["going"]), helper.make_node("Identity", ["x"], ["y"])]
    body = helper.make_graph(kept, "body", given, [info("going", TensorProto.BOOL, []), info("y", floats, None)])
    most, always = helper.make_tensor("most", 7, [], [(1 << 63) - 1]), helper.make_tensor("always", 9, [], [1])
    nodes = [helper.make_node("Loop", ["most", "always", "hidden"], ["same"], body=body)]
    nodes.append(helper.make_node("Gemm", ["same", "up.weight", "up.bias"], ["out"], transB=1))
    return model(nodes, [most, always])


def another():
    """The same kernel without its activation."""
    return model([helper.make_node("Gemm", ["hidden", "up.weight", "up.bias"], ["out"], transB=1)])


def elsewhere():
    """A graph whose constant lies in another file."""
    tensor = TensorProto(name="up.bias", data_type=1, dims=[64], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../secret")
    return model([helper.make_node("Gemm", ["hidden", "up.weight", "up.bias"], ["out"], transB=1)], [tensor])


def huge():
    """A graph that fills 4 GiB while it is loaded."""
    size = helper.make_tensor("size", TensorProto.INT64, [1], [1 << 30])
    nodes = [helper.make_node("ConstantOfShape", ["size"], ["out"])]
    return model(nodes, [size])


def own(kernel, form):
    return graph_of(kernel, form)


CONTENTS = {
    "none": lambda *_: b"",
    "not a graph": lambda *_: b"\xff" * 1000,
    "an endless loop": lambda *_: endless(),
    "another computation": lambda *_: another(),
    "data in another file": lambda *_: elsewhere(),
    "four gigabytes": lambda *_: huge(),
    "its own graph, as earlier versions wrote it": own,
}
PLACES = {
    "missing": lambda path: None,
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "a link": lambda path: path.symlink_to("/dev/zero"),
}


def with_graphs(store, content):
    """Give every kernel of a template this graph, with size and digest in the manifest."""
    tree = tree_of(store)
    with Store(store) as opened:
        exits, kernels = read_exits(opened), opened.program.kernels
    shutil.rmtree(store / "graphs", ignore_errors=True)
    (store / "graphs").mkdir()
    for name in set(kernels) - {"mask"}:
        data, file = content(kernels[name], exits.form), f"graphs/{name}.onnx"
        (store / file).write_bytes(data)
        digest = sha256(data).hexdigest()
        tree["graphs"][name] = {"file": file, "bytes": len(data), "sha256": digest, "opset": 13, "ir": 7}
    reseal(store, tree)


def answers(path):
    """What the exit after the first layer and the last one say."""
    with Store(path, "always") as store:
        backend = OnnxBackend(store, 1)
        backend.warm_up(2, 4)
        state = begin(backend, mask_of([4, 2]))
        run(backend, state, backend.program.stages[:2])
        return [exit_answer(backend, state), answer(backend, state, backend.program.stages[2:])]


@pytest.fixture(params=["format 1", "format 3"])
def earlier(request, store, tmp_path):
    """A store that may list graphs of templates."""
    return encoder_store(tmp_path) if request.param == "format 1" else shutil.copytree(store, tmp_path / "store")


@pytest.fixture
def loaded(monkeypatch):
    """The graphs of kernels that ONNX Runtime gets."""
    reserve_arena(4)  # its two graphs are loaded once a process
    arena_array(4)
    found, session = [], onnxruntime.InferenceSession

    def noting(graph, *rest, **options):
        found.append(graph)
        return session(graph, *rest, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", noting)
    return found


@pytest.mark.parametrize("content", CONTENTS)
def test_graphs_of_templates_have_no_effect(earlier, loaded, content):
    wanted, derived = answers(earlier), {*loaded}
    with_graphs(earlier, CONTENTS[content])
    for one, other in zip(answers(earlier), wanted, strict=True):
        assert np.isfinite(one).all() and one.any()
        np.testing.assert_array_equal(one, other)
    assert {*loaded} == derived and len(derived) == 6


@pytest.mark.parametrize("place", PLACES)
def test_the_files_of_such_graphs_are_not_opened(earlier, place):
    wanted = answers(earlier)
    with_graphs(earlier, own)
    for path in (earlier / "graphs").iterdir():
        path.unlink()
        PLACES[place](path)
    np.testing.assert_array_equal(answers(earlier), wanted)


def test_the_hostile_graphs_are_what_they_say():
    """ONNX Runtime takes all but those that it cannot read, so that the tests above could fail."""
    for data in (endless(), another(), huge()):
        onnx.checker.check_model(data)
        assert onnxruntime.InferenceSession(data, disabled_optimizers=["ConstantFolding"])


def test_some_graphs_may_be_listed_and_others_not(earlier):
    wanted = answers(earlier)
    with_graphs(earlier, own)
    tree = tree_of(earlier)
    for name in ("up", "exit"):
        del tree["graphs"][name]
    reseal(earlier, tree)
    np.testing.assert_array_equal(answers(earlier), wanted)
