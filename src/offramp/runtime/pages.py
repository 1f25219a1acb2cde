"""Pages of this process by address: those of a file in place of memory, and memory in place of them (Linux).

The functions raise OSError where the kernel refuses. Addresses and sizes are multiples of a page.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from functools import lru_cache
from typing import Any

_MAP_FIXED, _MADV_HUGEPAGE, _MADV_POPULATE_READ, _MREMAP_MAYMOVE, _MREMAP_FIXED = 0x10, 14, 22, 1, 2
_COPY_BYTES = 256 << 10
"""Memory that replacing pages of a file by copies takes in addition."""


def map_file(address: int, fd: int, num_bytes: int) -> None:
    """Replace the pages at an address by those of the start of a file.

    Writing to one copies it: the file is not changed. What is not in the page cache will be read into it in huge pages,
    where the file system has them.
    """
    _map(address, num_bytes, mmap.MAP_PRIVATE | _MAP_FIXED, fd)
    _libc().madvise(address, num_bytes, _MADV_HUGEPAGE)  # only advice


def map_memory(address: int, num_bytes: int) -> None:
    """Replace the pages at an address by empty ones, which take no memory before they are touched."""
    _map(address, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED, -1)


def reserve(address: int, num_bytes: int) -> None:
    """Replace the pages at an address by none: touching them is an error."""
    _map(address, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED, -1, 0)


def populate(address: int, num_bytes: int) -> None:
    """Bring pages into memory and into the page table, by one call. The kernel has it since Linux 5.14: else EINVAL.

    EFAULT: touching one would raise SIGBUS, because the file is shorter or its disk fails.
    """
    _require(_libc().madvise(address, num_bytes, _MADV_POPULATE_READ) == 0)


def make_own(address: int, num_bytes: int) -> None:
    """Replace pages by memory with the same content, while other threads may read them."""
    for start in range(address, address + num_bytes, _COPY_BYTES):
        size = min(_COPY_BYTES, address + num_bytes - start)
        copy = _map(None, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        ctypes.memmove(copy, start, size)
        moved = _libc().mremap(copy, size, size, _MREMAP_MAYMOVE | _MREMAP_FIXED, ctypes.c_void_p(start))
        _require(moved == start)


def _map(address: Any, num_bytes: int, flags: int, fd: int, access: int = mmap.PROT_READ | mmap.PROT_WRITE) -> int:
    mapped = _libc().mmap(address, num_bytes, access, flags, fd, 0)
    _require(mapped != ctypes.c_void_p(-1).value)
    return mapped


def _require(fine: bool) -> None:
    if not fine:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@lru_cache(maxsize=1)
def _libc() -> Any:
    """Return the C library. Its functions release the interpreter lock."""
    libc, size = ctypes.CDLL(None, use_errno=True), ctypes.c_size_t
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, size, ctypes.c_int]
    libc.mremap.argtypes = [ctypes.c_void_p, size, size, ctypes.c_int]  # and one more, which is variable
    return libc
