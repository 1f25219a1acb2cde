"""Pages of this process by address: those of a file in place of memory, and memory in place of them (Linux).

The functions raise OSError where the kernel refuses. Addresses and sizes are multiples of a page.

The page cache holds a file in pieces of many sizes. Mapping 9 MiB takes 0.05 ms in pieces of 2 MiB and 0.4 ms in small
ones (docs/decisions/0016). `read` fills the cache in small pieces; a write of a whole aligned piece, and touching a
mapping with the advice to use huge pages, fill it in pieces of 2 MiB, where the file system has them.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import sys
from functools import lru_cache
from typing import Any, Iterator

_MAP_FIXED, _MADV_HUGEPAGE, _MADV_POPULATE_READ, _MREMAP_MAYMOVE, _MREMAP_FIXED = 0x10, 14, 22, 1, 2
HUGE_BYTES = 2 << 20
"""Unit of the page table above a page. A part of a file that lies in memory in one piece is mapped by one entry if its
address is a multiple."""
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


def is_cold(fd: int, start: int, end: int) -> bool:
    """Return whether a piece of a file between two offsets is not in the page cache, so that `read_in` helps. False for
    direct reads, and where the system does not tell.
    """
    if not sys.platform.startswith("linux") or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
        return False
    first, end = start - start % HUGE_BYTES, min(end, os.fstat(fd).st_size)
    if first < end:
        with contextlib.suppress(OSError, AttributeError), _mapped(fd, first, end - first) as address:
            return not all(map(_is_cached, range(address, address + end - first, HUGE_BYTES)))
    return False


def read_in(fd: int, offset: int) -> None:
    """Bring the piece of a file at `offset`, and the next one, to the page cache in huge pages, unless they are there.

    The next one too, because a read of the first starts to read it ahead, in small pages. Errors are ignored: only the
    size of pages is at stake, and the read that follows reports what is wrong with the file.
    """
    with contextlib.suppress(OSError, AttributeError):
        for place in (offset - offset % mmap.PAGESIZE, offset - offset % HUGE_BYTES + HUGE_BYTES):
            with _mapped(fd, place, mmap.PAGESIZE) as address:  # one page, so that it adds no more to the process
                if not _is_cached(address):
                    _libc().madvise(address, mmap.PAGESIZE, _MADV_HUGEPAGE)  # the fault reads the huge page around it
                    populate(address, mmap.PAGESIZE)


@contextlib.contextmanager
def _mapped(fd: int, offset: int, num_bytes: int) -> Iterator[int]:
    address = _map(None, num_bytes, mmap.MAP_PRIVATE, fd, mmap.PROT_READ, offset)
    try:
        yield address
    finally:
        _libc().munmap(address, num_bytes)


def _is_cached(address: int) -> bool:
    """Return whether the file of a mapped page has it in the page cache."""
    state = ctypes.c_ubyte()
    _require(_libc().mincore(address, mmap.PAGESIZE, ctypes.byref(state)) == 0)
    return bool(state.value & 1)


def make_own(address: int, num_bytes: int) -> None:
    """Replace pages by memory with the same content, while other threads may read them."""
    for start in range(address, address + num_bytes, _COPY_BYTES):
        size = min(_COPY_BYTES, address + num_bytes - start)
        copy = _map(None, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
        ctypes.memmove(copy, start, size)
        moved = _libc().mremap(copy, size, size, _MREMAP_MAYMOVE | _MREMAP_FIXED, ctypes.c_void_p(start))
        _require(moved == start)


def _map(
    address: Any, num_bytes: int, flags: int, fd: int, access: int = mmap.PROT_READ | mmap.PROT_WRITE, offset: int = 0
) -> int:
    mapped = _libc().mmap(address, num_bytes, access, flags, fd, offset)
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
    libc.munmap.argtypes = [ctypes.c_void_p, size]
    libc.mincore.argtypes = [ctypes.c_void_p, size, ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, size, ctypes.c_int]
    libc.mremap.argtypes = [ctypes.c_void_p, size, size, ctypes.c_int]  # and one more, which is variable
    return libc
