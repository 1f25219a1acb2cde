"""Keep what is not weights small and steady: one heap that is reused, and code that only start-up needed given back."""

from __future__ import annotations

import ctypes
import sys
from typing import Iterator, Tuple

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
HEAP_BLOCK_BYTES = 128 << 10
"""Up to this size a block comes from the heap, and as much free memory stays at its top. It is glibc's own first value,
but fixed: glibc raises it, to 32 MiB, at each large free, and the heap then keeps what loading took. The activations
of a pass do not come from here: mapping and returning each of their buffers would double a pass (see edge.backend).
"""
_MADV_DONTNEED = 4


def tune_allocator() -> bool:
    """One heap for all threads, with fixed thresholds, for the whole process. False where there is no glibc.

    glibc would raise the thresholds by itself at each large free, and give every thread an arena of its own.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has no mallopt
        return False
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, HEAP_BLOCK_BYTES), (_M_TRIM_THRESHOLD, HEAP_BLOCK_BYTES))
    return all(mallopt(option, value) for option, value in settings)


def give_back() -> int:
    """Return what only loading needed: free memory of the heap, and the pages of libraries' code.

    Half of what a runtime maps of its own code is only ever run while it starts (graph optimisers, registries): some
    20 MiB of ONNX Runtime. What is needed again comes back from the page cache by a minor fault. Only executable,
    private, unmodified file mappings are touched, so nothing can be lost. Returns the bytes of code released; 0 where
    there is no /proc.
    """
    if not sys.platform.startswith("linux"):
        return 0
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return sum(
        resident for start, length, resident in _code_mappings() if libc.madvise(start, length, _MADV_DONTNEED) == 0
    )


def _code_mappings() -> Iterator[Tuple[int, int, int]]:
    """(start, length, resident bytes) of code that is byte for byte what its file holds.

    Text with relocations in it must stay.
    """
    start = end = resident = 0
    is_code = False
    with open("/proc/self/smaps", "rb") as smaps:
        lines = smaps.read().splitlines()
    for line in lines:
        words = line.split()
        if b"-" in words[0]:
            start, end = (int(part, 16) for part in words[0].split(b"-"))
            is_code = words[1] == b"r-xp" and len(words) > 5 and words[5].startswith(b"/")
        elif words[0] == b"Rss:":
            resident = int(words[1]) << 10
        elif words[0] == b"Anonymous:" and is_code and words[1] == b"0":
            yield start, end - start, resident
