"""The torch backend's own promises; that its answers are transformers' is for tests/oracle.

Shapes: B rows, S tokens, E embedding width, H hidden.
"""

import dataclasses
import gc
import json
import weakref

import numpy as np
import pytest
from safetensors.numpy import save_file

import offramp
from offramp.errors import StoreError
from offramp.store import Store, manifest
from tests.division.tiny import write_model

torch = pytest.importorskip("torch")
from offramp.backends import TorchBackend  # noqa: E402  (needs torch)
from offramp.backends.torch_modules import build_skeletons  # noqa: E402

HIDDEN, NUM_LABELS = 32, 2  # of tests.division.tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with exits, and its store."""
    folder = tmp_path_factory.mktemp("torch")
    write_model(folder / "model")
    heads = {
        "exit.1.weight": np.ones((NUM_LABELS, HIDDEN), np.float32),
        "exit.1.bias": np.zeros(NUM_LABELS, np.float32),
    }
    save_file(heads, folder / "model" / "exits.safetensors")
    (folder / "model" / "exits.json").write_text(json.dumps({"form": "mean-linear", "trained": True}))
    offramp.divide(folder / "model", folder / "store")
    return folder


@pytest.fixture
def store(folder):
    with Store(folder / "store") as opened:
        yield opened


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def weights_of(backend, kind, seed=0):
    rng = np.random.default_rng(seed)
    skeleton = build_skeletons(backend.encoder, "sdpa", "mean-linear")[kind]
    return {
        role: rng.standard_normal(parameter.shape).astype(np.float32) / 8
        for role, parameter in skeleton.named_parameters()
    }


def begin(backend, mask_BS):
    rng = np.random.default_rng(1)
    shape_TE = (mask_BS.size, backend.encoder.embedding_size)
    rows = {role: rng.standard_normal(shape_TE).astype(np.float32) for role in ("word", "position", "type")}
    return backend.begin(rows, mask_BS, weights_of(backend, "embedding"))


def run_layer(backend, state):
    for kind in ("attention", "up", "down"):
        backend.step(state, kind, weights_of(backend, kind))


def test_the_parameters_of_a_skeleton_are_the_roles_of_a_store(store):
    skeletons = build_skeletons(store.manifest.encoder, "sdpa", None)
    for stage in store.manifest.stages:
        for step in stage.steps:
            shards = [store.manifest.shards[name] for name in step.shards]
            tensors = [tensor for shard in shards if shard.blocks is None for tensor in shard.tensors]
            shapes = {name: tuple(parameter.shape) for name, parameter in skeletons[step.kind].named_parameters()}
            assert {tensor.role: tensor.shape for tensor in tensors} == shapes


def test_weights_are_views_and_let_go_at_the_end(store):
    backend = TorchBackend(store, 1)
    state, weights = begin(backend, np.ones((1, 4), np.int64)), weights_of(backend, "up")
    backend.step(state, "up", weights)
    before = state.arrays["inner"].clone()
    weights["up.bias"] += 1
    backend.step(state, "up", weights)
    assert not torch.equal(state.arrays["inner"], before)
    seen = [weakref.ref(array) for array in weights.values()]
    parameters = dict(backend._skeletons["up"].named_parameters())
    assert all(parameters[role].data_ptr() == array.ctypes.data for role, array in weights.items())
    del weights, parameters
    backend.close()
    gc.collect()
    assert [reference() for reference in seen] == [None, None]
    run_layer(backend, state)


def test_read_only_weights_are_taken_without_a_warning(store):
    backend = TorchBackend(store, 1)
    state, weights = begin(backend, np.ones((1, 4), np.int64)), weights_of(backend, "exit")
    expected = backend.exit_logits(state, weights)
    for array in weights.values():
        array.flags.writeable = False
    np.testing.assert_array_equal(backend.exit_logits(state, weights), expected)


