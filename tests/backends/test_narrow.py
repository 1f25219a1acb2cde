"""Kernels with integer weights: exact products, rows that depend on no other, and answers near those of floats.

Shapes: B rows, S tokens, T = B S, K inputs, N outputs.
"""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

import offramp
from offramp.backends import numpy_narrow, onnx_templates
from offramp.backends.numpy import NumpyBackend
from offramp.errors import OfframpError
from offramp.program.narrow import (
    DEFAULTS,
    LARGEST_PAIR,
    LARGEST_WEIGHT,
    LOW_ZERO_POINT,
    hadamard,
    rotation_of,
    steps_of,
)
from offramp.program.program import Kernel
from offramp.runtime.backend import State
from offramp.store import Store
from tests.backends.driver import BACKENDS, begin, mask_of, opened, run
from tests.backends.narrow import narrowed, read_tensor, widened, write_rewritten
from tests.backends.test_numpy import UFUNC_BYTES
from tests.selection import examples

RAGGED = [4, 1, 2]
ZERO_POINTS = (DEFAULTS["zero_point"], LOW_ZERO_POINT)
MAX_INPUTS = numpy_narrow.max_inputs(127)


@pytest.fixture(scope="session")
def pair(store, tmp_path_factory):
    """A store with integers, and one with the floats that they stand for."""
    folder = tmp_path_factory.mktemp("narrow")
    with Store(store) as source:
        return [write_rewritten(source, folder / name, narrow=name == "int8") for name in ("int8", "float")]


@pytest.fixture
def narrow(pair):
    with Store(pair[0]) as opened_store:
        yield opened_store


@pytest.fixture(params=BACKENDS)
def backend(request, narrow):
    return opened(request.param, narrow)


@pytest.fixture(scope="session")
def divided(store, tmp_path_factory):
    """A store as it is written today: with rotated rows and exact inputs."""
    return offramp.divide(store, tmp_path_factory.mktemp("narrow") / "divided", dtype="int8")


@pytest.fixture(params=["plain", "rotated"])
def either(request, pair, divided):
    with Store({"plain": pair[0], "rotated": divided}[request.param]) as opened_store:
        yield opened_store


@pytest.fixture(params=BACKENDS)
def whole(request, either):
    return opened(request.param, either)


def linear(backend, x_TK, weight_KN, scale_N=None, bias_N=None, more=None, **settings):
    """The linear layer of a block; `more`: other parts of its weights."""
    (num_inputs, num_outputs), num_tokens = weight_KN.shape, len(x_TK)
    sizes = {"rows": "batch*tokens", "num_inputs": num_inputs, "most_outputs": num_outputs, "activation": None}
    weights = {
        "weight": weight_KN.astype(np.int8),
        "scale": np.ones(num_outputs, np.float32) if scale_N is None else scale_N,
        "bias": np.zeros(num_outputs, np.float32) if bias_N is None else bias_N,
        **(more or {}),
    }
    inputs = {"x": x_TK.astype(np.float32), **{f"product.{part}": array for part, array in weights.items()}}
    kernel = backend.load("product", Kernel("product-int8", {**sizes, **settings}))
    (result,) = kernel(State(1, num_tokens, {}), {name: backend.wrap(array) for name, array in inputs.items()})
    return np.array(backend.unwrap(result))


def assert_exact(backend, integers_TK, weight_KN, zero):
    """Rows with the largest or the smallest integer have the scale 1, so that results are accumulators."""
    below, above = steps_of({"zero_point": zero})
    assert ((integers_TK.max(axis=1) == above) | (integers_TK.min(axis=1) == -below)).all()
    wanted_TN = integers_TK.astype(np.int64) @ weight_KN.astype(np.int64)
    assert_array_equal(linear(backend, integers_TK, weight_KN, zero_point=zero), wanted_TN.astype(np.float32))


