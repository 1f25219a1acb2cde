"""Pages of mapped files: those in memory, those that were modified, and those that may follow without any new code.

At a fault in a mapped file Linux also maps the pages around it, a window of 64 KiB, but only those in the page cache.
Code that was touched while the cache was cold is therefore mapped in part, and the rest of its windows follows at later
faults. A resident set that is measured before then is too small by that rest.

Shapes: M mappings, N pages in memory, W windows with such pages.
"""

from __future__ import annotations

import mmap
import os
import re
from typing import NamedTuple, Optional, Tuple

import numpy as np

WINDOW_BYTES = 64 << 10
"""Default of the kernel's fault_around_bytes."""
_PROCESS = "/proc/self"
_FILE = re.compile(rb"^(\w+)-(\w+) r-([x-])p \S+ \S+ \S+ +(/.*)$", re.MULTILINE)
"""A line of /proc/self/maps with a private, read-only mapping of a file."""
_ENTRY_BYTES, _READ_PAGES = 8, 8192
_STATE_BIT = np.uint64(61)
_PRESENT, _SWAPPED, _OF_FILE = 4, 2, 1
"""Upper bits of an entry of /proc/self/pagemap: in memory, swapped out, page of a file and not of the process."""


class PageTable(NamedTuple):
    """The private, read-only mappings of files of this process. Addresses and sizes are in pages."""

    num_mappings: int
    """Number of mappings of the process, those of other kinds included."""
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

    @property
    def windows(self) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Windows with pages in memory: indices of their mappings, first pages and ends. None reaches beyond its
        mapping."""
        num_pages = max(WINDOW_BYTES // mmap.PAGESIZE, 1)
        window_N = self.page_N // num_pages
        is_new_N = (np.diff(window_N, prepend=-1) != 0) | (np.diff(self.mapping_N, prepend=-1) != 0)
        window_W, mapping_W = window_N[is_new_N], self.mapping_N[is_new_N]
        first_W = np.maximum(self.first_M[mapping_W], window_W * num_pages)
        return mapping_W, first_W, np.minimum(self.end_M[mapping_W], (window_W + 1) * num_pages)


def read_page_table(mappings: Optional[PageTable] = None) -> Optional[PageTable]:
    """Return the pages of mapped files; None without such files, and where the page table of a process is hidden.

    Some sandboxes hide it (gVisor), and Linux before 4.2 from users without privileges. If `mappings` are given, these
    are looked at again and not listed, which is most of the time where they are many.
    """
    try:
        pagemap = os.open(f"{_PROCESS}/pagemap", os.O_RDONLY)
    except OSError:
        return None
    try:
        mappings = _read_mappings() if mappings is None else mappings
        return _with_pages(pagemap, mappings) if len(mappings.first_M) else None
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
    _, first_W, end_W = table.windows
    return (int((end_W - first_W).sum()) - len(table.page_N)) * mmap.PAGESIZE


def _read_mappings() -> PageTable:
    """Return the mappings, as if none of their pages were in memory."""
    with open(f"{_PROCESS}/maps", "rb") as maps:
        lines = maps.read()
    files = _FILE.findall(lines)
    libraries = {path for _, _, code, path in files if code == b"x"}
    first_M, end_M = (np.array([int(each[i], 16) for each in files], np.int64) // mmap.PAGESIZE for i in range(2))
    is_library_M = np.array([path in libraries for *_, path in files], bool)
    none_N = np.zeros(0, np.int64)
    return PageTable(lines.count(b"\n"), first_M, end_M, is_library_M, np.ones(len(files), bool), none_N, none_N)


def _with_pages(pagemap: int, table: PageTable) -> PageTable:
    first_M, end_M = table.first_M, table.end_M
    starts_M = np.cumsum(end_M - first_M) - (end_M - first_M)
    states = _states(pagemap, first_M, end_M)
    own, present = np.flatnonzero((states >= _SWAPPED) & (states & _OF_FILE == 0)), np.flatnonzero(states >= _PRESENT)
    is_clean_M = np.ones(len(first_M), bool)
    is_clean_M[np.searchsorted(starts_M, own, side="right") - 1] = False
    mapping_N = np.searchsorted(starts_M, present, side="right") - 1
    page_N = present + (first_M - starts_M)[mapping_N]
    return table._replace(is_clean_M=is_clean_M, mapping_N=mapping_N, page_N=page_N)


def _states(pagemap: int, first_M: np.ndarray, end_M: np.ndarray) -> np.ndarray:
    """Return the upper bits of the entries of all pages, mapping after mapping. Neighbours are read at once."""
    states = np.zeros((end_M - first_M).sum(), np.uint8)
    is_apart, done = first_M[1:] != end_M[:-1], 0
    spans = zip(first_M[np.r_[True, is_apart]].tolist(), end_M[np.r_[is_apart, True]].tolist())
    for first, end in spans:
        for start in range(first, end, _READ_PAGES):
            num_pages = min(_READ_PAGES, end - start)
            entries = np.frombuffer(os.pread(pagemap, num_pages * _ENTRY_BYTES, start * _ENTRY_BYTES), np.uint64)
            states[done : done + len(entries)] = entries >> _STATE_BIT
            done += num_pages
    return states
