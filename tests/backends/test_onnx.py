"""Promises of the ONNX Runtime backend alone; those of every backend are in test_laws.

Shapes: B rows, S tokens.
"""

import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest

from offramp.backends import onnx
from offramp.backends.onnx import OnnxBackend
from offramp.errors import MissingExtraError, StoreError
from offramp.program.dtypes import ALIGNMENT_BYTES
from offramp.runtime.backend import State
from offramp.store import Store
from tests.backends.captured import write_captured
from tests.backends.driver import begin, mask_of, run

HEAVY = ("torch", "transformers", "onnx", "safetensors", "huggingface_hub")


@pytest.fixture
def opened(store):
    with Store(store) as opened:
        yield opened


def with_graphs(store, monkeypatch, graphs):
    monkeypatch.setattr(store, "manifest", dataclasses.replace(store.manifest, graphs=graphs))


def run_code(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_predicting_loads_nothing_heavy(store):
    code = f"""
import sys
import offramp.backends.onnx
assert not {{"onnxruntime", *{HEAVY}}} & set(sys.modules)
import offramp
with offramp.load(sys.argv[1], exit="stage:1", threads=1) as classifier:
    print(classifier.predict(["a good film"])[0].label)
with offramp.load(sys.argv[1], threads=1) as classifier:
    print(classifier.predict([("a film", "bad")])[0].label)
print([name for name in {HEAVY} if name in sys.modules])
"""
    *labels, heavy = run_code(code, str(store))
    assert all(label.startswith("LABEL_") for label in labels) and len(labels) == 2
    assert heavy == "[]"


def test_the_promised_bytes_are_those_of_the_largest_kernel(opened):
    """hidden 32, inner 64, 4 heads; for long texts attention takes most."""
    backend = OnnxBackend(opened, 1)
    assert backend.activation_bytes(2, 4) == 4 * 8 * (5 * 32 + 2 * 32)
    assert backend.activation_bytes(2, 64) == 4 * (5 * 128 * 32 + 2 * 2 * 4 * 64 * 64)
    assert backend.state_bytes(2, 4) == 4 * 8 * (32 + 2)


LAYER = """
import numpy as np
from offramp.backends.onnx import OnnxBackend
from offramp.backends.onnx_session import open_session, reserve_arena, shrink_arena
from offramp.backends.onnx_templates import UNFUSED, graph_of
from offramp.measure import read_memory
from offramp.program.encoder import attributes_of
from offramp.program.program import Kernel
S, H, I = 128, 768, 3072
sizes = {"hidden_size": H, "intermediate_size": I, "num_heads": 12, "norm_epsilon": 1e-12, "activation": "gelu"}
values = {"hidden": np.ones((S, H), np.float32), "inner": np.ones((S, I), np.float32)}
values.update(mask=np.zeros((1, 1, 1, S), np.float32), shape=np.array([1, S, 12, H // 12]))
dtypes = {"tensor(int8)": np.int8, "tensor(float)": np.float32, "tensor(int64)": np.int64}
rounding = {"rotation": 64, "exact": 4, "zero_point": 16}
for suffix, more in (("", {}), ("-int8", {}), ("-int8", rounding)):
    calls, promised = [], 0
    for name in ("attention", "up", "down"):
        kernel = Kernel(name + suffix, attributes_of(name + suffix, {**sizes, **more}))
        promised = max(promised, 4 * OnnxBackend.num_elements(None, kernel, 1, S))
        session = open_session(graph_of(kernel), 1, None, name, UNFUSED)
        inputs = {each.name: each for each in session.get_inputs()}
        weights = {name: np.zeros(inputs[name].shape, dtypes[inputs[name].type]) for name in set(inputs) - set(values)}
        calls.append((session, {**weights, **{name: values[name] for name in set(inputs) & set(values)}}))
    shrink_arena()
    before = read_memory().anon_bytes
    reserve_arena(promised)
    for session, feeds in calls:
        session.run(None, feeds)
    print(promised, read_memory().anon_bytes - before)
"""


def test_a_layer_takes_no_more_of_the_arena_than_is_promised():
    """Layers of BERT-base with float and with integer weights, the latter also with rotated rows and exact inputs: one
    region of the promised size serves all kernels.
    """
    numbers = [int(number) for number in run_code(LAYER)]
    assert len(numbers) == 6
    for promised, grown in zip(numbers[::2], numbers[1::2], strict=True):
        assert grown <= promised + 2**19


@pytest.mark.parametrize("is_copied", [False, True])
def test_rows_are_gathered_into_the_arena_where_results_are_views_of_it(opened, monkeypatch, is_copied):
    monkeypatch.setattr(onnx, "returns_arena", lambda: not is_copied)
    backend = OnnxBackend(opened, 1)
    backend.prepare(2, 8)
    addresses = []
    for num_bytes in (4096, 100, 0, 4096):
        rows = backend.allocate(num_bytes)
        rows.fill(7)
        assert (rows.dtype, rows.shape) == (np.uint8, (num_bytes,))
        assert num_bytes == 0 or rows.ctypes.data % ALIGNMENT_BYTES == 0
        addresses.append(rows.ctypes.data)
        is_inside = not isinstance(owner_of(rows), np.ndarray)
        assert is_inside is (num_bytes > 0 and not is_copied)
        del rows
    assert is_copied or addresses[0] == addresses[-1]  # what was freed is used again
    assert backend.keeps_rows is not is_copied


def test_a_state_that_is_set_aside_leaves_the_arena_as_it_is(opened):
    backend = OnnxBackend(opened, 1)
    inside, outside = backend.allocate(4096), np.arange(5)
    inside.fill(7)
    values = {"inside": inside.reshape(2, -1), "outside": outside, "none": None}
    state = State(2, 8, values, None)
    backend.set_aside(state)
    assert state.values["outside"] is outside
    assert state.values["none"] is None
    moved = state.values["inside"]
    assert isinstance(owner_of(moved), np.ndarray)
    assert np.array_equal(moved, np.full((2, 2048), 7, np.uint8))


def owner_of(array):
    """Return the object that owns the memory of a view."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array


def test_a_captured_store_without_graphs_is_refused_with_the_way_out(tmp_path):
    refused = pytest.raises(StoreError, match=r"no graphs for ONNX.*--backend torch, or divide it with onnxscript")
    with Store(write_captured(tmp_path / "store", graphs=False)) as store, refused:
        OnnxBackend(store, 1)


@pytest.fixture
def captured(tmp_path):
    with Store(write_captured(tmp_path / "captured")) as opened:
        yield opened


def test_a_captured_store_that_lacks_one_graph_is_refused_by_its_name(captured, monkeypatch):
    with_graphs(captured, monkeypatch, {"mean": captured.manifest.graphs["mean"]})
    with pytest.raises(StoreError, match=r"the store has no graph 'layer'"):
        OnnxBackend(captured, 1)


def test_a_graph_that_is_none_is_refused_by_name(captured, monkeypatch):
    read, graphs = captured.read_file, captured.manifest.graphs.values()
    monkeypatch.setattr(captured, "read_file", lambda file: b"not a graph" if file in graphs else read(file))
    with pytest.raises(StoreError, match=r"graph '[a-z]+' is refused: not an ONNX model") as caught:
        OnnxBackend(captured, 1)
    assert "\n" not in str(caught.value)


def test_a_graph_of_a_kernel_that_the_program_does_not_have_is_refused(captured, monkeypatch):
    graphs = captured.manifest.graphs
    with_graphs(captured, monkeypatch, {**graphs, "mixer": graphs["layer"]})
    with pytest.raises(StoreError, match=r"graphs of unknown kernels \['mixer'\]"):
        OnnxBackend(captured, 1)


@pytest.mark.parametrize(
    ("kernel", "mention"),
    [
        ("embedding", "(8, 33), not (8, 32)"),
        ("attention", "(8, 33), not (8, 32)"),
        ("up", "(8, 65), not (8, 64)"),
        ("down", "(8, 33), not (8, 32)"),
        ("head", "(2, 3), not (2, 2)"),
        ("exit", "(2, 3), not (2, 2)"),
    ],
)
def test_a_kernel_that_gives_another_shape_is_refused(opened, kernel, mention):
    backend = OnnxBackend(opened, 1)
    loaded = backend.kernels[kernel]

    def wider(state, inputs):
        (result,) = loaded(state, inputs)
        return [np.concatenate([result, result[:, -1:]], axis=1)]

    backend.kernels[kernel] = wider
    with pytest.raises(StoreError, match=re.escape(f"kernel {kernel!r} gives {mention}")):
        backend.warm_up(2, 4)


def test_a_graph_that_fails_is_an_error_of_the_store(opened, monkeypatch):
    backend = OnnxBackend(opened, 1)
    state = begin(backend, mask_of([4, 4]))
    run(backend, state, backend.program.stages[:1])
    state.values["mask"] = np.zeros((2, 1, 1, 3), np.float32)
    with pytest.raises(StoreError, match=r"graph 'attention' does not take these inputs: .* - divide the model again"):
        run(backend, state, backend.program.stages[1:2])


def test_what_to_install_is_said_without_onnx_runtime(opened, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime is not installed - pip install 'offramp\[edge\]'"):
        OnnxBackend(opened, 1)