@pytest.mark.parametrize("zero", ZERO_POINTS)
@pytest.mark.parametrize("num_inputs", [1, 2, 3, 64, 65, MAX_INPUTS, MAX_INPUTS + 1, 3072])
def test_products_of_the_largest_integers_are_exact(backend, num_inputs, zero):
    is_second_K, (below, above) = np.arange(num_inputs) % 2, steps_of({"zero_point": zero})
    firsts_N = np.array([LARGEST_PAIR // 2, LARGEST_WEIGHT, LARGEST_PAIR - LARGEST_WEIGHT])
    weight_KN = np.where(is_second_K[:, None], LARGEST_PAIR - firsts_N, firsts_N)
    for integer in (above, -below):
        assert_exact(backend, np.full((3, num_inputs), integer), weight_KN, zero)
        assert_exact(backend, np.full((3, num_inputs), integer), -weight_KN, zero)
    rows_TK = np.where(is_second_K, [[above], [-below]], [[-below], [above]])
    assert_exact(backend, rows_TK, np.where(is_second_K, 1, -1)[:, None] * weight_KN, zero)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 400), st.integers(1, 40), st.sampled_from(ZERO_POINTS), st.integers(0, 1 << 30)
)
@pytest.mark.parametrize("name", BACKENDS)
def test_products_of_any_integers_are_exact(pair, name, num_tokens, num_inputs, num_outputs, zero, seed):
    rng, (below, above) = np.random.default_rng(seed), steps_of({"zero_point": zero})
    integers_TK = rng.integers(-below, above + 1, (num_tokens, num_inputs))
    integers_TK[:, rng.integers(num_inputs)] = above
    weight_KN = rng.integers(-LARGEST_WEIGHT, LARGEST_WEIGHT + 1, (num_inputs, num_outputs))
    room_KN = LARGEST_PAIR - np.abs(weight_KN[: num_inputs // 2 * 2 : 2])
    weight_KN[1::2] = np.clip(weight_KN[1::2], -room_KN, room_KN)
    with Store(pair[0]) as store:
        assert_exact(opened(name, store), integers_TK, weight_KN, zero)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 70), st.integers(1, 9), st.floats(1e-25, 1e25), st.integers(0, 1 << 30))
@pytest.mark.parametrize("name", BACKENDS)
def test_a_layer_is_near_its_formula(pair, name, num_inputs, num_outputs, magnitude, seed):
    """Rounding a row to 127 steps errs by half a step at most, for each input."""
    rng = np.random.default_rng(seed)
    x_TK = (rng.standard_normal((3, num_inputs)) * magnitude).astype(np.float32)
    weight_NK = rng.standard_normal((num_outputs, num_inputs)).astype(np.float32)
    bias_N = (rng.standard_normal(num_outputs) * magnitude).astype(np.float32)
    integers_KN, scale_N = narrowed(weight_NK)
    with Store(pair[0]) as store:
        found = linear(opened(name, store), x_TK, integers_KN, scale_N, bias_N)
    half_step_T1 = np.abs(x_TK).max(axis=1, keepdims=True) / 127 / 2
    bound_TN = half_step_T1 * np.abs(widened(weight_NK)).sum(axis=1) * 1.01 + magnitude * num_inputs * 1e-5
    assert (np.abs(found - (x_TK.astype(np.float64) @ widened(weight_NK).T + bias_N)) <= bound_TN).all()


