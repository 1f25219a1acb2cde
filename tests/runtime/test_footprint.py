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


SMAPS = b"""\
7f0000000000-7f0000003000 r-xp 00001000 08:01 42                         /usr/lib/code.so
Size:                 12 kB
Rss:                   8 kB
Anonymous:             0 kB
VmFlags: rd ex mr mw me sd
7f0000010000-7f0000011000 r-xp 00001000 08:01 43                         /usr/lib/relocated.so
Rss:                   4 kB
Anonymous:             4 kB
7f0000020000-7f0000021000 r--p 00001000 08:01 42                         /usr/lib/code.so
Rss:                   4 kB
Anonymous:             0 kB
7f0000030000-7f0000031000 rwxp 00001000 08:01 44                         /usr/lib/patched.so
Rss:                   4 kB
Anonymous:             0 kB
7f0000040000-7f0000041000 r-xp 00000000 00:00 0
Rss:                   4 kB
Anonymous:             0 kB
7f0000050000-7f0000051000 r-xp 00000000 00:00 0                          [vdso]
Rss:                   4 kB
Anonymous:             0 kB
7f0000060000-7f0000061000 r-xs 00000000 08:01 45                         /shared/code
Rss:                   4 kB
Anonymous:             0 kB
7f0000070000-7f0000071000 r-xp 00000000 08:01 46                         /a name with spaces.so (deleted)
Rss:                   4 kB
Anonymous:             0 kB
7f0000080000-7f0000081000 r--p 00000000 08:01 47                         /models/of another reader
Rss:                   4 kB
Anonymous:             0 kB
"""


def test_only_unmodified_pages_of_libraries_are_given_back(monkeypatch):
    monkeypatch.setattr(footprint.Path, "read_bytes", lambda _: SMAPS)
    found = list(footprint._clean_mappings())
    code, constants, spaced = (
        (0x7F0000000000, 0x3000, 8192),
        (0x7F0000020000, 0x1000, 4096),
        (0x7F0000070000, 0x1000, 4096),
    )
    assert found == [code, constants, spaced]


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_a_kernel_without_the_list_of_mappings(monkeypatch, error):
    def absent(_):
        raise error(2, "no such file", "/proc/self/smaps")

    monkeypatch.setattr(footprint.Path, "read_bytes", absent)
    assert footprint.trim_memory() == 0


def test_elsewhere_nothing_is_done(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert footprint.trim_memory() == 0
    assert not footprint.tune_allocator()
