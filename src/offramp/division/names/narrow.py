"""Conversion of a checkpoint's floats to the dtypes of a store: F32, F16, and int8 with a scale per output channel.

Shapes: N items of a chunk, R rows of a chunk, O outputs, I inputs of a matrix.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from offramp.checkpoints.families import shown
from offramp.checkpoints.source import MAKER
from offramp.errors import SourceError
from offramp.program.dtypes import FLOAT, HALF
from offramp.program.narrow import LARGEST_WEIGHT
from offramp.store.manifest import FP32, INT8

MARK: dict[str, Any] = {MAKER: INT8}
"""`quantization_config` of an int8 store: transformers raises an error for one without a method that it knows."""
WEIGHT, SCALE = ".weight", ".scale"
"""Endings of the roles of a matrix and of the scales of its integers."""
_PREFIX = "offramp-int8."
_NAN = "get the model again, or train it again: no input has an answer"


def floats(dtype: str, chunks: Iterable[bytes | memoryview]) -> Iterator[np.ndarray]:
    """Yield chunks [N] as float32: F16 and BF16 exactly, F64 rounded."""
    for chunk in chunks:
        if dtype == "BF16":  # the upper half of a float32
            yield (np.frombuffer(chunk, np.uint16).astype(np.uint32) << 16).view(np.float32)
        elif dtype == "F64":
            with np.errstate(over="ignore"):
                yield np.frombuffer(chunk, np.float64).astype(np.float32)
        else:
            yield np.frombuffer(chunk, np.float16 if dtype == HALF else np.float32).astype(np.float32, copy=False)


def stored(name: str, chunks_N: Iterable[np.ndarray], dtype: str, where: object) -> Iterator[memoryview]:
    """Yield finite float32 numbers as data of F32 or F16, rounded to the nearest, to even where two are as near.

    Raises SourceError that names the tensor for NaN, infinite numbers, and numbers beyond the range of F16.
    """
    for chunk_N in chunks_N:
        require_finite(name, chunk_N, where)
        if dtype == FLOAT:
            yield chunk_N.data.cast("B")
            continue
        with np.errstate(over="ignore"):
            halves_N = chunk_N.astype(np.float16)
        if not np.isfinite(halves_N).all():
            what = f"tensor {shown(name)} has the value {np.abs(chunk_N).max():.6g}, the largest of {HALF} is 65504"
            raise SourceError(what, where, f"store it with --dtype {FP32}")
        yield halves_N.data.cast("B")


def require_finite(name: str, values: np.ndarray, where: object) -> None:
    """Raise SourceError that names a tensor with NaN or infinite numbers."""
    if not np.isfinite(values).all():
        raise SourceError(f"tensor {shown(name)} has NaN or infinite numbers", where, _NAN)


def stored_name(name: str, role: str) -> str:
    """Return the name in an int8 store of the tensor `name`, or of its scales: no model of transformers has it."""
    return _PREFIX + name + (SCALE if role.endswith(SCALE) else "")


class Quantised(NamedTuple):
    """A matrix as integers with a scale for each output."""

    integers_OI: np.ndarray
    scale_O: np.ndarray

    def transposed(self, chunk_bytes: int) -> Iterator[memoryview]:
        """Yield the integers as they are stored, [I, O]."""
        rows = max(chunk_bytes // max(len(self.integers_OI), 1), 1)
        for start in range(0, self.integers_OI.shape[1], rows):
            yield np.ascontiguousarray(self.integers_OI[:, start : start + rows].T).data.cast("B")


def quantise(name: str, chunks_N: Iterable[np.ndarray], shape: tuple[int, ...], where: object) -> Quantised:
    """Return a matrix as integers: the largest weight of each output becomes LARGEST_WEIGHT, others are rounded.

    An output whose weights are all zero has the scale 0. Raises SourceError that names a matrix with NaN or infinite
    numbers.
    """
    found, start = Quantised(np.empty(shape, np.int8), np.empty(shape[0], np.float32)), 0
    for rows_RI in _rows(chunks_N, shape[1]):
        require_finite(name, rows_RI, where)
        part = slice(start, start := start + len(rows_RI))
        scale_R = np.abs(rows_RI).max(axis=1, initial=0) / np.float32(LARGEST_WEIGHT)
        divisor_R = np.where(scale_R > 0, scale_R, np.float32(np.inf))  # weights of a zero scale become 0
        integers_RI = np.rint(rows_RI / divisor_R[:, None])
        found.integers_OI[part] = np.clip(integers_RI, -LARGEST_WEIGHT, LARGEST_WEIGHT)
        found.scale_O[part] = scale_R
    return found


def _rows(chunks_N: Iterable[np.ndarray], width: int) -> Iterator[np.ndarray]:
    """Yield the data of a matrix in whole rows [R, width]."""
    rest_N = np.empty(0, np.float32)
    for chunk_N in chunks_N:
        data_N = np.concatenate([rest_N, chunk_N]) if len(rest_N) else chunk_N
        whole = len(data_N) // width * width
        if whole:
            yield data_N[:whole].reshape(-1, width)
        rest_N = data_N[whole:].copy()