@settings(max_examples=examples(25), deadline=None)
@given(
    st.integers(1, 5), st.sampled_from([1, 2, 8, 64]), st.integers(1, 3), st.integers(0, 4),
    st.sampled_from(ZERO_POINTS), st.integers(0, 1 << 30),
)  # fmt: skip
@pytest.mark.parametrize("name", BACKENDS)
def test_rotated_rows_and_exact_inputs_add_up(pair, name, num_tokens, rotation, parts, exact, zero, seed):
    rng = np.random.default_rng(seed)
    num_inputs, num_outputs = rotation * parts, 7
    x_TK = rng.standard_normal((num_tokens, num_inputs)).astype(np.float32)
    x_TK[:, rng.integers(num_inputs)] *= 50
    weight_KN, scale_N = rng.integers(-64, 65, (num_inputs, num_outputs)), rng.random(num_outputs).astype(np.float32)
    bias_N, channels = rng.standard_normal(num_outputs).astype(np.float32), rng.permutation(num_inputs)[:exact]
    exact_KN = rng.standard_normal((len(channels), num_outputs)).astype(np.float32) * 100
    more, named = ({"exact": exact_KN, "channels": channels}, {"exact": len(channels)}) if exact else ({}, {})
    with Store(pair[0]) as store:
        backend = opened(name, store)
        named |= {"rotation": rotation, "zero_point": zero}
        found_TN = linear(backend, x_TK, weight_KN, scale_N, bias_N, more, **named)
    turned_TK = (x_TK.reshape(-1, rotation).astype(float) @ np.array(hadamard(rotation))).reshape(x_TK.shape)
    wanted_TN = turned_TK @ (weight_KN * scale_N.astype(float)) + turned_TK[:, channels] @ exact_KN + bias_N
    below, above = steps_of({"zero_point": zero})
    step_T1 = np.maximum(turned_TK.max(axis=1) / above, -turned_TK.min(axis=1) / below)[:, None]
    bound_TN = step_T1 / 2 * (np.abs(weight_KN) * scale_N).sum(axis=0) * 1.01
    assert (np.abs(found_TN - wanted_TN) <= bound_TN + 1e-4 * np.abs(turned_TK).max() * 100).all()


def test_rows_and_channels_of_zeros_give_the_bias(backend):
    rng = np.random.default_rng(0)
    x_TK, bias_N = rng.standard_normal((4, 8)), rng.standard_normal(6).astype(np.float32)
    x_TK[1] = 0
    weight_NK = rng.standard_normal((6, 8)).astype(np.float32)
    weight_NK[2] = 0
    integers_KN, scale_N = narrowed(weight_NK)
    assert scale_N[2] == 0 and not integers_KN[:, 2].any()
    for scale in (0, 1):
        scale_N[2] = scale
        found = linear(backend, x_TK, integers_KN, scale_N, bias_N)
        assert np.isfinite(found).all()
        assert_array_equal(found[1], bias_N)
        assert_array_equal(found[:, 2], np.full(4, bias_N[2]))
        assert_array_equal(linear(backend, x_TK * 0, integers_KN, scale_N, bias_N), np.tile(bias_N, (4, 1)))


