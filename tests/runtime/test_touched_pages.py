"""Unmodified pages of libraries are released, and come back one by one where that is wanted."""

import mmap
import sys

import numpy as np
import pytest

from offramp.measure.mapped import WINDOW_BYTES, PageTable
from offramp.runtime import touched_pages
from offramp.runtime.touched_pages import COARSE_PAGES, TouchedPages, release

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
WINDOW = WINDOW_BYTES // mmap.PAGESIZE
DROP, MARK, UNMARK = 4, 16, 17


class Library:
    """A C library that records advice, in pages."""

    def __init__(self):
        self.advice = []

    def madvise(self, start, length, advice):
        self.advice.append((start // mmap.PAGESIZE, (start + length) // mmap.PAGESIZE, advice))
        return 0

    def ranges(self, wanted):
        """Return the ranges that got this advice since the last call for any."""
        found = [(start, end) for start, end, advice in self.advice if advice == wanted]
        self.advice.clear()
        return found


def table_of(*mappings, num_mappings=300):
    """Return a page table of (first, end, is library, is clean, pages in memory)."""
    first, end, is_library, is_clean, pages = zip(*mappings, strict=True)
    mapping = np.repeat(np.arange(len(mappings)), [len(each) for each in pages])
    flags = np.array(is_library), np.array(is_clean)
    return PageTable(num_mappings, np.array(first), np.array(end), *flags, mapping, np.concatenate(pages).astype(int))


@pytest.fixture
def kernel(monkeypatch):
    """A kernel that takes advice, and tells of pages what `library.table` says."""
    library = Library()
    monkeypatch.setattr(touched_pages, "libc", lambda: library)
    monkeypatch.setattr(touched_pages, "read_page_table", lambda mappings=None: library.table)
    monkeypatch.setattr(touched_pages, "_most_mappings", lambda: 65530)
    return library


OTHERS = [(200, 211, True, False, [200]), (300, 309, False, True, [300, 301])]
"""A library with a modified page, and a file without code."""


def test_only_unmodified_pages_of_libraries_are_released(kernel):
    table = table_of((100, 108, True, True, [103, 105]), *OTHERS, (400, 401, True, True, []))
    assert release(table) == 2 * mmap.PAGESIZE
    assert kernel.ranges(DROP) == [(100, 108), (400, 401)]


@linux
def test_pages_of_windows_in_use_come_in_alone_and_what_none_touched_stays_out(kernel):
    first, end = 10 * WINDOW + 5, 14 * WINDOW
    neighbour = (end, end + 3, False, True, [])
    kernel.table = table_of((first, end, True, True, []), neighbour, *OTHERS)
    with TouchedPages() as touched:
        pieces = kernel.ranges(MARK)
        assert pieces == [(start, start + COARSE_PAGES) for start in range(10 * WINDOW + COARSE_PAGES, end, WINDOW)]
        in_use = [first + 1, 12 * WINDOW]
        kernel.table = table_of((first, end, True, True, in_use), neighbour, *OTHERS)
        touched.narrow()
        advice = list(kernel.advice)
        assert advice[0] == (first, end + 3, UNMARK)  # neighbours at once
        windows = [*range(first, 11 * WINDOW), *range(12 * WINDOW, 13 * WINDOW)]
        assert kernel.ranges(MARK) == [(page, page + 1) for page in windows if page % 2]
        assert advice[-1] == (first, end, DROP)
        kernel.table = table_of((first, end, True, True, [first + 1, first + 2, 12 * WINDOW]), neighbour, *OTHERS)
    unmarked = [span for *span, advice in kernel.advice if advice == UNMARK]
    assert [first, end + 3] in unmarked
    assert kernel.ranges(MARK) == [(first + 3, 12 * WINDOW), (12 * WINDOW + 1, end)]


@linux
@pytest.mark.parametrize("most_mappings", [65530, 6000, 310])
def test_pieces_grow_where_mappings_would_become_too_many(kernel, monkeypatch, most_mappings):
    monkeypatch.setattr(touched_pages, "_most_mappings", lambda: most_mappings)
    pages = list(range(1600, 1600 + 10_000, WINDOW))
    kernel.table = table_of((1600, 1600 + 10_000, True, True, pages))
    with TouchedPages() as touched:
        kernel.ranges(MARK)
        touched.narrow()
        num_pieces = 2 * len(kernel.ranges(MARK))
        kernel.table = kernel.table._replace(page_N=kernel.table.page_N + 3)
    num_gaps = len(kernel.ranges(MARK))
    assert max(num_pieces, num_gaps) <= min(touched_pages.MOST_PIECES, (most_mappings - 300) // 4) + 1
    assert (num_pieces > 0) == (most_mappings > 310)


def test_where_page_tables_are_hidden_nothing_is_advised(kernel):
    kernel.table = None
    with TouchedPages() as touched:
        touched.narrow()
    assert not kernel.advice


NEIGHBOURS = """
import numpy as np
from offramp.measure import read_memory
from offramp.measure.mapped import read_page_table
from offramp.runtime.footprint import trim_memory
from offramp.runtime.touched_pages import TouchedPages

def work():
    out = np.random.default_rng(0).standard_normal((16, 16))
    return np.linalg.inv(out).tobytes() + np.sort(np.fft.fft(out.ravel()).real).tobytes()

first = work()
trim_memory()
work()
whole = read_memory().file_bytes
before = read_page_table()
for _ in range(2):
    with TouchedPages() as touched:
        work()
        touched.narrow()
        same = work() == first
        alone = read_memory().file_bytes
    work()
    again = read_memory().file_bytes
after = read_page_table()
print(same, whole - alone > whole // 4, again - alone < whole // 8)
print(after.num_mappings - before.num_mappings < 1500, work() == first)
"""


@linux
def test_neighbours_of_touched_pages_stay_out_of_memory(run_python):
    if touched_pages.read_page_table() is None:
        pytest.skip("the page table is hidden")
    assert run_python(NEIGHBOURS).split() == ["True"] * 5
