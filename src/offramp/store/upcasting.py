"""Upcasting of shards while they are read: chunks of a file with F16 tensors become F32 tensors in a buffer.

The file passes through a small staging buffer, so that a shard takes the memory of its F32 tensors and no more.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Iterator, List, Tuple

import numpy as np

from offramp.store import manifest as m

STAGING_BYTES = 1 << 20
"""Size of a staging buffer, and bytes per system call of a read that passes through it."""
_BLOCK = 1 << 15
"""Elements that are upcast at a time: their F32 values stay in the second-level cache."""
_SIGN_AND_BITS = np.uint32(0x8FFFE000)
"""Sign, exponent and mantissa of a float16 after its sign-extended bits were shifted to those of a float32."""
_REBIAS = np.float32(2.0**112)
"""Ratio of the exponent biases of float32 and float16."""


class Staging:
    """Staging buffers of one store, page-aligned as direct reads require. Safe from several threads."""

    def __init__(self) -> None:
        self._free: List[mmap.mmap] = []

    @contextlib.contextmanager
    def buffer(self) -> Iterator[memoryview]:
        """Context manager of a buffer that no other read uses; buffers are kept."""
        try:
            pages = self._free.pop()
        except IndexError:
            pages = mmap.mmap(-1, STAGING_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            yield memoryview(pages)
        finally:
            self._free.append(pages)


def staging_bytes(manifest: m.Manifest) -> int:
    """Return the memory in bytes that reading shards takes beside their buffers: two halves may be read at once."""
    return 2 * STAGING_BYTES if any(not layout.is_file for layout in manifest.layouts.values()) else 0


def place_chunk(shard: m.Shard, layout: m.Layout, chunk: memoryview, offset: int, buffer: memoryview) -> None:
    """Put the tensor data of a chunk, which lies at `offset` in the file of a shard, at their place in the buffer."""
    chunk_B = np.frombuffer(chunk, np.uint8)
    buffer_B = np.frombuffer(buffer, np.uint8)
    for tensor in shard.tensors:
        first, last = _overlap(shard.data_start + tensor.offset, tensor.num_bytes, offset, len(chunk))
        if first >= last:
            continue
        placed, skipped = layout.tensors[tensor.name], first - shard.data_start - tensor.offset
        found_B = chunk_B[first - offset : last - offset]
        if placed.dtype == tensor.dtype:
            buffer_B[placed.offset + skipped :][: len(found_B)] = found_B
        else:
            target_B = buffer_B[placed.offset + 2 * skipped :][: 2 * len(found_B)]
            upcast(found_B.view(np.float16), target_B.view(np.float32))


def _overlap(start: int, size: int, offset: int, num_bytes: int) -> Tuple[int, int]:
    return max(start, offset), min(start + size, offset + num_bytes)


def upcast(halves_N: np.ndarray, floats_N: np.ndarray) -> None:
    """Write finite float16 numbers as float32, exactly; five times as fast as NumPy's own conversion.

    Infinities and NaN, which a store does not hold, become finite numbers.
    """
    for start in range(0, len(halves_N), _BLOCK):
        part = slice(start, start + _BLOCK)
        floats, bits = floats_N[part], floats_N[part].view(np.int32)
        np.copyto(bits, halves_N[part].view(np.int16))  # extends the sign
        np.left_shift(bits, 13, out=bits)
        np.bitwise_and(floats.view(np.uint32), _SIGN_AND_BITS, out=floats.view(np.uint32))
        np.multiply(floats, _REBIAS, out=floats)