def test_rehearsing_says_nothing_of_later_answers(store):
    backend, fresh = TorchBackend(store, 1), TorchBackend(store, 1)
    backend.rehearse(2, 8)
    backend.rehearse(1, 1)
    said = []
    for one in (backend, fresh):
        state = begin(one, np.ones((2, 4), np.int64))
        run_layer(one, state)
        said.append(one.head_logits(state, weights_of(one, "head")))
    assert np.isfinite(said[0]).all()
    np.testing.assert_array_equal(*said)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 1, 2]], ids=["full", "ragged"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_rows_that_leave_change_nothing_for_the_others(store, lengths, attention):
    mask_BS = (np.arange(4) < np.array(lengths)[:, None]).astype(np.int64)
    backend = TorchBackend(store, 1, attention)
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


def test_each_pass_sets_its_threads(store):
    one, two = TorchBackend(store, 1), TorchBackend(store, 2)
    for backend in (one, two, one):
        begin(backend, np.ones((1, 4), np.int64))
        assert torch.get_num_threads() == backend.num_threads


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@pytest.mark.parametrize(("num_rows", "length"), [(1, 16), (4, 16), (2, 256)])
def test_the_promised_bytes_hold_all_tensors_of_a_pass(store, monkeypatch, attention, activation, num_rows, length):
    encoder = dataclasses.replace(store.manifest.encoder, activation=activation)
    monkeypatch.setattr(store, "contents", dataclasses.replace(store.manifest, encoder=encoder))
    mask_BS = np.ones((num_rows, length), np.int64)
    mask_BS[-1, 1:] = 0
    backend = TorchBackend(store, 1, attention)
    with _Live() as live:
        state = begin(backend, mask_BS)
        run_layer(backend, state)
    without_scratch = TorchBackend(store, 0, attention)
    promised_bytes = without_scratch.activation_bytes(num_rows, length)
    assert promised_bytes / 4 < live.peak_bytes <= promised_bytes


class _Live(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of tensors that are alive at once. What comes from outside, as weights do, is free."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak_bytes = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._watch((args, kwargs), free=True)
        found = func(*args, **(kwargs or {}))
        self._watch(found, free=func is torch.ops.aten.lift_fresh.default)  # from_numpy
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        return found

    def _watch(self, tree, free):
        for tensor in torch.utils._pytree.tree_leaves(tree):
            if not isinstance(tensor, torch.Tensor) or tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                key, size = storage._cdata, 0 if free else storage.nbytes()
                self._known.add(key)
                self.bytes += size
                weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self._known.discard(key)
        self.bytes -= size


def test_a_store_without_graphs_runs(folder, tmp_path):
    source = offramp.divide(folder / "model", tmp_path / "store")
    with Store(source) as whole:
        bare = dataclasses.replace(whole.manifest, graphs={})
    (source / manifest.FILE_NAME).write_bytes(manifest.dumps(bare))
    with Store(source) as opened:
        TorchBackend(opened, 1).rehearse(1, 8)


def test_another_attention_is_refused(store):
    with pytest.raises(ValueError, match=r"attention must be one of .*'sdpa', 'eager'.* not 'flash'"):
        TorchBackend(store, 1, "flash")


def test_a_kind_that_it_does_not_compute_is_refused(store, monkeypatch):
    stages = (manifest.Stage("mixer", "layer", (manifest.Step("mixer", ()),)),)
    monkeypatch.setattr(store, "contents", dataclasses.replace(store.manifest, stages=stages))
    with pytest.raises(StoreError, match=r"stage mixer has the steps \('mixer',\), not"):
        TorchBackend(store, 1)


def test_a_tensor_that_the_encoder_does_not_promise_is_refused(store, monkeypatch):
    encoder = dataclasses.replace(store.manifest.encoder, labels=("a", "b", "c"))
    monkeypatch.setattr(store, "contents", dataclasses.replace(store.manifest, encoder=encoder))
    with pytest.raises(StoreError, match=r"stage head, head: out.bias is \('F32', \(2,\)\), .* \('F32', \(3,\)\)"):
        TorchBackend(store, 1)


@pytest.mark.parametrize("description", [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000, b"null"])
def test_exits_that_do_not_say_their_form_are_refused(store, monkeypatch, description):
    monkeypatch.setattr(store, "read_file", lambda file: description)
    with pytest.raises(StoreError, match=r"exits.json does not name the form of the exits - .* - train"):
        TorchBackend(store, 1)


@pytest.mark.parametrize("form", ["1", "null", "[]", "{}", '["mean-linear"]'])
def test_exits_whose_form_is_no_name_are_refused(store, monkeypatch, form):
    monkeypatch.setattr(store, "read_file", lambda file: b'{"form": %s}' % form.encode())
    with pytest.raises(StoreError, match="unknown form of exits"):
        TorchBackend(store, 1)


def test_exits_of_another_form_are_refused(store, monkeypatch):
    monkeypatch.setattr(store, "read_file", lambda file: b'{"form": "pooled"}')
    with pytest.raises(StoreError, match=r"unknown form of exits 'pooled', known: .*mean-linear"):
        TorchBackend(store, 1)
