"""Control of memory other than weights: one reused heap, and release of library pages that only start-up needed."""

from __future__ import annotations

import sys

from offramp.measure.mapped import read_page_table
from offramp.runtime.touched_pages import libc, release

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
HEAP_BLOCK_BYTES = 128 << 10
"""Largest block in bytes that is allocated on the heap, and the free memory kept at its top. Equal to the initial value
of glibc, but fixed: glibc raises it, up to 32 MiB, at each large free, and the heap then keeps the memory used by
loading. Activations do not come from here: mapping and unmapping each of their buffers would double the latency of a
pass."""


def tune_allocator() -> bool:
    """Configure glibc for one heap with fixed thresholds, for the whole process. Return False without glibc.

    By default glibc raises the thresholds at each large free and gives every thread its own arena.
    """
    mallopt = getattr(libc(), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is None:  # musl has none
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, HEAP_BLOCK_BYTES), (_M_TRIM_THRESHOLD, HEAP_BLOCK_BYTES))
    return all(mallopt(option, value) for option, value in settings)


def trim_memory() -> int:
    """Release memory that only loading needed, and return the bytes of library pages released.

    Released are free heap memory, and code and constants of libraries. Half of the code that a runtime maps runs only
    during start-up (graph optimisers, registries), about 20 MiB of ONNX Runtime; of its constants, symbols and unwind
    tables 3 MiB are never read again. Pages that are needed again return from the page cache by a minor fault.

    Where the page table of the process cannot be read, modified pages are not known, and no page of a library is
    released.
    """
    if not sys.platform.startswith("linux"):
        return 0
    free_heap()
    table = read_page_table()
    return 0 if table is None else release(table)


def free_heap() -> None:
    """Return free memory of the heap to the system, where the allocator can."""
    malloc_trim = getattr(libc(), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
