"""Pages of mapped files that may become resident without any new code being touched.

At a fault in a mapped file Linux also maps the pages around it, a window of 64 KiB, but only those in the page cache.
Code that was touched while the cache was cold is therefore mapped in part, and the rest of its windows follows at later
faults. A resident set that is measured before then is too small by that rest.
"""

from __future__ import annotations

import mmap
import os

import numpy as np

WINDOW_BYTES = 64 << 10
"""Default of the kernel's fault_around_bytes."""
_PRESENT_BIT = np.uint64(63)
_ENTRY_BYTES = 8


def refault_bytes() -> int:
    """Return the bytes of code and read-only data that later faults may add to windows that are resident in part.

    Return 0 without /proc/self/pagemap.
    """
    try:
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY)
    except OSError:
        return 0
    try:
        with open("/proc/self/maps", "rb") as maps:
            return sum(_missing_bytes(pagemap, line) for line in maps if _is_mapped_file(line))
    except OSError:  # a sandbox that hides page tables
        return 0
    finally:
        os.close(pagemap)


def _is_mapped_file(line: bytes) -> bool:
    """Return whether a line of /proc/self/maps is a private, read-only mapping of a file."""
    words = line.split(maxsplit=5)
    return words[1][1:2] == b"-" and words[1][3:4] == b"p" and words[-1].startswith(b"/")


def _missing_bytes(pagemap: int, line: bytes) -> int:
    first, end = (int(part, 16) // mmap.PAGESIZE for part in line.split(maxsplit=1)[0].split(b"-"))
    pages = max(WINDOW_BYTES // mmap.PAGESIZE, 1)
    lead = first % pages
    data = os.pread(pagemap, (end - first) * _ENTRY_BYTES, first * _ENTRY_BYTES)
    present = np.zeros(-(-(lead + end - first) // pages) * pages, bool)
    entries = np.frombuffer(data, np.uint64)
    present[lead : lead + len(entries)] = entries >> _PRESENT_BIT
    if not present.any():
        return 0
    is_touched = present.reshape(-1, pages).any(axis=1)
    mappable = np.zeros(len(present), bool)
    mappable[lead : lead + end - first] = True
    missing = mappable & ~present & np.repeat(is_touched, pages)
    return int(missing.sum()) * mmap.PAGESIZE
