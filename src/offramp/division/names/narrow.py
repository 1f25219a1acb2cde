"""Conversion of a checkpoint's floats to the dtypes of a store: F32, F16, and int8 with a scale per output channel.

Shapes: N items of a chunk, R rows of a chunk, O outputs, I inputs of a matrix.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from offramp.checkpoints.families import shown
from offramp.division.config import FP32
from offramp.errors import SourceError
from offramp.program.dtypes import FLOAT, HALF

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
