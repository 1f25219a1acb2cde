"""Drives a backend through a program without an engine. Weights are random where a test does not give a store's own.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

import numpy as np

from offramp.backends import open_backend
from offramp.program.narrow import INDEX, INTEGER, LARGEST_PAIR
from offramp.program.program import ATTENTION_MASK, EXIT_KERNEL
from offramp.store.exits import read_exits

BACKENDS = ("ort", "torch", "numpy")


def opened(name, store, num_threads=1):
    return open_backend(name, store, num_threads)


def mask_of(lengths):
    """The mask [B, S] of rows of these many tokens."""
    return (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)


def begin(backend, mask_BS, seed=1):
    """A state whose looked-up rows are random."""
    program, rng = backend.program, np.random.default_rng(seed)
    arrays = {name: np.zeros(mask_BS.shape, np.int64) for name in program.inputs}
    arrays[ATTENTION_MASK] = mask_BS
    for name, lookup in program.lookups.items():
        arrays[name] = rng.standard_normal(lookup.value.shape(*mask_BS.shape)).astype(np.float32)
    return backend.begin(arrays, mask_BS, mask_BS.shape)


def weights_of(store, step, seed=0):
    """Random weights that fit a step: kernel input -> array."""
    rng, tensors = np.random.default_rng(seed), store.manifest.tensors()
    return {role: _random_weight(rng, role, tensors[name][1]) for role, name in step.weights.items()}


def _random_weight(rng, role, tensor):
    if tensor.dtype == INTEGER:
        return rng.integers(-LARGEST_PAIR // 2, LARGEST_PAIR // 2 + 1, tensor.shape).astype(np.int8)
    if tensor.dtype == INDEX:
        return rng.integers(0, 16, tensor.shape)
    array = random_array(rng, tensor.shape)
    return abs(array) / LARGEST_PAIR if role.endswith(".scale") else array


def random_array(rng, shape):
    return rng.standard_normal(shape).astype(np.float32) / 8


def head_of(store, seed=0):
    """Random weights of an exit head."""
    program, rng = store.program, np.random.default_rng(seed)
    width = program.values()[program.layers[0].exit].width
    shapes = read_exits(store).form.shapes(width, program.output.num_labels)
    return {role: random_array(rng, shape) for role, shape in shapes.items()}


def run(backend, state, stages):
    """Run the steps of some stages."""
    for stage in stages:
        for step in stage.steps:
            backend.run(state, step, weights_of(backend.store, step))


def answer(backend, state, stages=None):
    """The logits after all stages, or those given."""
    run(backend, state, backend.program.stages if stages is None else stages)
    return backend.logits(state)


def exit_answer(backend, state, layer=0):
    """The logits of the exit after a layer, from 0."""
    value = backend.program.layers[layer].exit
    assert EXIT_KERNEL in backend.program.kernels
    return backend.exit_logits(state, value, head_of(backend.store))
