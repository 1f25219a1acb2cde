"""Promises of the NumPy backend alone; those of every backend are in test_laws.

Shapes: B rows, S tokens.
"""

import ctypes
import math
import tracemalloc

import numpy as np
import pytest
import torch
from scipy.special import erf

from offramp.backends import THREAD_VARIABLES
from offramp.backends import numpy as kernels
from offramp.backends.numpy import ACTIVATIONS, BLOCK, NumpyBackend, gelu, set_blas_threads
from offramp.backends.torch_modules import ACTIVATIONS as TORCH_ACTIVATIONS
from offramp.program.encoder import ACTIVATIONS as NAMES
from offramp.program.heads import FORMS
from offramp.runtime.backend import State
from offramp.store import Store
from tests.backends.driver import begin, mask_of, run


@pytest.fixture
def store(store):
    with Store(store) as opened:
        yield opened


def test_gelu_is_good_to_1e_6():
    x = np.linspace(-12, 12, 1_000_001).astype(np.float32)
    exact = x.astype(np.float64)
    exact = exact * (1 + erf(exact / math.sqrt(2))) / 2
    found = x.copy()
    gelu(found)
    assert np.abs(found - exact).max() < 4e-7


def test_gelu_of_any_number_is_finite():
    limit = np.finfo(np.float32).max
    x = np.array([0, -0.0, 1e-45, -1e-45, 20, -20, 1e4, -1e4, limit / 4, -limit / 4], np.float32)
    found = x.copy()
    with np.errstate(over="ignore"):  # the square of a number above 1e19
        gelu(found)
    np.testing.assert_allclose(found, np.maximum(x, 0), rtol=0, atol=1e-44)


@pytest.mark.parametrize("name", NAMES)
def test_activations_are_those_of_torch(name):
    x = np.concatenate([np.linspace(-30, 30, 100_001), [-1e4, 1e4]]).astype(np.float32)
    found = x.copy()
    ACTIVATIONS[name](found)
    wanted = TORCH_ACTIVATIONS[name](torch.from_numpy(x).double()).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_blocks_change_no_bit(size):
    x = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    whole, blocks = x.copy(), x.copy()
    gelu(whole)
    assert kernels._activate(blocks, "gelu") is blocks
    np.testing.assert_array_equal(blocks, whole)


@pytest.mark.parametrize("form", FORMS)
def test_an_exit_of_every_form_is_its_formula(form):
    rng, (rows, length, hidden, labels) = np.random.default_rng(0), (3, 4, 8, 2)
    mask_BS, hidden_BSH = mask_of([4, 1, 2]), rng.standard_normal((rows, length, hidden))
    inputs = {role: rng.standard_normal(shape) for role, shape in FORMS[form].shapes(hidden, labels).items()}
    pooled = hidden_BSH[:, 0]
    if FORMS[form].pool == "mean":
        pooled = np.stack([row[: int(mask.sum())].mean(0) for row, mask in zip(hidden_BSH, mask_BS, strict=True)])
    if FORMS[form].depth == 2:
        pooled = np.tanh(pooled @ inputs["exit.dense.weight"].T + inputs["exit.dense.bias"])
    last = "exit" if FORMS[form].depth == 1 else "exit.out"
    wanted = pooled @ inputs[last + ".weight"].T + inputs[last + ".bias"]
    narrow = {role: array.astype(np.float32) for role, array in inputs.items()}
    narrow["hidden"] = hidden_BSH.reshape(-1, hidden).astype(np.float32)
    (found,) = kernels._exit({"activation": "tanh"}, FORMS[form], State(rows, length, {}, mask_BS), narrow)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("num_rows", "length"), [(8, 16), (64, 16), (2, 256), (1, 512)])
def test_the_promised_bytes_hold_all_arrays_of_a_pass(store, num_rows, length):
    mask_BS = np.ones((num_rows, length), np.int64)
    mask_BS[-1, 1:] = 0
    backend = NumpyBackend(store, 1)
    promised_bytes = backend.returned_bytes(num_rows, length) + UFUNC_BYTES
    run(backend, begin(backend, mask_BS), store.program.stages)  # imports and caches
    tracemalloc.start()
    try:
        state = begin(backend, mask_BS)
        before = tracemalloc.get_traced_memory()[0]
        run(backend, state, store.program.stages)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert before < peak_bytes
    assert promised_bytes / 4 < peak_bytes - WEIGHT_BYTES <= promised_bytes


UFUNC_BYTES = 64 << 10
"""Buffers of 8192 elements for each operand of a reduction; they are part of `scratch_bytes`."""
WEIGHT_BYTES = 4 * 4 * 32 * 33
"""Those of the largest step of `tests.division.tiny`, which the test makes anew."""


def test_the_threads_of_a_backend_are_those_of_the_library(store):
    """Whatever it was asked for, and whatever other code has set since."""
    assert NumpyBackend(store, 1).num_threads == 1
    backend = NumpyBackend(store, 2)
    if kernels._thread_functions() is not None:
        assert backend.num_threads == 2
    set_blas_threads(1)
    begin(backend, mask_of([4]))
    assert set_blas_threads(backend.num_threads) == backend.num_threads


@pytest.mark.parametrize(("value", "expected"), [("3", 3), ("", 1), ("many", 1)])
def test_without_a_function_of_the_library_the_environment_counts(monkeypatch, value, expected):
    for name in THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    kernels._thread_functions.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda path: object())
    try:
        assert set_blas_threads(5) == expected
    finally:
        kernels._thread_functions.cache_clear()
