"""Promises of the PyTorch backend alone; those of every backend are in test_laws.

Shapes: B rows, S tokens.
"""

import dataclasses
import gc
import weakref

import numpy as np
import pytest

from offramp.errors import StoreError
from offramp.measure import Memory
from offramp.store import Store
from tests.backends.captured import write_captured
from tests.backends.driver import answer, begin, exit_answer, mask_of, run, weights_of

torch = pytest.importorskip("torch")
from offramp.backends import torch as module  # noqa: E402  (needs torch)
from offramp.backends.base import ProgramBackend  # noqa: E402
from offramp.backends.torch import TorchBackend  # noqa: E402
from offramp.backends.torch_limits import ClaimError  # noqa: E402


@pytest.fixture
def store(store):
    with Store(store) as opened:
        yield opened


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def skeleton(backend, kernel):
    return backend.skeletons[kernel].module


def test_the_parameters_of_a_module_are_the_weights_of_its_kernel(store):
    backend, tensors = TorchBackend(store, 1), store.manifest.tensors()
    for step in store.program.steps():
        if step.kernel == "mask":
            continue
        shapes = {name: tuple(parameter.shape) for name, parameter in skeleton(backend, step.kernel).named_parameters()}
        assert {role: tensors[name][1].shape for role, name in step.weights.items()} == shapes


def test_weights_are_views_and_let_go_at_the_end(store):
    backend = TorchBackend(store, 1)
    state, (begun, layer, *_) = begin(backend, mask_of([4])), store.program.stages
    run(backend, state, [begun])
    attention, up, down = layer.steps
    backend.run(state, attention, weights_of(store, attention))
    weights = weights_of(store, up)
    backend.run(state, up, weights)
    (inner,) = up.writes
    before = state.values[inner].clone()
    weights["up.bias"] += 1
    backend.run(state, up, weights)
    assert not torch.equal(state.values[inner], before)
    seen = [weakref.ref(array) for array in weights.values()]
    parameters = dict(skeleton(backend, "up").named_parameters())
    assert all(parameters[role].data_ptr() == array.ctypes.data for role, array in weights.items())
    del weights, parameters
    backend.close()
    gc.collect()
    assert [reference() for reference in seen] == [None, None]
    backend.run(state, down, weights_of(store, down))


@pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 1, 2]], ids=["full", "ragged"])
def test_rows_that_leave_change_nothing_for_the_others_in_eager_attention(store, lengths):
    backend = TorchBackend(store, 1, "eager")
    begun, first, *rest = store.program.stages
    whole, shrunk = begin(backend, mask_of(lengths)), begin(backend, mask_of(lengths))
    for state in (whole, shrunk):
        run(backend, state, [begun, first])
    backend.keep(shrunk, np.array([0, 2]))
    assert shrunk.num_rows == 2
    for ask in (exit_answer, lambda one, state: answer(one, state, rest)):
        np.testing.assert_allclose(ask(backend, shrunk), ask(backend, whole)[[0, 2]], rtol=0, atol=1e-5)


def test_each_pass_sets_its_threads(store):
    one, two = TorchBackend(store, 1), TorchBackend(store, 2)
    for backend in (one, two, one):
        begin(backend, mask_of([4]))
        assert torch.get_num_threads() == backend.num_threads


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@pytest.mark.parametrize(("num_rows", "length"), [(1, 16), (4, 16), (2, 256)])
def test_the_promised_bytes_hold_all_tensors_of_a_pass(store, monkeypatch, attention, activation, num_rows, length):
    up = store.program.kernels["up"]
    kernels = {
        **store.program.kernels,
        "up": dataclasses.replace(up, attributes={**up.attributes, "activation": activation}),
    }
    program = dataclasses.replace(store.program, kernels=kernels)
    monkeypatch.setattr(store, "manifest", dataclasses.replace(store.manifest, program=program))
    mask_BS = np.ones((num_rows, length), np.int64)
    mask_BS[-1, 1:] = 0
    backend = TorchBackend(store, 1, attention)
    with _Live() as live:
        state = begin(backend, mask_BS)
        run(backend, state, backend.program.stages[:2])
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


def test_the_promised_bytes_are_those_of_the_largest_kernel(store):
    """hidden 32, inner 64, 4 heads; fused attention has one score for each pair of tokens."""
    fused, eager = TorchBackend(store, 1), TorchBackend(store, 3, "eager")
    assert fused.activation_bytes(2, 4) == 4 * 8 * (7 * 32 + 32) + (2 << 20), "the embedding"
    assert fused.activation_bytes(2, 64) == 4 * (7 * 128 * 32 + 128 * 64) + (2 << 20)
    assert eager.activation_bytes(2, 64) == 4 * (7 * 128 * 32 + 2 * 4 * 128 * 64) + 3 * (2 << 20)
    assert fused.state_bytes(2, 4) == 4 * 8 * (32 + 4)


def test_another_attention_is_refused(store):
    with pytest.raises(ValueError, match=r"attention must be one of .*'sdpa', 'eager'.* not 'flash'"):
        TorchBackend(store, 1, "flash")


def test_a_captured_store_without_its_graph_is_refused(tmp_path, monkeypatch):
    with Store(write_captured(tmp_path / "store")) as store:
        monkeypatch.setattr(store, "manifest", dataclasses.replace(store.manifest, files=()))
        with pytest.raises(StoreError, match=r"the store has no graphs/layer.json - .* - divide the model again"):
            TorchBackend(store, 1)


@pytest.mark.parametrize(
    ("memories", "most_bytes"),
    [
        ([(100, 150), (110, 150)], None),  # the process had taken more before
        ([(100, 150), (110, 180)], 80),
        ([(100, 150), (110, 180), (110, 180), (112, 183)], 83),  # counted from before the first trial
        ([(100, 150), (110, 180), (110, 180), (110, 180)], 80),
    ],
)
def test_a_trial_that_raises_the_peak_of_the_process_shows_what_it_takes(tmp_path, monkeypatch, memories, most_bytes):
    with Store(write_captured(tmp_path / "store")) as store:
        backend, found = TorchBackend(store, 1), iter(memories)
        monkeypatch.setattr(module, "is_alone", lambda backend: True)
        monkeypatch.setattr(module, "read_memory", lambda: Memory(*next(found), None, None))
        for _ in memories[::2]:
            backend.warm_up(2, 4)
        assert backend.trial_bytes(2, 4) == most_bytes
        assert backend.trial_bytes(1, 4) is None  # not tried
        assert backend.is_measured and backend.returned_bytes(2, 4) > 0
        monkeypatch.setattr(module, "is_alone", lambda backend: False)
        assert (backend.is_measured, backend.returned_bytes(2, 4), backend.trial_bytes(2, 4)) == (False, 0, None)


def test_a_trial_that_was_ended_early_shows_nothing(tmp_path, monkeypatch):
    def end(*arguments):
        raise ClaimError

    with Store(write_captured(tmp_path / "store")) as store:
        backend = TorchBackend(store, 1)
        monkeypatch.setattr(module, "is_alone", lambda backend: True)
        monkeypatch.setattr(ProgramBackend, "warm_up", end)
        backend.warm_up(2, 4)
        assert (backend.is_measured, backend.returned_bytes(2, 4), backend.trial_bytes(2, 4)) == (False, 0, None)


def test_memory_that_is_short_is_a_memory_error(store, monkeypatch):
    """PyTorch says it with a RuntimeError."""
    backend = TorchBackend(store, 1)

    def fail(**arguments):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(backend.skeletons["embedding"], "module", fail)
    with pytest.raises(MemoryError, match="allocate memory"):
        backend.warm_up(1, 4)
