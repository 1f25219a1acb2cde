from __future__ import annotations

import errno
import os

import pytest

from offramp.errors import StoreError
from offramp.runtime import run_plan
from offramp.runtime.run_plan import choose_direct, direct_works
from tests.toy import Toy, write_toy


@pytest.fixture
def store(shelf):
    with shelf.open(Toy(), "always") as store:
        yield store


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize(
    ("wanted", "growth", "available", "probes"),
    [
        ("buffered", 1 << 40, 0, False),
        ("direct", 0, 1 << 40, True),
        ("auto", 10, -1, True),
        ("auto", 10, 0, False),
        ("auto", 0, -10, False),
    ],
)
def test_direct_where_it_is_wanted_or_memory_is_short_and_it_works(
    store, monkeypatch, works, wanted, growth, available, probes
):
    """`available` is counted from store + 10 bytes."""
    probed = []
    monkeypatch.setattr(run_plan, "direct_works", lambda store: probed.append(store) or works)
    store_bytes = sum(shard.bytes for shard in store.manifest.shards.values())
    assert choose_direct(store, wanted, growth, store_bytes + 10 + available) == (probes and works)
    assert probed == [store] * probes


def test_a_system_without_direct_reads_is_not_probed(store, monkeypatch):
    monkeypatch.delattr(os, "O_DIRECT")
    assert not choose_direct(store, "direct", 0, 0)


def test_another_word_is_refused(store):
    with pytest.raises(ValueError, match=r"'auto', 'direct', 'buffered'.* got 'mmap'"):
        choose_direct(store, "mmap", 0, 0)


@pytest.fixture
def direct_fds(monkeypatch):
    """Descriptors that were opened with O_DIRECT; the flag itself is dropped, so that any file system will do."""
    plain_open, found = os.open, set()

    def fake_open(path, flags, *rest, **options):
        fd = plain_open(path, flags & ~os.O_DIRECT, *rest, **options)
        (found.add if flags & os.O_DIRECT else found.discard)(fd)
        return fd

    monkeypatch.setattr(os, "open", fake_open)
    return found


def test_the_probe_reads_one_whole_shard_directly(store, direct_fds):
    assert direct_works(store)
    assert len(direct_fds) == 1


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_to_open_is_no_error(store, monkeypatch, code):
    plain_open = os.open

    def fake_open(path, flags, *rest, **options):
        if flags & os.O_DIRECT:
            raise OSError(code, os.strerror(code))
        return plain_open(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", fake_open)
    assert not direct_works(store)


@pytest.mark.parametrize(
    ("code", "outcome"), [(errno.EINVAL, False), (errno.EOPNOTSUPP, False), (errno.EIO, StoreError)]
)
def test_a_file_system_that_refuses_to_read_is_no_error_but_a_broken_disk_is(
    store, monkeypatch, direct_fds, code, outcome
):
    plain_preadv = os.preadv

    def fake_preadv(fd, *rest):
        if fd in direct_fds:
            raise OSError(code, os.strerror(code))
        return plain_preadv(fd, *rest)

    monkeypatch.setattr(os, "preadv", fake_preadv)
    if outcome is False:
        assert not direct_works(store)
    else:
        with pytest.raises(outcome):
            direct_works(store)


def test_damage_is_left_to_the_read_that_will_report_it(tmp_path, direct_fds):
    with write_toy(tmp_path / "store", Toy()) as store:
        for file in store.path.glob("*.safetensors"):
            os.truncate(file, file.stat().st_size - 1)
        assert not direct_works(store)