def test_backends_quantise_alike(narrow):
    """From equal values, equal integers and scales: halves are rounded to even by all."""
    halves = np.array([[127, *np.arange(-5, 6) / 2]], np.float32)
    x_TK = np.concatenate([halves, halves * np.float32(0.3), np.random.default_rng(0).standard_normal((64, 12)) * 5])
    found = [linear(opened(name, narrow), x_TK, np.eye(12) * LARGEST_PAIR // 2) for name in BACKENDS]
    for other in found[1:]:
        assert_array_equal(other, found[0])


def layers_of(backend, rows_BSE, mask_BS, keep=None):
    """The value [B, S, H] after the last layer, of looked-up rows; `keep`: rows that stay after the first layer."""
    state = begin(backend, mask_BS)
    for name in backend.program.lookups:
        state.values[name] = backend.wrap(np.ascontiguousarray(rows_BSE.reshape(-1, rows_BSE.shape[-1])))
    begun, first, *rest, _head = backend.program.stages
    run(backend, state, [begun, first])
    if keep is not None:
        backend.keep(state, np.array(keep))
    run(backend, state, rest)
    (value,) = (state.values[name] for name in rest[-1].steps[-1].writes)
    return np.array(backend.unwrap(value)).reshape(state.num_rows, mask_BS.shape[1], -1)


@pytest.mark.parametrize("lengths", [[4, 4, 4], RAGGED], ids=["full", "ragged"])
def test_rows_do_not_depend_on_batch_companions(whole, lengths):
    """A row alone, in a batch, among those that are kept, and among strangers 1000 times as large: equal bits."""
    mask_BS, rng = mask_of(lengths), np.random.default_rng(0)
    rows_BSE = rng.standard_normal((3, 4, 32)).astype(np.float32)
    wanted = layers_of(whole, rows_BSE, mask_BS)
    assert wanted.any() and np.isfinite(wanted).all()
    assert_array_equal(layers_of(whole, rows_BSE, mask_BS, keep=[0, 2]), wanted[[0, 2]])
    for row in range(3):
        strangers = rows_BSE * np.float32(1000)
        strangers[row] = rows_BSE[row]
        assert_array_equal(layers_of(whole, strangers, mask_BS)[row], wanted[row])
        mask_1S = mask_BS[row : row + 1]
        if mask_1S.all() == mask_BS.all() or whole.name == "ort":  # other backends leave out a mask of ones
            assert_array_equal(layers_of(whole, rows_BSE[row : row + 1], mask_1S)[0], wanted[row])


@pytest.mark.parametrize("num_inputs", [32, 64, 96, 312, 384])
def test_rotated_rows_do_not_depend_on_their_number(backend, num_inputs):
    rng, rotation = np.random.default_rng(0), rotation_of(num_inputs)
    x_TK, weight_KN = rng.standard_normal((40, num_inputs)), rng.integers(-64, 65, (num_inputs, 16))
    wanted_TN = linear(backend, x_TK, weight_KN, rotation=rotation)
    for num_rows in (2, 3, 5, 7, 33):
        assert_array_equal(
            linear(backend, x_TK[3 : 3 + num_rows], weight_KN, rotation=rotation), wanted_TN[3:][:num_rows]
        )


def test_padding_changes_no_more_than_the_order_of_sums(whole):
    """Attention adds over more tokens, whose weights are 0; integers of rows may then differ by 1."""
    rows_BSE = np.random.default_rng(0).standard_normal((2, 9, 32)).astype(np.float32)
    short = layers_of(whole, rows_BSE[:1, :4], mask_of([4]))
    padded = layers_of(whole, rows_BSE, mask_of([4, 9]))[:1, :4]
    assert_allclose(padded, short, rtol=0, atol=0.02 * np.abs(short).max())


def logits_of(name, path, *, lengths=RAGGED):
    """The logits of an exit and of the head, with the store's own weights."""
    with Store(path) as store:
        backend = opened(name, store)
        state = begin(backend, mask_of(lengths))
        for stage in backend.program.stages:
            for step in stage.steps:
                backend.run(state, step, {role: read_tensor(store, tensor) for role, tensor in step.weights.items()})
        return backend.logits(state)


def test_answers_are_near_those_of_floats_and_of_other_backends(pair):
    """The weights are those of the integers in both stores, so that only the rounding of rows differs."""
    floats = logits_of("numpy", pair[1])
    found = {name: logits_of(name, pair[0]) for name in BACKENDS}
    for answers in found.values():
        assert_allclose(answers, floats, rtol=0, atol=0.05 * np.abs(floats).max())
        assert (answers.argmax(1) == floats.argmax(1)).all()
        assert_allclose(answers, found["numpy"], rtol=0, atol=0.02 * np.abs(floats).max())


def test_answers_of_a_divided_store_are_near_those_of_its_source(store, divided):
    floats = logits_of("numpy", store)
    found = {name: logits_of(name, divided) for name in BACKENDS}
    for answers in found.values():
        assert_allclose(answers, floats, rtol=0, atol=0.1 * np.abs(floats).max())
        assert_allclose(answers, found["numpy"], rtol=0, atol=0.02 * np.abs(floats).max())


def test_a_runtime_without_the_operator_is_named(narrow, monkeypatch):
    monkeypatch.setattr(onnx_templates, "INTEGER_PRODUCT", "MatMulOfAnotherTime")
    message = r"ONNX Runtime [\d.]+ has no operator MatMulOfAnotherTime, .* - .* - .*--backend numpy"
    with pytest.raises(OfframpError, match=message):
        opened("ort", narrow)


@pytest.mark.parametrize(("num_rows", "length"), [(8, 16), (2, 256)])
def test_the_promised_bytes_hold_all_arrays_of_a_pass(either, num_rows, length):
    mask_BS = np.ones((num_rows, length), np.int64)
    backend = NumpyBackend(either, 1)
    promised_bytes = backend.returned_bytes(num_rows, length) + UFUNC_BYTES
    run(backend, begin(backend, mask_BS), either.program.stages)  # imports and caches
    tracemalloc.start()
    try:
        run(backend, begin(backend, mask_BS), either.program.stages)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert promised_bytes / 4 < peak_bytes <= promised_bytes
