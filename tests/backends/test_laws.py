"""Laws that every backend keeps. That answers are those of transformers is tested in tests/oracle.

Shapes: B rows, S tokens, T = B S.
"""

import dataclasses
import weakref

import numpy as np
import pytest

from offramp.backends import base
from offramp.errors import StoreError
from offramp.program.program import BATCH, BATCH_TOKENS, EXIT_KERNEL, Kernel, Value
from offramp.runtime.backend import State
from offramp.store import Store
from offramp.store.reader import load_tensors
from tests.backends.captured import expected, write_captured
from tests.backends.driver import BACKENDS, answer, begin, exit_answer, head_of, mask_of, opened, run, weights_of
from tests.rounding import PERMUTED_TOLERANCE

FULL, RAGGED = [4, 4, 4], [4, 1, 2]


@pytest.fixture
def store(store):
    with Store(store) as opened_store:
        yield opened_store


@pytest.fixture(params=BACKENDS)
def backend(request, store):
    return opened(request.param, store)


@pytest.fixture(scope="module")
def captured_path(tmp_path_factory):
    return write_captured(tmp_path_factory.mktemp("captured") / "store")


@pytest.fixture
def captured(captured_path):
    with Store(captured_path) as opened_store:
        yield opened_store


def replaced(store, monkeypatch, **changes):
    """The store with another program in its manifest."""
    program = dataclasses.replace(store.program, **changes)
    monkeypatch.setattr(store, "manifest", dataclasses.replace(store.manifest, program=program))
    return program


def test_a_warm_up_does_not_change_later_answers(backend, store):
    fresh = opened(backend.name, store)
    backend.warm_up(2, 8)
    backend.warm_up(1, 1)
    found, wanted = (answer(one, begin(one, mask_of(FULL))) for one in (backend, fresh))
    assert np.isfinite(found).all() and found.any()
    np.testing.assert_array_equal(found, wanted)


def test_a_warm_up_runs_every_kernel(backend, store):
    ran, kernels = set(), dict(backend.kernels)
    assert EXIT_KERNEL in kernels

    def noting(name):
        def call(state, inputs):
            ran.add(name)
            return kernels[name](state, inputs)

        return call

    backend.kernels = {name: noting(name) for name in kernels}
    backend.warm_up(2, 4)
    assert ran == set(kernels)


@pytest.mark.parametrize("lengths", [FULL, RAGGED], ids=["full", "ragged"])
def test_rows_that_leave_change_nothing_for_the_others(backend, lengths):
    begun, first, *rest = backend.program.stages
    whole, shrunk = begin(backend, mask_of(lengths)), begin(backend, mask_of(lengths))
    for state in (whole, shrunk):
        run(backend, state, [begun, first])
    backend.keep(shrunk, np.array([0, 2]))
    assert shrunk.num_rows == 2 and shrunk.length == 4
    np.testing.assert_array_equal(shrunk.mask_BS, whole.mask_BS[[0, 2]])
    for ask in (exit_answer, lambda one, state: answer(one, state, rest)):
        np.testing.assert_allclose(ask(backend, shrunk), ask(backend, whole)[[0, 2]], rtol=0, atol=1e-5)


def test_rows_are_taken_along_any_axis(backend):
    """The axes of the program say where rows are, in any place and for any number of axes."""
    axes = {"a": (2, BATCH), "b": (BATCH_TOKENS, 5), "c": (3, BATCH_TOKENS), "d": (7,), "e": (BATCH, 1, 1, 4)}
    values = {name: Value("float32", each) for name, each in axes.items()}
    arrays = {name: np.random.default_rng(0).standard_normal(value.shape(3, 4)).astype(np.float32)
              for name, value in values.items()}  # fmt: skip
    backend.values = values
    state = State(3, 4, {name: backend.wrap(array.copy()) for name, array in arrays.items()})
    state.values["e"] = None  # a mask that is not needed
    backend.keep(state, np.array([0, 2]))
    assert state.values.pop("e") is None and state.num_rows == 2
    found = {name: backend.unwrap(value) for name, value in state.values.items()}
    np.testing.assert_array_equal(found["a"], arrays["a"][:, [0, 2]])
    np.testing.assert_array_equal(found["b"], arrays["b"].reshape(3, 4, 5)[[0, 2]].reshape(8, 5))
    np.testing.assert_array_equal(found["c"], arrays["c"].reshape(3, 3, 4)[:, [0, 2]].reshape(3, 8))
    np.testing.assert_array_equal(found["d"], arrays["d"])


def test_permuting_the_rows_permutes_the_answers(backend):
    order, mask_BS = [2, 0, 1], mask_of(RAGGED)
    state = begin(backend, mask_BS)
    permuted = begin(backend, mask_BS[order])
    for name in backend.program.lookups:
        rows = backend.unwrap(state.values[name]).reshape(3, 4, -1)[order]
        permuted.values[name] = backend.wrap(np.ascontiguousarray(rows).reshape(12, -1))
    found, wanted = answer(backend, permuted), answer(backend, state)[order]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=PERMUTED_TOLERANCE[backend.name])


