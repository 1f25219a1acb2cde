"""The feed hands out the weights of a step as they lie in their slots, and counts what it reads."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from offramp.measure import Trace
from offramp.runtime.feed import Buffers, WeightFeed
from offramp.runtime.ring import Turn
from offramp.runtime.slots import EqualSlots, Slot
from tests.runtime.driver import eventually
from tests.toy import Toy

SHARDS = ("layer-00-attention", "layer-00-up", "layer-00-down")


@pytest.fixture
def feed(shelf):
    store = shelf.open(Toy())
    slots = EqualSlots([Slot(1 << 16) for _ in range(2)])
    feed = WeightFeed(store, Buffers(slots, {SHARDS[0]: Slot(1 << 16)}, 2), {SHARDS[1]: 7}, Trace())
    feed.store = store
    yield feed
    feed.close()
    store.close()


def step_of(store, shard):
    return next(step for step in store.program.steps() if step.shards == (shard,))


def test_weights_are_those_of_the_store_by_kernel_input(feed):
    for number in range(2):
        feed.begin_pass([Turn(name) for name in SHARDS])
        for name in SHARDS:
            step, loaded = step_of(feed.store, name), feed.acquire(name)
            views = feed.views(step, {name: loaded.slot})
            assert set(views) == set(step.weights)
            for role, tensor_name in step.weights.items():
                shard, tensor = feed.store.manifest.tensors()[tensor_name]
                data = np.frombuffer(feed.store.read_tensor(shard.name, tensor), np.float32)
                assert np.array_equal(views[role], data.reshape(tensor.shape)), (number, role)
            again = feed.views(step, {name: loaded.slot})
            assert all(again[role] is views[role] for role in views), "a slot keeps its views"
            feed.release(name)
        feed.end_pass()
    assert feed.pass_index == 2


def test_a_resident_is_read_once_and_the_others_each_time(feed):
    sizes = {name: feed.store.manifest.shards[name].bytes for name in SHARDS}
    for number in range(3):
        feed.begin_pass([Turn(name) for name in SHARDS])
        loaded = {name: feed.acquire(name) for name in SHARDS[:2]}
        assert loaded[SHARDS[0]].num_bytes == (0 if number else sizes[SHARDS[0]])
        assert loaded[SHARDS[1]].num_bytes == sizes[SHARDS[1]]
        assert loaded[SHARDS[1]].read_seconds > 0 <= loaded[SHARDS[1]].waited_seconds
        for name in SHARDS[:2]:
            feed.release(name)
        eventually(
            lambda number=number: feed.bytes_read == sum(sizes.values()) + number * sum(list(sizes.values())[1:])
        )
        feed.count_charged(sum(each.num_bytes for each in loaded.values()))
        feed.end_pass()
    assert feed.bytes_idle == 3 * sizes[SHARDS[2]], "nothing used it"
    feed.count_read(5)
    assert feed.bytes_idle == 3 * sizes[SHARDS[2]] + 5


def test_waits_and_reads_are_traced_under_their_stage(feed):
    feed.begin_pass([Turn(SHARDS[1])])
    feed.acquire(SHARDS[1])
    spans = {span.kind: span for span in feed.trace.spans(0)}
    assert set(spans) == {"read", "wait"}
    assert {(span.name, span.stage) for span in spans.values()} == {(SHARDS[1], 7)}
    assert (spans["read"].thread, spans["wait"].thread) == ("reader", "loop")


def test_it_waits_no_longer_than_it_is_told(feed, monkeypatch):
    released, read = threading.Event(), feed.store.read_shard

    def read_shard(*arguments, **options):
        released.wait()
        return read(*arguments, **options)

    monkeypatch.setattr(feed.store, "read_shard", read_shard)
    feed.begin_pass([Turn(SHARDS[1])])
    assert feed.acquire(SHARDS[1], time.perf_counter() + 0.01) is None
    assert feed.trace.spans() == []
    released.set()
    assert feed.acquire(SHARDS[1]).num_bytes > 0


def test_a_restart_drops_what_was_read_ahead(feed):
    feed.begin_pass([Turn(SHARDS[1])])
    feed.acquire(SHARDS[1])
    feed.release(SHARDS[1])
    feed.end_pass([Turn(SHARDS[1])])
    eventually(lambda: feed.bytes_read == 2 * feed.store.manifest.shards[SHARDS[1]].bytes)
    feed.begin_pass([Turn(SHARDS[2])], restart=True)
    assert feed.acquire(SHARDS[2]).num_bytes == feed.store.manifest.shards[SHARDS[2]].bytes
