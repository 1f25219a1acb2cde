from __future__ import annotations

import sys

import pytest

from offramp.runtime import footprint

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

WORK_AFTERWARDS = """
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from offramp.measure import read_memory
from offramp.runtime.footprint import trim_memory

def work():
    value = helper.make_tensor_value_info
    nodes = [helper.make_node("MatMul", ["a", "b"], ["c"]), helper.make_node("Softmax", ["c"], ["d"])]
    graph = helper.make_graph(
        nodes, "g", [value("a", TensorProto.FLOAT, [4, 4]), value("b", TensorProto.FLOAT, [4, 4])],
        [value("d", TensorProto.FLOAT, [4, 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    eye = np.eye(4, dtype=np.float32)
    (out,) = session.run(None, {"a": eye, "b": eye})
    return np.linalg.inv(out).tobytes() + np.sort(np.fft.fft(out.ravel()).real).tobytes()

first = work()
before = read_memory()
released = trim_memory()
after = read_memory()
print(released > 1 << 20, before.file_bytes - after.file_bytes > released // 2, work() == first)
print(trim_memory() >= 0, work() == first)
"""


@linux
def test_code_is_given_back_and_libraries_still_work(run_python):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    assert run_python(WORK_AFTERWARDS).split() == ["True"] * 5


def test_a_system_that_hides_page_tables(monkeypatch):
    monkeypatch.setattr(footprint, "read_page_table", lambda: None)
    assert footprint.trim_memory() == 0


def test_elsewhere_nothing_is_done(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert footprint.trim_memory() == 0
    assert not footprint.tune_allocator()
