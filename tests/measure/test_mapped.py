"""Pages that the kernel may still map are counted, and no others."""

import mmap
import sys

import numpy as np
import pytest

from offramp.measure import mapped
from offramp.measure.mapped import WINDOW_BYTES, refault_bytes

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
PAGES = WINDOW_BYTES // mmap.PAGESIZE


@pytest.fixture
def pages(tmp_path):
    """A mapped file of four windows, all of it resident."""
    path = tmp_path / "code"
    path.write_bytes(b"x" * 4 * WINDOW_BYTES)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapping:
        assert mapping[:].count(b"x") == len(mapping)
        yield mapping


def window_start(mapping):
    """Where a whole window begins in a mapping, which may itself begin anywhere in one."""
    return -np.frombuffer(mapping, np.uint8).ctypes.data % WINDOW_BYTES


@linux
@pytest.mark.parametrize("resident", [0, 1, 5, PAGES])
def test_the_rest_of_a_window_that_is_resident_in_part_is_to_come(pages, resident):
    before, start = refault_bytes(), window_start(pages)
    if resident < PAGES:
        pages.madvise(mmap.MADV_DONTNEED, start + resident * mmap.PAGESIZE, (PAGES - resident) * mmap.PAGESIZE)
    assert refault_bytes() - before == (PAGES - resident) * mmap.PAGESIZE * (resident > 0)


@linux
def test_anonymous_and_writable_memory_is_not_counted(tmp_path):
    (tmp_path / "data").write_bytes(b"x" * 2 * WINDOW_BYTES)
    before = refault_bytes()
    with (
        (tmp_path / "data").open("r+b") as file,
        mmap.mmap(file.fileno(), 0) as shared,
        mmap.mmap(-1, 1 << 20) as empty,
    ):
        assert (shared[0], empty[0]) == (ord("x"), 0)
        shared.madvise(mmap.MADV_DONTNEED, mmap.PAGESIZE)
        assert refault_bytes() == before


def test_a_system_that_hides_page_tables_tells_nothing(monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(mapped.os, "open", refuse)
    assert refault_bytes() == 0
