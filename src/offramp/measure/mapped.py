"""Pages of mapped files: those in memory, those that were modified, and those that may follow without any new code.

At a fault in a mapped file Linux also maps the pages around it, a window of 64 KiB, but only those in the page cache.
Code that was touched while the cache was cold is therefore mapped in part, and the rest of its windows follows at later
faults. A resident set that is measured before then is too small by that rest.

Shapes: M mappings, N pages in memory.
"""

from __future__ import annotations

import mmap
import os
import re
from typing import List, NamedTuple, Optional

import numpy as np

WINDOW_BYTES = 64 << 10
"""Default of the kernel's fault_around_bytes."""
_PROCESS = "/proc/self"
_FILE = re.compile(rb"^(\w+)-(\w+) r-([x-])p \S+ \S+ \S+ +(/.*)$", re.MULTILINE)
"""A line of /proc/self/maps with a private, read-only mapping of a file."""
_ENTRY_BYTES = 8
_STATE_BIT = np.uint64(61)
_PRESENT, _SWAPPED, _OF_FILE = 4, 2, 1
"""Upper bits of an entry of /proc/self/pagemap: in memory, swapped out, page of a file and not of the process."""


class PageTable(NamedTuple):
    """The private, read-only mappings of files of this process. Addresses and sizes are in pages."""

    first_M: np.ndarray
    end_M: np.ndarray
    is_library_M: np.ndarray
    """True for mappings of files with code: another mapping of the file, or this one, is executable."""
    is_clean_M: np.ndarray
    """True for mappings without modified pages, such as relocated ones, in memory or swapped out."""
    mapping_N: np.ndarray
    """Indices of the mappings of the pages in memory, in ascending order."""
    page_N: np.ndarray

    @property
    def num_present_M(self) -> np.ndarray:
        """Numbers of pages in memory."""
        return np.bincount(self.mapping_N, minlength=len(self.first_M))


def read_page_table() -> Optional[PageTable]:
    """Return the pages of mapped files; None without such files, and where the page table of a process is hidden.

    Some sandboxes hide it (gVisor), and Linux before 4.2 from users without privileges.
    """
    try:
        pagemap = os.open(f"{_PROCESS}/pagemap", os.O_RDONLY)
    except OSError:
        return None
    try:
        with open(f"{_PROCESS}/maps", "rb") as maps:
            files = _FILE.findall(maps.read())
        return _page_table(pagemap, files) if files else None
    except OSError:
        return None
    finally:
        os.close(pagemap)


def refault_bytes() -> int:
    """Return the bytes of code and read-only data that later faults may add to windows that are resident in part.

    Return 0 where the page table cannot be read.
    """
    table = read_page_table()
    if table is None:
        return 0
    num_pages = max(WINDOW_BYTES // mmap.PAGESIZE, 1)
    window_N = table.page_N // num_pages
    is_new_N = (np.diff(window_N, prepend=-1) != 0) | (np.diff(table.mapping_N, prepend=-1) != 0)
    window, mapping = window_N[is_new_N], table.mapping_N[is_new_N]
    first = np.maximum(table.first_M[mapping], window * num_pages)  # a fault does not reach beyond its mapping
    end = np.minimum(table.end_M[mapping], (window + 1) * num_pages)
    return (int((end - first).sum()) - len(window_N)) * mmap.PAGESIZE


def _page_table(pagemap: int, files: List[tuple]) -> PageTable:
    libraries = {path for _, _, code, path in files if code == b"x"}
    first_M, end_M = (np.array([int(each[i], 16) for each in files], np.int64) // mmap.PAGESIZE for i in range(2))
    starts_M = np.cumsum(end_M - first_M) - (end_M - first_M)
    states = _states(pagemap, first_M, end_M)
    is_own = (states >= _SWAPPED) & (states & _OF_FILE == 0)
    own, present = np.flatnonzero(is_own), np.flatnonzero(states >= _PRESENT)
    is_clean_M = np.ones(len(files), bool)
    is_clean_M[np.searchsorted(starts_M, own, side="right") - 1] = False
    mapping_N = np.searchsorted(starts_M, present, side="right") - 1
    is_library_M = np.array([path in libraries for *_, path in files], bool)
    page_N = present + (first_M - starts_M)[mapping_N]
    return PageTable(first_M, end_M, is_library_M, is_clean_M, mapping_N, page_N)


def _states(pagemap: int, first_M: np.ndarray, end_M: np.ndarray) -> np.ndarray:
    """Return the upper bits of the entries of all pages, mapping after mapping. Neighbours are read at once."""
    entries = np.zeros((end_M - first_M).sum(), np.uint64)
    is_apart, done = first_M[1:] != end_M[:-1], 0
    for first, end in zip(first_M[np.r_[True, is_apart]], end_M[np.r_[is_apart, True]]):
        os.preadv(pagemap, [entries.data[done : done + end - first]], int(first) * _ENTRY_BYTES)
        done += end - first
    return (entries >> _STATE_BIT).astype(np.uint8)
