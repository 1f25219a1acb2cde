"""Page cache usage of a file. Pages that were read remain cached without appearing in the resident set of any process.

Linux charges these pages to the memory cgroup of the reader, so memory reports state them beside the resident set.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any, Optional

_WINDOW_BYTES = 1 << 30
"""Size of each mapping passed to mincore(2), in bytes. Limits its result vector (one byte per page) to 256 KiB."""


def cached_bytes(descriptor: int) -> Optional[int]:
    """Return the number of bytes of an open file that are in the page cache, or None if the system does not report it.

    The file is not read. Since Linux 5.2, mincore(2) reports every page as cached unless the caller owns the file or
    may write to it; None is returned in that case.
    """
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid() and not os.access(f"/proc/self/fd/{descriptor}", os.W_OK):
        return None
    return _cached_bytes(descriptor, status.st_size)


def resident_bytes(mapping: mmap.mmap) -> int:
    """Return the number of bytes of a mapping that are in the memory of this process; 0 if the system does not report
    it.

    Pages of a file that lies over the mapping count if they are mapped, not if only the page cache has them.
    """
    import numpy as np  # imported late: `offramp.measure` does not need it otherwise

    first = np.frombuffer(mapping, np.uint8).ctypes.data // mmap.PAGESIZE
    num_pages = -(-len(mapping) // mmap.PAGESIZE)
    try:
        with open("/proc/self/pagemap", "rb", 0) as pagemap:
            entries = np.frombuffer(os.pread(pagemap.fileno(), 8 * num_pages, 8 * first), np.uint64)
        return int((entries >> np.uint64(63)).sum()) * mmap.PAGESIZE  # the bit of pages that are present
    except OSError:  # a sandbox that hides page tables
        pass
    try:
        return _cached_pages(_libc(), mapping) * mmap.PAGESIZE
    except OSError:
        return 0


def _cached_bytes(descriptor: int, size_bytes: int) -> Optional[int]:
    libc, pages = _libc(), 0
    try:
        for offset in range(0, size_bytes, _WINDOW_BYTES):
            length = min(_WINDOW_BYTES, size_bytes - offset)
            with mmap.mmap(descriptor, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=offset) as mapping:
                pages += _cached_pages(libc, mapping)
    except OSError:  # the file cannot be mapped, or mincore is refused
        return None
    return min(pages * mmap.PAGESIZE, size_bytes)  # the last page may extend beyond the end of the file


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    return libc


def _cached_pages(libc: Any, mapping: mmap.mmap) -> int:
    import numpy as np  # imported late: `offramp.measure` does not need it otherwise

    states = ctypes.create_string_buffer(-(-len(mapping) // mmap.PAGESIZE))
    if libc.mincore(np.frombuffer(mapping, np.uint8).ctypes.data, len(mapping), states):
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(state & 1 for state in states.raw)
