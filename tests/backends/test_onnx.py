"""The ONNX Runtime backend's own promises; that its answers are transformers' is for tests/oracle.

Shapes: B rows, S tokens.
"""

import dataclasses
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest

from offramp.backends import OrtBackend
from offramp.errors import MissingExtraError, StoreError
from offramp.store import Store

HEAVY = ("torch", "transformers", "onnx", "safetensors", "huggingface_hub")
KINDS = ("attention", "up", "down")


@pytest.fixture
def opened(store):
    with Store(store) as opened:
        yield opened


def weights_of(backend, kind):
    rng = np.random.default_rng(0)
    inputs = [node for node in backend._sessions[kind].get_inputs() if all(isinstance(n, int) for n in node.shape)]
    return {
        node.name: rng.standard_normal(node.shape).astype(np.float32) / 8
        for node in inputs
        if node.type == "tensor(float)"
    }


def begin(backend, mask_BS):
    rng = np.random.default_rng(1)
    shape_TE = (mask_BS.size, backend.encoder.embedding_size)
    rows = {role: rng.standard_normal(shape_TE).astype(np.float32) for role in ("word", "position", "type")}
    return backend.begin(rows, mask_BS, weights_of(backend, "embedding"))


def run_layer(backend, state):
    for kind in KINDS:
        backend.step(state, kind, weights_of(backend, kind))


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


def test_rehearsing_says_nothing_of_later_answers(opened):
    backend, fresh = OrtBackend(opened, 1), OrtBackend(opened, 1)
    backend.rehearse(2, 8)
    backend.rehearse(1, 1)
    said = []
    for one in (backend, fresh):
        state = begin(one, np.ones((2, 4), np.int64))
        run_layer(one, state)
        said.append(one.head_logits(state, weights_of(one, "head")))
    assert np.isfinite(said[0]).all() and said[0].any()
    np.testing.assert_array_equal(*said)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 1, 2]], ids=["full", "ragged"])
def test_rows_that_leave_change_nothing_for_the_others(opened, lengths):
    mask_BS = (np.arange(4) < np.array(lengths)[:, None]).astype(np.int64)
    backend = OrtBackend(opened, 1)
    whole, shrunk = begin(backend, mask_BS), begin(backend, mask_BS)
    for state in (whole, shrunk):
        run_layer(backend, state)
    backend.keep(shrunk, np.array([True, False, True]))
    assert shrunk.num_rows == 2
    for state in (whole, shrunk):
        run_layer(backend, state)
    for ask, kind in ((backend.head_logits, "head"), (backend.exit_logits, "exit")):
        weights = weights_of(backend, kind)
        np.testing.assert_allclose(ask(shrunk, weights), ask(whole, weights)[[0, 2]], rtol=0, atol=1e-5)


def test_a_closed_backend_runs_again(opened):
    backend = OrtBackend(opened, 1)
    said = []
    for _ in range(2):
        state = begin(backend, np.ones((1, 4), np.int64))
        run_layer(backend, state)
        said.append(backend.head_logits(state, weights_of(backend, "head")))
        backend.close()
    np.testing.assert_array_equal(*said)


def test_a_store_without_graphs_is_refused_with_the_way_out(opened, monkeypatch):
    monkeypatch.setattr(opened, "contents", dataclasses.replace(opened.manifest, graphs={}))
    with pytest.raises(StoreError, match=r"no graphs.*offramp divide --graphs STORE.*--backend torch"):
        OrtBackend(opened, 1)


def test_a_graph_that_is_none_is_refused_by_name(opened, monkeypatch):
    read = opened.read_file
    monkeypatch.setattr(
        opened, "read_file", lambda file: b"not a graph" if file.file.startswith("graphs/") else read(file)
    )
    with pytest.raises(StoreError, match=r"graph '[a-z]+' does not load") as caught:
        OrtBackend(opened, 1)
    assert "\n" not in str(caught.value)


def test_a_kind_that_it_does_not_compute_is_refused(opened, monkeypatch):
    graphs = {"mixer": opened.manifest.graphs["up"]}
    monkeypatch.setattr(opened, "contents", dataclasses.replace(opened.manifest, graphs=graphs))
    with pytest.raises(StoreError, match=r"graphs of unknown kinds \['mixer'\]"):
        OrtBackend(opened, 1)


def with_last_column_twice(graph):
    """The same graph, whose output is one wider."""
    model = onnx.load_from_string(graph)
    last = onnx.helper.make_node("Gather", [model.graph.output[0].name, "at"], ["last"], axis=-1)
    wider = onnx.helper.make_node("Concat", [model.graph.output[0].name, "last"], ["wider"], axis=-1)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1]), "at"))
    model.graph.node.extend([last, wider])
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info("wider", onnx.TensorProto.FLOAT, None))
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("kind", "mention"),
    [
        ("embedding", "(8, 33), not (8, 32)"),
        ("attention", "(8, 33), not (8, 32)"),
        ("up", "(8, 65), not (8, 64)"),
        ("down", "(8, 33), not (8, 32)"),
        ("head", "(2, 3), not (2, 2)"),
        ("exit", "(2, 3), not (2, 2)"),
    ],
)
def test_a_graph_that_gives_another_shape_is_refused(opened, monkeypatch, kind, mention):
    spoilt, read = opened.manifest.graphs[kind], opened.read_file
    monkeypatch.setattr(
        opened, "read_file", lambda file: with_last_column_twice(read(file)) if file is spoilt else read(file)
    )
    backend = OrtBackend(opened, 1)
    with pytest.raises(StoreError, match=re.escape(f"graph {kind!r} gives {mention}")):
        backend.rehearse(2, 4)


def test_what_to_install_is_said_without_onnx_runtime(opened, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime is not installed - pip install 'offramp\[edge\]'"):
        OrtBackend(opened, 1)
