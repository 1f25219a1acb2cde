import builtins
import ctypes
import mmap
import os

import pytest

from offramp import measure
from offramp.measure import cached
from tests.page_cache import drop, held

MIB = 1 << 20


def cached_bytes(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return measure.cached_bytes(descriptor)
    finally:
        os.close(descriptor)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"w" * (4 * MIB + 100))
    return path


def test_a_file_in_the_page_cache_is_cached_to_its_last_byte(file):
    with held(file):
        assert cached_bytes(file) == file.stat().st_size


def test_looking_does_not_bring_dropped_pages_back(file):
    drop(file)
    first = cached_bytes(file)
    if first == file.stat().st_size:
        pytest.skip("this file system keeps its pages")
    assert first < 1 * MIB
    assert cached_bytes(file) == first


def test_a_window_at_a_time_gives_the_same_sum(file, monkeypatch):
    monkeypatch.setattr(cached, "_WINDOW_BYTES", 1 * MIB)
    with held(file):
        assert cached_bytes(file) == file.stat().st_size


def test_an_empty_file_holds_nothing(tmp_path):
    (tmp_path / "empty").touch()
    assert cached_bytes(str(tmp_path / "empty")) == 0


def test_the_system_does_not_tell_about_the_files_of_others(file, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: file.stat().st_uid + 1)
    monkeypatch.setattr(os, "access", lambda path, mode, **_: False)
    assert cached_bytes(file) is None


def test_a_file_that_cannot_be_mapped_is_not_known(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        assert cached._cached_bytes(descriptor, 4096) is None
    finally:
        os.close(descriptor)


def test_a_refused_look_is_not_known(file, monkeypatch):
    libc = cached._libc()
    libc.mincore = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)(lambda *_: -1)
    monkeypatch.setattr(cached, "_libc", lambda: libc)
    assert cached_bytes(file) is None


def test_a_file_without_a_name_is_looked_at_by_its_descriptor(file):
    descriptor = os.open(file, os.O_RDONLY)
    with held(file):
        size = file.stat().st_size
        file.unlink()
        os.mkfifo(file)
        assert measure.cached_bytes(descriptor) == size
    os.close(descriptor)


def test_pages_of_a_mapped_file_are_resident_once_they_are_mapped(file):
    """The page cache holds all of it."""
    with held(file), file.open("rb") as opened, mmap.mmap(opened.fileno(), 4 * MIB, access=mmap.ACCESS_COPY) as pages:
        before = measure.resident_bytes(pages)
        assert pages[2 * MIB] == ord("w")
        assert before <= MIB and before < measure.resident_bytes(pages) < 4 * MIB


def test_pages_are_counted_where_page_tables_are_hidden(monkeypatch):
    real = open

    def hiding(path, *how):
        if path == "/proc/self/pagemap":
            raise PermissionError(path)
        return real(path, *how)

    with mmap.mmap(-1, 4 * MIB) as pages:
        pages[:MIB] = bytes(MIB)
        shown = measure.resident_bytes(pages)
        monkeypatch.setattr(builtins, "open", hiding)
        assert measure.resident_bytes(pages) == shown == MIB
