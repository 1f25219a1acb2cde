"""Pages of libraries: their release, and which of them a process keeps in memory.

Only private, read-only mappings without a modified page are released, so no data can be lost, and only of files with
code: of other files their reader alone knows whether they are used again. A page that is needed again returns by a
fault.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, Iterable, List, Tuple

import numpy as np

from offramp.measure.mapped import WINDOW_BYTES, PageTable, read_page_table

COARSE_PAGES = 8
"""Pages of a piece in the first pass, which runs much code once. It is not known yet which windows are in use, and
pieces of one page would be six times the number that is needed later."""
MOST_PIECES = 8192
"""Most pieces. ONNX Runtime with a tokenizer has 4,300 pages of 4 KiB in use, each of them a piece; with PyTorch, which
has more, pieces have several pages. Every second piece takes a call of 5 microseconds, and each 250 bytes of the kernel
for as long as it is apart."""
_WINDOW_PAGES = max(WINDOW_BYTES // mmap.PAGESIZE, 1)
_DEFAULT_MAPPINGS = 65530
"""Most mappings of a process by default."""
_MADV_DONTNEED, _MADV_DONTDUMP, _MADV_DODUMP = 4, 16, 17


class TouchedPages:
    """Keeps of the code and constants of libraries only those pages in memory that are touched within its context.

    At a fault Linux maps the pages around it as well, as far as the mapping reaches (see `measure.mapped`). Two thirds
    of the library pages of a process are such neighbours, which no pass touches. Within the context, pages of windows
    that were in use are therefore mappings of their own, by a mark on every second one. Afterwards neighbours that are
    all touched, or all untouched, become one mapping, so that a later fault brings in no more than the untouched pages
    beside it.

    The mark only separates: marked pages are left out of core dumps, in which Linux does not put pages of files anyway,
    except the first of each, which is not marked in the end. `MADV_RANDOM` separates as well, but the kernel then reads
    no pages ahead, and evicts those pages first. Libraries with modified pages are left as they are, and all where the
    page table cannot be read.
    """

    def __enter__(self) -> TouchedPages:
        table = read_page_table() if sys.platform.startswith("linux") else None
        if table is not None:
            _join(table)  # what an earlier context has left
            table = read_page_table()
        self._table = table
        if table is not None:
            self._most_pieces = min(MOST_PIECES, (_most_mappings() - table.num_mappings) // 4)
            is_releasable_M = table.is_library_M & table.is_clean_M
            self._separate(
                zip(table.first_M[is_releasable_M].tolist(), table.end_M[is_releasable_M].tolist()), COARSE_PAGES
            )
        return self

    def narrow(self) -> None:
        """Release all pages. From here on, each page of the windows that were in use comes in alone."""
        if self._table is None:
            return
        table = self._pages()
        _join(table)
        mapping_W, first_W, end_W = table.windows
        is_releasable_W = (table.is_library_M & table.is_clean_M)[mapping_W]
        self._separate(zip(first_W[is_releasable_W].tolist(), end_W[is_releasable_W].tolist()), 1)

    def _separate(self, spans: Iterable[Tuple[int, int]], size: int) -> None:
        """Make every `size` pages a mapping, or more pages if mappings become too many, and release all."""
        spans = list(spans)
        num_pages = sum(end - first for first, end in spans)
        while size < _WINDOW_PAGES and num_pages > self._most_pieces * size:
            size *= 2
        if size < _WINDOW_PAGES:
            odd = ((span, piece) for span in spans for piece in range(span[0] // size | 1, -(-span[1] // size), 2))
            pieces = ((max(first, piece * size), min(end, (piece + 1) * size)) for (first, end), piece in odd)
            _advise(pieces, _MADV_DONTDUMP)
        release(self._pages())  # read again: another thread may have loaded a library meanwhile

    def _pages(self) -> PageTable:
        """Return what is in memory now of the mappings that there were at first."""
        assert self._table is not None
        return read_page_table(self._table) or self._table

    def __exit__(self, *_: object) -> None:
        if self._table is None:
            return
        untouched = _untouched(self._pages())
        _join(self._table)  # only now: new code brings in its neighbours from here on
        if len(untouched) <= self._most_pieces:
            _advise(untouched, _MADV_DONTDUMP)


def _join(table: PageTable) -> None:
    """Remove the marks of `TouchedPages`. Neighbours that belong to one file become one mapping again."""
    is_apart = table.first_M[1:] != table.end_M[:-1]
    first, end = table.first_M[np.r_[True, is_apart]], table.end_M[np.r_[is_apart, True]]
    _advise(zip(first.tolist(), end.tolist()), _MADV_DODUMP)


def _untouched(table: PageTable) -> List[Tuple[int, int]]:
    """Return first page and end of what lies between pages in memory, in unmodified mappings of libraries.

    The first page of a mapping counts as touched.
    """
    is_releasable_N = (table.is_library_M & table.is_clean_M)[table.mapping_N]
    mapping_N, page_N = table.mapping_N[is_releasable_N], table.page_N[is_releasable_N]
    is_first_N, is_last_N = (np.diff(mapping_N, **side) != 0 for side in ({"prepend": -1}, {"append": -1}))
    after_N = np.where(is_first_N, table.first_M[mapping_N], np.roll(page_N, 1)) + 1
    first = np.r_[after_N, page_N[is_last_N] + 1]
    end = np.r_[page_N, table.end_M[mapping_N][is_last_N]]
    return [(start, stop) for start, stop in zip(first.tolist(), end.tolist()) if start < stop]


def release(table: PageTable) -> int:
    """Release pages of unmodified mappings of libraries, and return their bytes."""
    num_present_M, is_releasable_M = table.num_present_M, table.is_library_M & table.is_clean_M
    spans = zip(table.first_M[is_releasable_M].tolist(), table.end_M[is_releasable_M].tolist())
    is_released = np.array(_advise(spans, _MADV_DONTNEED), bool)
    return int(num_present_M[is_releasable_M][is_released].sum()) * mmap.PAGESIZE


def _advise(spans: Iterable[Tuple[int, int]], advice: int) -> List[bool]:
    """Give the kernel an advice for each span of pages, and return whether it took it."""
    madvise, size = libc().madvise, mmap.PAGESIZE
    return [madvise(first * size, (end - first) * size, advice) == 0 for first, end in spans]


def _most_mappings() -> int:
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_bytes())
    except (OSError, ValueError):  # a sandbox that hides it
        return _DEFAULT_MAPPINGS


@lru_cache(maxsize=1)
def libc() -> Any:
    """Return the C library. Each CDLL makes classes, which only the collector of cycles frees."""
    library = ctypes.CDLL(None)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library
