"""Pages are told apart as the kernel does; those that it may still map are counted, and no others."""

import mmap
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from offramp.measure import mapped
from offramp.measure.mapped import WINDOW_BYTES, read_page_table, refault_bytes

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
PAGES = WINDOW_BYTES // mmap.PAGESIZE


@pytest.fixture
def pages(tmp_path):
    """A mapped file of four windows, all of it resident."""
    path = tmp_path / "code"
    path.write_bytes(b"x" * 4 * WINDOW_BYTES)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapping:
        assert mapping[:].count(b"x") == len(mapping)
        refault_bytes()  # its own code comes into memory
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


@pytest.mark.parametrize("call", ["open", "pread"])
def test_a_system_that_hides_page_tables_tells_nothing(monkeypatch, call):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(mapped.os, call, refuse)
    assert refault_bytes() == 0
    assert read_page_table() is None


MAPS = b"""\
7f0000000-7f0003000 r-xp 00001000 08:01 42                         /usr/lib/code.so
7f0003000-7f0004000 r--p 00004000 08:01 42                         /usr/lib/code.so
7f0010000-7f0012000 r-xp 00001000 08:01 43                         /usr/lib/relocated.so
7f0020000-7f0022000 r-xp 00001000 08:01 44                         /usr/lib/swapped.so
7f0022000-7f0023000 --xp 00001000 08:01 44                         /usr/lib/swapped.so
7f0030000-7f0031000 rwxp 00001000 08:01 45                         /usr/lib/patched.so
7f0040000-7f0041000 r-xp 00000000 00:00 0
7f0050000-7f0051000 r-xp 00000000 00:00 0                          [vdso]
7f0060000-7f0061000 r-xs 00000000 08:01 45                         /shared/code
7f0070000-7f0071000 r-xp 00000000 08:01 46                         /a name with spaces.so (deleted)
7f0080000-7f0081000 r--p 00000000 08:01 47                         /models/of another reader
"""
OF_FILE, OWN, SWAPPED, MIGRATING, NONE = 0b101, 0b100, 0b010, 0b011, 0
STATES = {
    0x7F0000: [NONE, OF_FILE, OF_FILE, MIGRATING], 0x7F0010: [OF_FILE, OWN], 0x7F0020: [OF_FILE, SWAPPED, NONE],
    0x7F0030: [OWN], 0x7F0040: [OWN], 0x7F0050: [OF_FILE], 0x7F0060: [OF_FILE], 0x7F0070: [OF_FILE],
    0x7F0080: [OF_FILE],
}  # fmt: skip
FOUND = [  # first page, end, library, clean, pages in memory
    (0x7F0000, 0x7F0003, True, True, [0x7F0001, 0x7F0002]),
    (0x7F0003, 0x7F0004, True, True, []),
    (0x7F0010, 0x7F0012, True, False, [0x7F0010, 0x7F0011]),
    (0x7F0020, 0x7F0022, True, False, [0x7F0020]),
    (0x7F0070, 0x7F0071, True, True, [0x7F0070]),
    (0x7F0080, 0x7F0081, False, True, [0x7F0080]),
]


@pytest.mark.skipif(mmap.PAGESIZE != 4096, reason="addresses are those of pages of 4 KiB")
def test_mappings_are_told_apart(tmp_path, monkeypatch):
    (tmp_path / "maps").write_bytes(MAPS)
    with (tmp_path / "pagemap").open("wb") as file:
        for first, states in STATES.items():
            file.seek(first * 8)
            file.write((np.array(states, np.uint64) << np.uint64(61)).tobytes())
    monkeypatch.setattr(mapped, "_PROCESS", str(tmp_path))
    table = read_page_table()
    pages = [list(table.page_N[table.mapping_N == index]) for index in range(len(table.first_M))]
    found = zip(table.first_M, table.end_M, table.is_library_M, table.is_clean_M, pages, strict=True)
    assert list(found) == FOUND
    assert list(table.num_present_M) == [2, 0, 2, 1, 1, 1]


def mappings_of_smaps():
    """Return {addresses: (resident bytes, has modified pages)} of private, read-only mappings of files."""
    found = {}
    for head, body in re.findall(
        r"^(\w+-\w+ .*)\n((?:[A-Z].*\n)+)", Path("/proc/self/smaps").read_text(), re.MULTILINE
    ):
        words, sizes = head.split(maxsplit=5), dict(re.findall(r"^(\w+): +(\d+) kB$", body, re.MULTILINE))
        if words[1] in ("r--p", "r-xp") and words[-1].startswith("/"):
            found[words[0]] = (int(sizes["Rss"]) << 10, int(sizes["Anonymous"]) + int(sizes["Swap"]) > 0)
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the kernel has no smaps")
def test_the_kernel_tells_the_same_about_each_mapping():
    mappings_of_smaps(), read_page_table()  # code comes into memory
    before, table, after = mappings_of_smaps(), read_page_table(), mappings_of_smaps()
    columns = (table.first_M, table.end_M, table.num_present_M)
    rows = zip(*(each * mmap.PAGESIZE for each in columns), ~table.is_clean_M, strict=True)
    found = {f"{first:x}-{end:x}": (resident, is_own) for first, end, resident, is_own in rows}
    steady = {key: value for key, value in before.items() if after.get(key) == value}
    assert len(steady) > 0.9 * len(before)
    assert {key: found.get(key) for key in steady} == steady
