from __future__ import annotations

import errno
import os

import pytest

from offramp.errors import StoreError
from offramp.runtime import run_plan
from offramp.runtime.run_plan import DIRECT, MAPPED, Reads, choose_reads, direct_works
from tests.toy import Toy, write_toy

SHARDS = ("layer-00-up", "layer-00-down")


@pytest.fixture
def store(shelf):
    with shelf.open(Toy(), "always") as store:
        yield store


@pytest.fixture
def unmappable(monkeypatch):
    """What is not read directly is copied, so that a test does not depend on the file system."""
    monkeypatch.setattr(run_plan, "mapping_obstacle", lambda *_: "a reason")
    return Reads("buffered", "a reason")


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize(
    ("wanted", "growth", "available", "probes"),
    [
        ("buffered", 1 << 40, 0, False),
        ("direct", 0, 1 << 40, True),
        ("auto", 10, -1, True),
        ("auto", 10, 0, False),
        ("auto", 0, -10, False),
        ("mapped", 10, -1, False),
    ],
)
def test_direct_where_it_is_wanted_or_memory_is_short_and_it_works(
    store, monkeypatch, unmappable, works, wanted, growth, available, probes
):
    """`available` is counted from store + 10 bytes."""
    probed = []
    monkeypatch.setattr(run_plan, "direct_works", lambda store: probed.append(store) or works)
    store_bytes = sum(shard.bytes for shard in store.manifest.shards.values())
    found = choose_reads(store, wanted, SHARDS, growth, store_bytes + 10 + available)
    assert (found == DIRECT) == (probes and works)
    assert probed == [store] * probes
    assert found.because is None or "direct reads" in found.because or found == unmappable


@pytest.mark.parametrize(("wanted", "because"), [("auto", "a reason"), ("mapped", "a reason"), ("buffered", None)])
def test_what_is_not_mapped_is_copied_and_says_why(store, unmappable, wanted, because):
    assert choose_reads(store, wanted, SHARDS, 0, 1 << 40) == Reads("buffered", because)


@pytest.mark.parametrize("wanted", ["auto", "mapped"])
def test_shards_are_mapped_where_memory_is_not_short(store, monkeypatch, wanted):
    asked = []
    monkeypatch.setattr(run_plan, "mapping_obstacle", lambda *given: asked.append(given))
    assert choose_reads(store, wanted, SHARDS, 0, 1 << 40) == MAPPED
    assert asked == [(store, SHARDS)]


def test_a_system_without_direct_reads_is_not_probed(store, monkeypatch):
    monkeypatch.delattr(os, "O_DIRECT")
    because = "this file system does not support direct reads"
    assert choose_reads(store, "direct", SHARDS, 0, 0) == Reads("buffered", because)


def test_another_word_is_refused(store):
    with pytest.raises(ValueError, match=r"'auto', 'direct', 'buffered', 'mapped'.* got 'mmap'"):
        choose_reads(store, "mmap", SHARDS, 0, 0)


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
