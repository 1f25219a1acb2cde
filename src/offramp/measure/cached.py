"""Page cache usage of a file. Pages that were read remain cached without appearing in the resident set of any process.

Linux charges these pages to the memory cgroup of the reader, so memory reports state them beside the resident set.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any, Optional, Union

_WINDOW_BYTES = 1 << 30
"""Size of each mapping passed to mincore(2), in bytes. Limits its result vector (one byte per page) to 256 KiB."""
_MAP_FAILED = ctypes.c_void_p(-1).value


def cached_bytes(path: Union[str, os.PathLike]) -> Optional[int]:
    """Return the number of bytes of a file that are in the page cache, or None if the system does not report it.

    The file is not read. Since Linux 5.2, mincore(2) reports every page as cached unless the caller owns the file or
    may write to it; None is returned in that case.

    Raises:
        OSError: the file does not exist or is not readable.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() and not os.access(path, os.W_OK):
            return None
        return _cached_bytes(descriptor, status.st_size)
    finally:
        os.close(descriptor)


def _cached_bytes(descriptor: int, size_bytes: int) -> Optional[int]:
    libc = _libc()
    total = 0
    for offset in range(0, size_bytes, _WINDOW_BYTES):
        pages = _cached_pages(libc, descriptor, offset, min(_WINDOW_BYTES, size_bytes - offset))
        if pages is None:
            return None
        total += pages * mmap.PAGESIZE
    return min(total, size_bytes)  # the last page may extend beyond the end of the file


def _libc() -> Any:
    libc = ctypes.CDLL(None)
    size, pointer, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    libc.mmap.argtypes, libc.mmap.restype = [pointer, size, number, number, number, ctypes.c_long], pointer
    libc.mincore.argtypes = [pointer, size, ctypes.c_char_p]
    libc.munmap.argtypes = [pointer, size]
    return libc


def _cached_pages(libc: Any, descriptor: int, offset: int, length: int) -> Optional[int]:
    # ctypes, because `mmap.mmap` does not expose the address of a read-only mapping.
    address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, offset)
    if address == _MAP_FAILED:
        return None
    states = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
    try:
        refused = libc.mincore(address, length, states)
    finally:
        libc.munmap(address, length)
    return None if refused else sum(state & 1 for state in states.raw)
