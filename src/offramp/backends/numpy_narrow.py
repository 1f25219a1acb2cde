"""Products of quantised rows and integer weights in NumPy: float32 products over blocks that keep every sum exact.

NumPy multiplies integers without a BLAS, 50 times as slowly. A float32 holds every integer up to 2^24, so that a BLAS
is exact, in whatever order it adds, while the magnitudes of all products of a sum stay below that together.

Shapes: T tokens, K inputs, N outputs, E exact inputs.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Callable, Mapping, Tuple

import numpy as np

from offramp.program.narrow import EXACT, LARGEST_PAIR, LEAST_MAGNITUDE, ROTATION, hadamard, option, steps_of

BLOCK_ELEMENTS = 1 << 18
"""Weights that are converted to float32 at a time (1 MiB), so that they stay in the cache of a core."""


def max_inputs(above: int) -> int:
    """Return the most products whose sum is exact in float32, of integers of activations up to `above` (127: 2064)."""
    return (1 << 24) // (above * LARGEST_PAIR) * 2


def quantise(x_TK: np.ndarray, below: int, above: int) -> Tuple[np.ndarray, np.ndarray]:
    """Return the integers [T, K] of each row as float32, from -below to above, and the scales [T, 1]."""
    lowest_T1 = x_TK.min(axis=1, keepdims=True) * np.float32(-above / below)
    magnitude_T1 = np.maximum(x_TK.max(axis=1, keepdims=True), lowest_T1)
    scale_T1 = np.maximum(magnitude_T1, np.float32(LEAST_MAGNITUDE)) / np.float32(above)
    integers_TK = x_TK / scale_T1
    return np.rint(integers_TK, out=integers_TK), scale_T1


def multiply(integers_TK: np.ndarray, weight_KN: np.ndarray, above: int) -> np.ndarray:
    """Return the products [T, N], rounded to float32 once, of integers whose magnitudes are up to `above`."""
    depth, width = _block(weight_KN.shape[0], weight_KN.shape[1], above)
    out_TN = np.empty((len(integers_TK), weight_KN.shape[1]), np.float32)
    for first in range(0, weight_KN.shape[1], width):
        columns = slice(first, first + width)
        if weight_KN.shape[0] <= depth:
            np.matmul(integers_TK, weight_KN[:, columns].astype(np.float32), out=out_TN[:, columns])
        else:
            out_TN[:, columns] = _sum_blocks(integers_TK, weight_KN[:, columns], depth)
    return out_TN


def _sum_blocks(integers_TK: np.ndarray, weight_KN: np.ndarray, depth: int) -> np.ndarray:
    total_TN = np.zeros((len(integers_TK), weight_KN.shape[1]), np.int32)
    for first in range(0, weight_KN.shape[0], depth):
        rows = slice(first, first + depth)
        total_TN += np.matmul(integers_TK[:, rows], weight_KN[rows].astype(np.float32)).astype(np.int32)
    return total_TN


def _block(num_inputs: int, num_outputs: int, above: int) -> Tuple[int, int]:
    """Return the most inputs and outputs that one product takes, in blocks of equal depth."""
    depth = math.ceil(num_inputs / math.ceil(num_inputs / max_inputs(above)))
    depth += depth % 2  # whole pairs of neighbours
    return depth, min(max(BLOCK_ELEMENTS // depth, 1), num_outputs)


def num_temporary(tokens: int, num_inputs: int, num_outputs: int, sizes: Mapping[str, Any]) -> int:
    """Return the elements of the temporary arrays of a linear layer of a kernel with these attributes.

    They are integers and scales of the rows, before that rotated rows, exact inputs and their products, a block of
    weights, and its sums three times where there are several blocks of inputs.
    """
    depth, width = _block(num_inputs, num_outputs, steps_of(sizes)[1])
    exact, is_rotated = option(sizes, EXACT), option(sizes, ROTATION) > 1
    more = num_inputs * is_rotated + (exact + num_outputs) * (exact > 0)
    return tokens * (num_inputs + 2 + more) + depth * width + (3 * tokens * width if depth < num_inputs else 0)


def integers(x_TK: np.ndarray, inputs: Mapping[str, Any], sizes: Mapping[str, Any]) -> Callable[[str], np.ndarray]:
    """Rotate the rows of x, and quantise them, as the attributes of a kernel say.

    Returns a function of a role that multiplies them by its weights, and adds its bias and its exact inputs.
    """
    rotation, (below, above) = option(sizes, ROTATION), steps_of(sizes)
    if rotation > 1:  # a product for each row: the bits of one for all rows depend on their number
        x_TK = np.matmul(x_TK.reshape(len(x_TK), -1, rotation), _rotation(rotation)).reshape(x_TK.shape)
    integers_TK, scale_T1 = quantise(x_TK, below, above)

    def linear(role: str) -> np.ndarray:
        out_TN = multiply(integers_TK, inputs[role + ".weight"], above)
        out_TN *= inputs[role + ".scale"]
        out_TN *= scale_T1
        out_TN += inputs[role + ".bias"]
        if role + ".exact" in inputs:
            chosen_TE = np.take(x_TK, inputs[role + ".channels"], axis=1, mode="clip")
            for exact, weight_N in enumerate(inputs[role + ".exact"]):
                out_TN += chosen_TE[:, exact : exact + 1] * weight_N
        return out_TN

    return linear


@lru_cache(maxsize=None)
def _rotation(size: int) -> np.ndarray:
    return np.array(hadamard(size), np.float32)
