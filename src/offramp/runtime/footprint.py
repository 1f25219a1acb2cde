"""Control of memory other than weights: one reused heap, and release of library pages that only start-up needed."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, Iterator, Tuple

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
    tables 3 MiB are never read again. Pages that are needed again return from the page cache by a minor fault. Only
    private, read-only, unmodified file mappings are released, so no data can be lost. Returns 0 without
    /proc/self/smaps.
    """
    if not sys.platform.startswith("linux"):
        return 0
    libc = _libc()
    free_heap()
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    dropped = (size for start, length, size in _clean_mappings() if libc.madvise(start, length, _MADV_DONTNEED) == 0)
    return sum(dropped)


def free_heap() -> None:
    """Return free memory of the heap to the system, where the allocator can."""
    malloc_trim = getattr(_libc(), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


@lru_cache(maxsize=1)
def _libc() -> Any:
    """Return the C library. Each CDLL makes classes, which only the collector of cycles frees."""
    return ctypes.CDLL(None)


def _clean_mappings() -> Iterator[Tuple[int, int, int]]:
    """Yield (start, length, resident bytes) of private, read-only mappings of libraries that are identical to the file.

    Relocated pages are excluded, and files without code: of those only their reader knows whether they are used again.
    """
    try:
        smaps = Path("/proc/self/smaps").read_bytes()
    except OSError:  # a kernel without it, or a sandbox that hides it
        return
    lines = smaps.splitlines()
    libraries = {line.split(maxsplit=5)[-1] for line in lines if b" r-xp " in line and b" /" in line}
    start = end = resident = 0
    is_clean = False
    for line in lines:
        words = line.split(maxsplit=5)
        if b"-" in words[0]:
            start, end = (int(part, 16) for part in words[0].split(b"-"))
            is_clean = words[1] in (b"r-xp", b"r--p") and words[-1] in libraries
        elif words[0] == b"Rss:":
            resident = int(words[1]) << 10
        elif words[0] == b"Anonymous:" and is_clean and words[1] == b"0":
            yield start, end - start, resident
