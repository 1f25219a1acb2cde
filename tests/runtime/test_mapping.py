"""Mapped shards: the same bytes as copied ones, within the memory of their slots, and never without a lease."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest

from offramp.errors import DamagedError
from offramp.measure import Trace, read_memory
from offramp.runtime import mapping
from offramp.runtime.feed import Buffers, WeightFeed
from offramp.runtime.mapping import MappedPool, mapping_obstacle
from offramp.runtime.ring import Turn
from offramp.runtime.slots import HUGE_BYTES, PAGE, Arena, EqualSlots, Slot, aligned_slot, pages_of
from offramp.store import leases, pages
from tests.forked import in_child
from tests.leases import CUT, TOUCH, num_leases, start
from tests.runtime.driver import answers, encode, eventually, expected
from tests.toy import Toy, layer_shards, open_engine, write_toy

ROWS = ("abc", "abcdefgh", "l")
TOY = Toy(padding_bytes=5 * PAGE + 100)
SOON_SECONDS = 10
"""Much less than the 45 s for which a lease can be kept from who wants to write."""


@pytest.fixture(autouse=True)
def nothing_is_left():
    before = num_leases() if sys.platform.startswith("linux") else 0
    yield
    assert not sys.platform.startswith("linux") or num_leases() == before


@pytest.fixture
def store(tmp_path):
    with write_toy(tmp_path / "store", TOY) as store:
        obstacle = mapping_obstacle(store, layer_shards(store))
        if obstacle:
            pytest.skip(obstacle)
        yield store


def pool_of(store, num_slots=2, num_bytes=16 * PAGE):
    return MappedPool(store, EqualSlots([aligned_slot(num_bytes) for _ in range(num_slots)]), store.read_shard_plainly)


@pytest.fixture
def pool(store):
    store.read_shard_plainly = lambda shard, view, cancelled: store.read_shard(shard, view, cancelled=cancelled)
    pool = pool_of(store)
    yield pool
    pool.close()


def fill(pool, shard):
    slot = pool.acquire(shard)
    num_bytes, complete = pool.fill(shard, slot, bool)
    assert complete
    return slot, num_bytes


def content(store, shard):
    return (store.path / store.manifest.shards[shard].file).read_bytes()


def is_mapped(store):
    return str(store.path) in Path("/proc/self/maps").read_text()


def test_a_slot_has_the_bytes_of_the_file_at_its_own_address_and_does_not_change_it(store, pool):
    for shard in layer_shards(store):
        slot, num_bytes = fill(pool, shard)
        address, data = slot.array.ctypes.data, content(store, shard)
        assert num_bytes == len(data) and slot.view[:num_bytes] == data
        assert address % HUGE_BYTES == 0 and is_mapped(store) and num_leases() == 1
        slot.array[:100] = 0
        pool.release(slot)
        assert num_leases() == 0 and content(store, shard) == data
    assert pool.obstacle is None


def test_memory_is_that_of_the_slots(tmp_path):
    with write_toy(tmp_path / "store", Toy(padding_bytes=12 << 20)) as store:
        store.read_shard_plainly = store.read_shard
        pool = pool_of(store, 2, 7 << 20)
        before, peaks = read_memory().rss_bytes, []
        for _ in range(3):
            for shard in layer_shards(store):
                slot, _ = fill(pool, shard)
                slot.array[::PAGE].sum()
                pool.release(slot)
                peaks.append(read_memory().rss_bytes - before)
        assert (5 << 20) < max(peaks) < 2 * (7 << 20) + (1 << 20)
        pool.close()


@pytest.mark.parametrize("kind", ["equal", "arena"])
@pytest.mark.parametrize("script", [CUT, TOUCH])
def test_who_wants_to_write_gets_the_file_and_slots_in_use_keep_their_content(store, pool, script, kind):
    first, second, third = layer_shards(store)[:3]
    if kind == "arena":
        sizes = {name: pages_of(store.manifest.shards[name].bytes) * PAGE for name in (first, second, third)}
        arena = Arena([[first, second, third]], sizes, sizes, sum(sizes.values()), is_aligned=True)
        pool = MappedPool(store, arena, store.read_shard_plainly)
    slots = {name: fill(pool, name)[0] for name in (first, second)}
    assert all(slot.address % HUGE_BYTES == 0 for slot in slots.values())
    data = {name: content(store, name) for name in slots}
    assert pool.tend()
    writing = start(script, store.path / store.manifest.shards[first].file)
    eventually(lambda: not pool.tend())
    assert writing.wait(SOON_SECONDS) == 0
    assert pool.obstacle == "another process opened a file of the store for writing"
    assert num_leases() == 0 and not is_mapped(store)
    for name, slot in slots.items():
        assert slot.view[: len(data[name])] == data[name]
    pool.release(slots[second])
    slot, num_bytes = fill(pool, third)
    assert slot.view[:num_bytes] == content(store, third) and not is_mapped(store)
    pool.close()


def test_a_discarded_slot_keeps_its_content_whatever_becomes_of_the_file(store, pool):
    shard = layer_shards(store)[0]
    slot, num_bytes = fill(pool, shard)
    data = content(store, shard)
    pool.discard(slot)
    assert num_leases() == 0
    os.truncate(store.path / store.manifest.shards[shard].file, 0)
    assert slot.view[:num_bytes] == data


@pytest.mark.parametrize("has_lease", [False, True])
def test_waiting_takes_one_item_of_the_queue(store, pool, has_lease):
    wakeups = SimpleQueue()
    wakeups.put(None)
    wakeups.put(None)
    slot = fill(pool, layer_shards(store)[0])[0] if has_lease else pool.acquire("layer-00-up")
    pool.wait(wakeups)
    assert wakeups.qsize() == 1
    pool.release(slot)


def test_a_cancelled_fill_keeps_no_lease(store, pool):
    slot = pool.acquire("layer-00-up")
    assert pool.fill("layer-00-up", slot, lambda: True) == (0, False)
    assert num_leases() == 0
    pool.release(slot)


def test_a_damaged_shard_is_refused_and_keeps_no_lease(store, pool):
    shard = layer_shards(store)[0]
    path = store.path / store.manifest.shards[shard].file
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    slot = pool.acquire(shard)
    with pytest.raises(DamagedError, match="sha256 differs"):
        pool.fill(shard, slot, bool)
    path.write_bytes(b"")
    with pytest.raises(DamagedError, match="file has 0 bytes"):
        pool.fill(shard, slot, bool)
    assert num_leases() == 0 and pool.obstacle is None


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EFAULT, errno.ENOMEM])
def test_a_kernel_that_refuses_in_the_middle_is_left_for_copies(store, pool, monkeypatch, code):
    first, second = layer_shards(store)[:2]
    kept, num_bytes = fill(pool, first)

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(pages, "populate", refuse)
    slot, more = fill(pool, second)
    assert slot.view[:more] == content(store, second) and kept.view[:num_bytes] == content(store, first)
    assert os.strerror(code) in pool.obstacle and num_leases() == 0 and not is_mapped(store)


@pytest.mark.parametrize(("name", "error"), [("populate", OSError(errno.EINVAL, "no")), ("map_file", AttributeError())])
def test_a_kernel_without_populate_and_a_library_without_a_function_are_obstacles(store, monkeypatch, name, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr(pages, name, refuse)
    assert "does not map shards" in mapping_obstacle(store, layer_shards(store))


def test_other_obstacles(store, monkeypatch):
    assert mapping_obstacle(store, []) == "all weights stay in memory"
    with (store.path / store.manifest.shards["layer-00-up"].file).open("r+b"):
        assert mapping_obstacle(store, ["layer-00-up"]) == "a file is open for writing"
    monkeypatch.setattr(leases, "_type_of", lambda _: 0)
    assert "file system" in mapping_obstacle(store, ["layer-00-up"])
    monkeypatch.setattr(mapping.sys, "platform", "darwin")
    assert mapping_obstacle(store, ["layer-00-up"]) == "this system has no read leases"


def test_few_files_stay_open(store, pool, monkeypatch):
    monkeypatch.setattr(mapping, "most_open", lambda: 1)
    for _ in range(2):
        for shard in layer_shards(store):
            slot, _ = fill(pool, shard)
            pool.release(slot)
    assert len(pool._files._files) <= 2


@pytest.mark.parametrize("verify", ["first", "always", "never"])
def test_an_engine_that_waits_gives_way_and_goes_on(store, verify):
    store.policy = verify
    engine, wanted = open_engine(store, "none", 2, reads="mapped"), expected(store, ROWS, "none")
    assert answers(engine.sweep([encode(ROWS)], more=True)) == wanted
    eventually(lambda: num_leases() == 2)
    began = time.monotonic()
    files = [store.path / store.manifest.shards[name].file for name in layer_shards(store)]
    assert start(TOUCH, *files).wait(SOON_SECONDS) == 0  # some of them lie in its slots
    assert time.monotonic() - began < SOON_SECONDS
    assert engine.feed.mapping_obstacle and num_leases() == 0
    assert answers(engine.sweep([encode(ROWS)], more=True)) == wanted
    engine.close()


def test_passes_go_on_while_others_write_and_replace(store, tmp_path):
    """The files are touched, then replaced by new ones, and deleted."""
    engine, wanted = open_engine(store, "none", 2, reads="mapped"), expected(store, ROWS, "none")
    ended = threading.Event()

    def disturb():
        time.sleep(0.05)
        for name in layer_shards(store):
            path = store.path / store.manifest.shards[name].file
            shutil.copyfile(path, tmp_path / "copy")
            (tmp_path / "copy").replace(path)
        start(TOUCH, store.path / "layer-00-up.safetensors").wait()
        shutil.rmtree(store.path)
        ended.set()

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    while not ended.is_set():
        assert answers(engine.sweep([encode(ROWS)], more=True)) == wanted
    assert answers(engine.sweep([encode(ROWS)])) == wanted
    disturbing.join()
    engine.close()


def test_a_fork_takes_copies_along_and_no_leases(store):
    """In the middle of a pass: the child has the shards in use, whatever becomes of the files."""
    feed = feed_of(store)
    shard = layer_shards(store)[0]
    feed.begin_pass([Turn(shard), Turn(layer_shards(store)[1])])
    slot, data = feed.acquire(shard).slot, content(store, shard)
    eventually(lambda: num_leases() == 2)

    def act():
        assert num_leases() == 0 and not is_mapped(store)
        os.truncate(store.path / store.manifest.shards[shard].file, 0)
        assert slot.view[: len(data)] == data
        feed.release(shard)
        feed.begin_pass([Turn(layer_shards(store)[1])], restart=True)
        feed.acquire(layer_shards(store)[1])
        assert num_leases() == 1 and feed.mapping_obstacle is None
        feed.close()

    assert in_child(act) == 0
    assert slot.view[: len(data)] == data and num_leases() == 0
    feed.close()


def feed_of(store):
    slots = EqualSlots([aligned_slot(16 * PAGE) for _ in range(2)])
    return WeightFeed(store, Buffers(slots, {}, 2), {}, Trace(), mapped=True)


def test_pages_become_own_while_others_read_them(tmp_path):
    path = tmp_path / "file"
    data = np.random.default_rng(0).bytes(3 << 20)
    path.write_bytes(data)
    slot, fd, wrong, ended = Slot(3 << 20), os.open(path, os.O_RDONLY), [], threading.Event()

    def read():
        while not ended.is_set():
            if slot.view[:: PAGE // 2].tobytes() != data[:: PAGE // 2]:
                wrong.append(True)

    pages.map_file(slot.address, fd, 3 << 20)
    reading = threading.Thread(target=read)
    reading.start()
    for _ in range(5):
        pages.make_own(slot.address, 3 << 20)
    ended.set()
    reading.join()
    os.truncate(path, 0)
    assert not wrong and slot.view.tobytes() == data
    os.close(fd)