def test_a_value_lives_until_its_last_reader(backend):
    program = backend.program
    state = begin(backend, mask_of(RAGGED))
    assert set(state.values) == {"attention_mask", *program.lookups}, "inputs that no step reads are not kept"
    names = []
    for stage in program.stages:
        run(backend, state, [stage])
        names.append(set(state.values))
        if stage.exit is not None:
            exit_answer(backend, state)
    assert names == [{"embedding.hidden", "mask"}, {"layer.0.hidden", "mask"}, {"layer.1.hidden"}, {"logits"}]


def test_weights_that_cannot_be_written_are_taken_without_a_warning(backend, store):
    begun, first, *_ = backend.program.stages
    state, head = begin(backend, mask_of(FULL)), head_of(store)
    run(backend, state, [begun, first])
    value = first.exit
    wanted = backend.exit_logits(state, value, head)
    for array in head.values():
        array.flags.writeable = False
    np.testing.assert_array_equal(backend.exit_logits(state, value, head), wanted)


def test_a_closed_backend_runs_again(backend):
    found = []
    for _ in range(2):
        found.append(answer(backend, begin(backend, mask_of(FULL))))
        backend.close()
    np.testing.assert_array_equal(*found)


def test_logits_are_the_callers_own(backend):
    state = begin(backend, mask_of(FULL))
    first = answer(backend, state)
    first[:] = 0
    assert backend.logits(state).any()


def test_promised_bytes_grow_with_rows_tokens_and_threads(backend, store):
    assert backend.activation_bytes(1, 8) < backend.activation_bytes(2, 8) < backend.activation_bytes(2, 16)
    assert backend.state_bytes(1, 8) < backend.state_bytes(2, 8) < backend.state_bytes(2, 16)
    assert backend.state_bytes(2, 16) <= backend.activation_bytes(2, 16)
    scratch = type(backend).scratch_bytes
    backend.num_threads += 1
    assert backend.activation_bytes(2, 16) == opened(backend.name, store).activation_bytes(2, 16) + scratch


def test_a_trial_is_measured_where_the_library_serves_one_backend(backend, store, monkeypatch):
    """PyTorch is never measured: it may allocate more for other shapes."""
    monkeypatch.setattr(base, "_BACKENDS", weakref.WeakSet([backend]))  # not what tests before have left
    assert backend.is_measured == (backend.name != "torch")
    assert 0 <= backend.returned_bytes(2, 16) <= backend.activation_bytes(2, 16)
    assert (backend.returned_bytes(2, 16) == 0) == backend.keeps_buffers == (backend.name == "ort")
    other = opened(backend.name, store)
    assert not backend.is_measured and not other.is_measured
    other.close()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_template_that_it_does_not_run_is_refused(store, monkeypatch, name):
    replaced(store, monkeypatch, kernels={**store.program.kernels, "up": Kernel("mixer", {})})
    with pytest.raises(StoreError, match=f"kernel 'up' is of the template 'mixer', which backend {name} does not run"):
        opened(name, store)


@pytest.mark.parametrize("name", BACKENDS)
def test_weights_that_do_not_fit_their_kernel_are_refused(store, monkeypatch, name):
    kernel = store.program.kernels["head"]
    wide = dataclasses.replace(kernel, attributes={**kernel.attributes, "num_labels": 3})
    replaced(store, monkeypatch, kernels={**store.program.kernels, "head": wide})
    with pytest.raises(StoreError, match=r"stage head, head: out.bias is \('F32', \(2,\)\), .* \('F32', \(3,\)\)"):
        opened(name, store)


@pytest.mark.parametrize("description", [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000, b"null"])
@pytest.mark.parametrize("name", BACKENDS)
def test_exits_that_do_not_name_their_form_are_refused(store, monkeypatch, description, name):
    monkeypatch.setattr(store, "read_file", lambda file: description)
    with pytest.raises(StoreError, match=r"exits.json: .* - .* - train"):
        opened(name, store)


@pytest.mark.parametrize("form", ["1", "null", "[]", "{}", '["mean-linear"]', '"pooled"'])
@pytest.mark.parametrize("name", BACKENDS)
def test_exits_of_an_unknown_form_are_refused(store, monkeypatch, form, name):
    monkeypatch.setattr(store, "read_file", lambda file: b'{"form": %s}' % form.encode())
    with pytest.raises(StoreError, match=r"exits.json: form must be one of .*mean-linear"):
        opened(name, store)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_store_whose_stages_are_not_graphs_is_refused(store, monkeypatch, name):
    replaced(store, monkeypatch, stages=())
    with pytest.raises(StoreError, match=r"the stages of this store are not graphs - .*offramp.stream"):
        opened(name, store)


