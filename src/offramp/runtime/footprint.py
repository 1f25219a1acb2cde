"""Control of memory other than weights: one reused heap, and release of library pages that only start-up needed."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import lru_cache
from typing import Any

import numpy as np

from offramp.measure.mapped import read_page_table

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
HEAP_BLOCK_BYTES = 128 << 10
"""Largest block in bytes that is allocated on the heap, and the free memory kept at its top. Equal to the initial value
of glibc, but fixed: glibc raises it, up to 32 MiB, at each large free, and the heap then keeps the memory used by
loading. Activations do not come from here: mapping and unmapping each of their buffers would double the latency of a
pass."""
_MADV_DONTNEED = 4


def tune_allocator() -> bool:
    """Configure glibc for one heap with fixed thresholds, for the whole process. Return False without glibc.

    By default glibc raises the thresholds at each large free and gives every thread its own arena.
    """
    mallopt = getattr(_libc(), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is None:  # musl has none
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, HEAP_BLOCK_BYTES), (_M_TRIM_THRESHOLD, HEAP_BLOCK_BYTES))
    return all(mallopt(option, value) for option, value in settings)


def trim_memory() -> int:
    """Release memory that only loading needed, and return the bytes of library pages released.

    Released are free heap memory, and code and constants of libraries. Half of the code that a runtime maps runs only
    during start-up (graph optimisers, registries), about 20 MiB of ONNX Runtime; of its constants, symbols and unwind
    tables 3 MiB are never read again. Pages that are needed again return from the page cache by a minor fault.

    Only private, read-only mappings without a modified page are released, so no data can be lost, and only of files
    with code: of other files their reader alone knows whether they are used again. Where the page table of the process
    cannot be read, modified pages are not known, and no page of a library is released.
    """
    if not sys.platform.startswith("linux"):
        return 0
    free_heap()
    libc, table = _libc(), read_page_table()
    if table is None:
        return 0
    num_present_M = table.num_present_M
    num_released = 0
    for mapping in np.flatnonzero(table.is_library_M & table.is_clean_M & (num_present_M > 0)):
        first, end = (int(each[mapping]) * mmap.PAGESIZE for each in (table.first_M, table.end_M))
        if libc.madvise(first, end - first, _MADV_DONTNEED) == 0:
            num_released += int(num_present_M[mapping])
    return num_released * mmap.PAGESIZE


def free_heap() -> None:
    """Return free memory of the heap to the system, where the allocator can."""
    malloc_trim = getattr(_libc(), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


@lru_cache(maxsize=1)
def _libc() -> Any:
    """Return the C library. Each CDLL makes classes, which only the collector of cycles frees."""
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
