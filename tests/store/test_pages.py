"""What the store writes and reads lies in the page cache in large pieces."""

import mmap
import os
import struct
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from offramp.store import pages
from offramp.store.files import iter_chunks, write_atomic
from tests.page_cache import drop

_PRESENT, _IS_TAIL = 1 << 63, 1 << 16
SIZE = 4 * pages.HUGE_BYTES + 12345
CONTENT = os.urandom(SIZE)


def smallest_piece(path):
    """Return the size of the smallest piece in which the whole huge pages of a file are cached (/proc/kpageflags)."""
    count = SIZE // pages.HUGE_BYTES * pages.HUGE_BYTES // mmap.PAGESIZE
    with ExitStack() as stack:
        file = stack.enter_context(path.open("rb"))
        table, flags = (stack.enter_context(open(name, "rb", 0)) for name in ("/proc/self/pagemap", "/proc/kpageflags"))
        mapping = stack.enter_context(mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE))
        held = memoryview(mapping)
        address = np.frombuffer(held, np.uint8).ctypes.data
        assert sum(held[:: mmap.PAGESIZE]) >= 0  # touch each page
        entries = os.pread(table.fileno(), 8 * count, 8 * (address // mmap.PAGESIZE))
        held.release()
        sizes = []
        for (entry,) in struct.iter_unpack("Q", entries):
            assert entry & _PRESENT
            (word,) = struct.unpack("Q", os.pread(flags.fileno(), 8, 8 * (entry & ((1 << 55) - 1))))
            if word & _IS_TAIL:
                sizes[-1] += mmap.PAGESIZE
            else:
                sizes.append(mmap.PAGESIZE)
    return min(sizes)


@pytest.fixture
def path(tmp_path):
    """The path of a new file, where the system has large pieces and shows them."""
    found = tmp_path / "file"
    with found.open("wb", buffering=0) as file:
        for start in range(0, SIZE, pages.HUGE_BYTES):
            file.write(CONTENT[start : start + pages.HUGE_BYTES])
    try:
        if smallest_piece(found) < pages.HUGE_BYTES:
            pytest.skip("this file system has no large pieces in the page cache")
    except OSError as error:
        pytest.skip(f"pages of the cache are not shown ({error})")
    found.unlink()
    return found


@pytest.mark.parametrize("chunk", [700, 1 << 20, (2 << 20) + 1, SIZE])
def test_written_files_lie_in_large_pieces(path, chunk):
    write_atomic(path, [CONTENT[:77], *(CONTENT[at : at + chunk] for at in range(77, SIZE, chunk))])
    assert path.read_bytes() == CONTENT
    assert smallest_piece(path) == pages.HUGE_BYTES


@pytest.mark.parametrize("chunk", [1 << 20, pages.HUGE_BYTES])
def test_files_are_read_into_large_pieces(path, chunk):
    path.write_bytes(CONTENT)
    drop(path)
    with path.open("rb") as file:
        assert b"".join(iter_chunks(file.fileno(), SIZE, chunk)) == CONTENT
    assert smallest_piece(path) == pages.HUGE_BYTES


def test_a_file_that_cannot_be_mapped_is_left_to_the_read(tmp_path):
    read, write = os.pipe()
    pages.read_in(read, 0)
    assert not pages.is_cold(read, 0, 10)
    os.close(read)
    os.close(write)
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open("rb") as file:
        pages.read_in(file.fileno(), 0)
        assert list(iter_chunks(file.fileno(), 10)) == []


def test_a_file_that_is_shorter_than_asked_for_is_cached_if_all_of_it_is(path):
    path.write_bytes(CONTENT)
    with path.open("rb") as file:
        assert not pages.is_cold(file.fileno(), 0, 2 * SIZE)
        assert not pages.is_cold(file.fileno(), 2 * SIZE, 3 * SIZE)
        drop(path)
        assert pages.is_cold(file.fileno(), 0, 2 * SIZE)


def access_of(address):
    """The letters of access that the page at an address has: readable, writable, private."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(each, 16) for each in line.split()[0].split("-"))
        if begin <= address < end:
            return line.split()[1]
    raise AssertionError("not mapped")


def test_pages_are_replaced_where_they_are(tmp_path):
    """By those of a file, which writing does not change; by own ones of the same content; by empty ones; by none."""
    page, (path, content) = mmap.PAGESIZE, (tmp_path / "file", os.urandom(2 * mmap.PAGESIZE))
    path.write_bytes(content)
    with mmap.mmap(-1, 5 * page) as region, path.open("rb") as file:
        region[:] = b"x" * len(region)
        array = np.frombuffer(region, np.uint8)
        address = array.ctypes.data
        pages.map_file(address + page, file.fileno(), 2 * page)
        assert region[:] == b"x" * page + content + b"x" * (2 * page)
        region[page] = region[page] ^ 255
        assert path.read_bytes() == content
        pages.make_own(address + page, 2 * page)
        os.truncate(path, 0)
        assert region[page + 1 : 3 * page] == content[1:]
        pages.map_memory(address + page, page)
        assert region[page : 3 * page] == bytes(page) + content[page:]
        pages.reserve(address + 4 * page, page)
        assert [access_of(address + place * page) for place in (1, 2, 4)] == ["rw-p", "rw-p", "---p"]
        pages.map_memory(address + 4 * page, page)
        assert region[3 * page :] == b"x" * page + bytes(page)
        del array