@pytest.mark.parametrize("name", ["ort", "torch"])
def test_a_captured_program_computes_what_was_captured(captured, name):
    backend, x = opened(name, captured), np.random.default_rng(1).standard_normal((3, 3, 4)).astype(np.float32)
    backend.warm_up(2, 1)
    heads = load_tensors(captured, captured.manifest.exits.heads)
    head = {"exit.weight": heads["exit.1.weight"], "exit.bias": heads["exit.1.bias"]}
    wanted_exit, wanted = expected(x)
    for kept in ([True] * 3, [True, False, True]):
        state = backend.begin({"x": x.copy()}, None, (3, 1))
        for stage in captured.program.stages:
            for step in stage.steps:
                tensors = {role: own_weight(captured, name) for role, name in step.weights.items()}
                backend.run(state, step, tensors)
            if stage.exit is not None:
                found = backend.exit_logits(state, stage.exit, head)
                np.testing.assert_allclose(found, wanted_exit, rtol=1e-6, atol=1e-6)
                backend.keep(state, np.flatnonzero(kept))
        np.testing.assert_allclose(backend.logits(state), wanted[kept], rtol=1e-6, atol=1e-6)
        assert set(state.values) == {"y"}


def own_weight(store, name):
    shard, tensor = store.manifest.tensors()[name]
    return np.frombuffer(store.read_tensor(shard.name, tensor), np.float32).reshape(tensor.shape)


@pytest.mark.parametrize("name", ["ort", "torch"])
def test_promises_of_a_captured_program_are_in_proportion_to_its_example(captured, name):
    backend = opened(name, captured, num_threads=2)
    assert backend.state_bytes(2, 1) == 1500 and backend.state_bytes(4, 1) == 3000
    assert backend.activation_bytes(2, 1) == 1500 + 2 * (8 << 20)


@pytest.mark.parametrize("name", ["ort", "torch"])
def test_inputs_that_a_captured_graph_does_not_take_are_an_error_of_the_store(captured, name):
    backend = opened(name, captured)
    state = backend.begin({"x": np.zeros((2, 3, 5), np.float32)}, None, (2, 1))
    step = captured.program.stages[1].steps[0]
    with pytest.raises(StoreError, match=r"graph 'layer' does not take these inputs: .* - divide the model with such"):
        backend.run(state, step, weights_of(captured, step))


@pytest.mark.parametrize("name", ["ort", "torch"])
def test_a_kernel_that_gives_another_number_of_values_is_refused(captured, monkeypatch, name):
    backend = opened(name, captured)
    state = backend.begin({"x": np.zeros((2, 3, 4), np.float32)}, None, (2, 1))
    step = captured.program.stages[1].steps[0]
    run_layer = backend.kernels["layer"]
    backend.kernels["layer"] = lambda state, inputs: [*run_layer(state, inputs)] * 2
    with pytest.raises(StoreError, match="kernel 'layer' gives 2 values, not 1"):
        backend.run(state, step, weights_of(captured, step))


def test_numpy_runs_no_captured_kernels(captured):
    with pytest.raises(StoreError, match=r"template 'captured', .* numpy does not run .* --backend ort or torch"):
        opened("numpy", captured)


@pytest.mark.parametrize("name", ["ort", "torch"])
def test_heads_that_a_captured_program_cannot_have_are_not_loaded(captured, monkeypatch, name):
    """They are refused where their weights are read; without exits the program runs."""
    read = captured.read_file
    description = captured.manifest.exits.description
    monkeypatch.setattr(captured, "read_file", lambda file: b'{"form": "own"}' if file is description else read(file))
    backend = opened(name, captured)
    assert EXIT_KERNEL not in backend.kernels
    backend.warm_up(2, 1)


@pytest.mark.parametrize("shape", [(3, 3, 5), (3, 4), (3, 3, 4, 1)])
@pytest.mark.parametrize("name", ["ort", "torch"])
def test_an_exit_that_would_read_a_value_of_another_shape_is_refused(captured, name, shape):
    """Sizes of captured values are those of an example, so a manifest may state others than a graph gives."""
    backend = opened(name, captured)
    state = backend.begin({"x": np.zeros((3, 3, 4), np.float32)}, None, (3, 1))
    stage = captured.program.stages[1]
    for step in stage.steps:
        backend.run(state, step, weights_of(captured, step))
    assert backend.exit_logits(state, stage.exit, head_of(captured)).shape == (3, 2)
    state.values[stage.exit] = backend.wrap(np.zeros(shape, np.float32))
    with pytest.raises(StoreError, match=r"the exit reads 'h0' of the shape .* - divide the model again"):
        backend.exit_logits(state, stage.exit, head_of(captured))
