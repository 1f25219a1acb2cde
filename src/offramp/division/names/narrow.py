"""Conversion of a checkpoint's floats to the dtypes of a store: F32, F16, and int8 with a scale per output channel.

Shapes: N items of a chunk, R rows of a chunk, O outputs, I inputs of a matrix, K exact inputs.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from offramp.checkpoints.families import shown
from offramp.checkpoints.source import MAKER
from offramp.errors import SourceError
from offramp.program.dtypes import FLOAT, HALF
from offramp.program.narrow import LARGEST_PAIR, LARGEST_WEIGHT, SCALE, hadamard
from offramp.store.manifest import FP32, INT8

MARK: dict[str, Any] = {MAKER: INT8}
"""`quantization_config` of an int8 store: transformers raises an error for one without a method that it knows."""
WEIGHT = ".weight"
"""Ending of the role of a matrix."""
MADE = (SCALE, ".exact", ".channels")
"""Endings of the roles of tensors that are derived from a matrix, in addition to its integers."""
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


def matrix_of(role: str) -> str:
    """Return the role of the matrix from which a tensor of this role is derived, or the role itself."""
    return next((role.removesuffix(end) + WEIGHT for end in MADE if role.endswith(end)), role)


def stored_name(name: str, role: str) -> str:
    """Return the name in an int8 store of a tensor, or of one derived from it: no model of transformers has it."""
    return _PREFIX + name + next((end for end in MADE if role.endswith(end)), "")


class Quantised(NamedTuple):
    """A matrix as integers with a scale for each output, and the weights of its exact inputs."""

    integers_OI: np.ndarray
    scale_O: np.ndarray
    exact_KO: np.ndarray
    channels_K: np.ndarray

    def data(self, role: str, chunk_bytes: int) -> Iterator[memoryview]:
        """Yield a tensor as it is stored; integers are [I, O]."""
        if not role.endswith(WEIGHT):
            wanted = {SCALE: self.scale_O, ".exact": self.exact_KO, ".channels": self.channels_K}
            yield wanted[role[role.rindex(".") :]].data.cast("B")
            return
        rows = max(chunk_bytes // max(len(self.integers_OI), 1), 1)
        for start in range(0, self.integers_OI.shape[1], rows):
            yield np.ascontiguousarray(self.integers_OI[:, start : start + rows].T).data.cast("B")


def exact_inputs(chunks_N: Iterable[np.ndarray], width: int, number: int) -> np.ndarray:
    """Return the inputs [K] of a matrix with the largest absolute weights, ascending; the first of equals.

    A single one makes the scale of its output too coarse for all others.
    """
    if not number:
        return np.empty(0, np.int64)
    largest_I = np.zeros(width, np.float32)
    for rows_RI in _rows(chunks_N, width):
        np.maximum(largest_I, np.abs(rows_RI).max(axis=0, initial=0), out=largest_I)
    return np.sort(np.argsort(-largest_I, kind="stable")[:number])


def quantise(
    name: str, chunks_N: Iterable[np.ndarray], shape: tuple[int, ...], where: object, rotation: int, exact_K: np.ndarray
) -> Quantised:
    """Return a matrix as integers for rotated rows: those of an output are as large as its largest pair of neighbours
    allows, others are rounded. Integers of exact inputs are 0.

    An output whose weights are all zero has the scale 0. Raises SourceError that names a matrix with NaN or infinite
    numbers, or with numbers that are too large to be rotated.
    """
    exact_KO = np.empty((len(exact_K), shape[0]), np.float32)
    found = Quantised(np.empty(shape, np.int8), np.empty(shape[0], np.float32), exact_KO, exact_K)
    turn, start = np.array(hadamard(rotation), np.float32), 0
    for read_RI in _rows(chunks_N, shape[1]):
        require_finite(name, read_RI, where)
        part = slice(start, start := start + len(read_RI))
        rows_RI = read_RI.copy() if rotation == 1 else _rotated(read_RI, turn)
        if not np.isfinite(rows_RI).all():
            what = f"tensor {shown(name)} has values up to {np.abs(read_RI).max():.6g}, whose sums are beyond {FLOAT}"
            raise SourceError(what, where, f"store it with --dtype {FP32}")
        exact_KO[:, part] = rows_RI[:, exact_K].T
        rows_RI[:, exact_K] = 0
        found.integers_OI[part], found.scale_O[part] = _integers(rows_RI)
    return found


def _rotated(rows_RI: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Return rotated rows, by a product for each row: the bits of one for all rows depend on their number."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.matmul(rows_RI.reshape(len(rows_RI), -1, len(turn)), turn).reshape(rows_RI.shape)


def _integers(rows_RI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rows as integers and scales [R]."""
    pairs_R2I = np.zeros((len(rows_RI), -(-rows_RI.shape[1] // 2), 2), np.float32)
    pairs_R2I.reshape(len(rows_RI), -1)[:, : rows_RI.shape[1]] = rows_RI
    largest_R = np.abs(pairs_R2I).sum(axis=2, dtype=np.float64).max(axis=1, initial=0)
    scale_R = (largest_R / (LARGEST_PAIR - 1)).astype(np.float32)  # rounding two neighbours adds 1 at most
    divisor_R = np.where(scale_R > 0, scale_R, np.float32(np.inf))  # weights of a zero scale become 0
    pairs_R2I = np.clip(np.rint(pairs_R2I / divisor_R[:, None, None]), -LARGEST_WEIGHT, LARGEST_WEIGHT)
    room = LARGEST_PAIR - np.abs(pairs_R2I[..., 0])  # tiny scales are not exact
    pairs_R2I[..., 1] = np.clip(pairs_R2I[..., 1], -room, room)
    return pairs_R2I.reshape(len(rows_RI), -1)[:, : rows_RI.shape[1]], scale_R


def _rows(chunks_N: Iterable[np.ndarray], width: int) -> Iterator[np.ndarray]:
    """Yield the data of a matrix in whole rows [R, width]."""
    rest_N = np.empty(0, np.float32)
    for chunk_N in chunks_N:
        data_N = np.concatenate([rest_N, chunk_N]) if len(rest_N) else chunk_N
        whole = len(data_N) // width * width
        if whole:
            yield data_N[:whole].reshape(-1, width)
        rest_N = data_N[whole:].copy()
