"""Sessions of ONNX Runtime: the shared arena, runs that are stopped, and what reaches the terminal."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from offramp.backends.onnx_session import KernelError, StopClock, open_session, run_session, shrink_arena
from offramp.runtime.backend import StoppedError

FLOAT, INT, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


class Place:
    """Stands for a store in messages."""

    path = "STORE"


def value(name, kind, *shape):
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes, inputs, outputs, constants=()):
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(constants))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8).SerializeToString()


def loop(times):
    """A loop of so many passes of a small product."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("MatMul", ["a", "a"], ["b"])],
        "body",
        [value("i", INT), value("go", BOOL), value("a", FLOAT, 64, 64)],
        [value("on", BOOL), value("b", FLOAT, 64, 64)],
    )
    constants = [numpy_helper.from_array(np.array(times), "n"), numpy_helper.from_array(np.array(True), "yes")]
    node = helper.make_node("Loop", ["n", "yes", "x"], ["y"], body=body)
    data = model([node], [value("x", FLOAT, 64, 64)], [value("y", FLOAT, 64, 64)], constants)
    return open_session(data, 1, Place, "loop")


MATRIX = {"x": np.zeros((64, 64), np.float32)}


def test_a_run_is_stopped_at_its_time():
    clock, session = StopClock(), loop(1 << 20)
    for _ in range(3):
        began = time.perf_counter()
        with pytest.raises(StoppedError):
            run_session(session, None, MATRIX, clock.options(began + 0.05))
        assert 0.05 <= time.perf_counter() - began < 5
    clock.close()


def test_a_run_that_ends_in_time_is_not_stopped():
    clock, session = StopClock(), loop(10)
    far = time.perf_counter() + 1e6
    for late in (0.01, 1e6, 2e6):
        run_session(session, None, MATRIX, clock.options(far + late))
        assert clock.options(far + late) is clock.options(far + late)
    clock.close()


def test_one_thread_serves_all_requests_and_ends():
    clock, before = StopClock(), threading.active_count()
    for index in range(100):
        clock.options(time.perf_counter() + 1e6 + index)
    assert threading.active_count() == before + 1
    clock.close()
    assert threading.active_count() == before
    options = clock.options(time.perf_counter() + 0.01)
    while threading.active_count() > before:
        time.sleep(0.001)
    assert options.terminate


ARENA = """
import sys
import numpy as np
from offramp.backends import onnx_session
from offramp.runtime.ledger import LEDGER
onnx_session.ARENA_ROOM_BYTES = onnx_session.LEAST_ARENA_BYTES = 0
LEDGER.process_bytes = {limit} << 20
session = onnx_session.open_session(bytes.fromhex(sys.stdin.read()), 1, None, "g")
for size in {sizes}:
    try:
        onnx_session.run_session(session, None, {{"x": np.zeros(size << 18, np.float32)}})
        print(size, "ran")
    except Exception as error:
        print(size, type(error).__name__)
"""


def _twice():
    """Return a graph whose values are twice in the arena."""
    nodes = [
        helper.make_node("Exp", ["x"], ["a"]),
        helper.make_node("Neg", ["a"], ["b"]),
        helper.make_node("ReduceMax", ["b"], ["y"], keepdims=0),
    ]
    return model(nodes, [value("x", FLOAT, "N")], [value("y", FLOAT)])


def runs(limit, sizes):
    """Run inputs of so many MiB, twice in the arena, under a limit in MiB. Returns what was printed of each."""
    code = ARENA.format(limit=limit, sizes=list(sizes))
    done = subprocess.run(
        [sys.executable, "-c", code], input=_twice().hex(), capture_output=True, text=True, check=True
    )
    assert not done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


def test_free_regions_of_the_arena_refuse_nothing():
    """4, 12 and 14 leave free regions that are too small for 15: they are freed, and all sizes run in any order."""
    sizes = [4, 12, 14, 15, 5, 8]
    assert runs(32, sizes) == {str(size): "ran" for size in sizes}


GROWTH = """
import sys
import numpy as np
from offramp.backends import onnx_session
from offramp.measure import read_memory
session = onnx_session.open_session(bytes.fromhex(sys.stdin.read()), 1, None, "g")
def grown(reserved_bytes):
    onnx_session.shrink_arena()
    before = read_memory().anon_bytes
    onnx_session.reserve_arena(reserved_bytes)
    for size in (2, 4, 6, 8):
        session.run(None, {"x": np.zeros(size << 18, np.float32)})
    return (read_memory().anon_bytes - before) >> 20
grown(0)
print(grown(0), grown(17 << 20))
"""


def test_a_reserved_arena_serves_growing_values_from_one_region():
    """Values of 2 to 8 MiB, two of each at once: 16 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], input=_twice().hex(), capture_output=True, text=True, check=True
    )
    free, reserved = map(int, done.stdout.split())
    assert reserved <= 18 < free


def test_values_that_do_not_fit_the_arena_are_a_matter_of_the_budget():
    assert runs(32, [4, 20, 5]) == {"4": "ran", "20": "BudgetError", "5": "ran"}


def test_what_a_library_says_of_a_kernel_is_its_last_line():
    session = loop(1)
    with pytest.raises(KernelError) as caught:
        run_session(session, None, {"x": np.zeros((3, 3), np.float32)})
    assert "\n" not in str(caught.value) and caught.value.__cause__ is None


def test_an_arena_can_be_shrunk_at_any_time():
    shrink_arena()
    shrink_arena()
