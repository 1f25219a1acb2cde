"""What fails in the middle of a pass comes out as it is, and the next pass is right."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import threading
import time
from queue import SimpleQueue

import pytest

from offramp.errors import DamagedError
from tests.runtime.driver import answers, encode, expected
from tests.toy import Toy, layer_shards, open_engine, write_toy

ROWS = ["abc", "defghijkl", "k"]


def fail_once(store, shard, error):
    """The next read of `shard` raises `error`."""
    read, pending = store.read_shard, [error]

    def read_shard(name, view, **options):
        if name == shard and pending:
            raise pending.pop()
        return read(name, view, **options)

    store.read_shard = read_shard


def check_next(engine, store, policy):
    for more in (True, False):
        assert answers(engine.sweep([encode(ROWS)], more=more)) == expected(store, ROWS, policy)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O"), DamagedError("flipped"), MemoryError()], ids=repr)
@pytest.mark.parametrize("shard", ["embedding", "layer-01-up", "head"])
@pytest.mark.parametrize("num_slots", [0, 1, 3])
def test_what_the_reader_raises_comes_out_of_the_engine(shelf, error, shard, num_slots):
    store = shelf.open(Toy())
    residents = [] if num_slots else ["embedding", "head", *layer_shards(store)]
    engine = open_engine(store, "none", num_slots, residents)
    fail_once(store, shard, error)
    with pytest.raises(type(error)) as caught:
        engine.sweep([encode(ROWS)])
    assert caught.value is error
    check_next(engine, store, "none")
    engine.close()


def test_an_error_of_an_idle_read_comes_out_of_the_next_batch(shelf):
    store = shelf.open(Toy())
    engine = open_engine(store, "none", 2)
    engine.sweep([encode(ROWS)])
    fail_once(store, "layer-00-attention", OSError(errno.EIO, "I/O"))
    engine.feed.end_pass(engine.turns(1))
    with pytest.raises(OSError, match="I/O"):
        engine.sweep([encode(ROWS)])
    check_next(engine, store, "none")
    engine.close()


@pytest.mark.parametrize("error", [ValueError("shapes"), MemoryError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("kind", ["embedding", "attention", "down", "exit", "head"])
def test_what_the_backend_raises_comes_out_of_the_engine(shelf, error, kind):
    store = shelf.open(Toy())
    engine = open_engine(store, "patience:2", 2, ["layer-01-up"])
    engine.backend.fail[kind] = error
    with pytest.raises(type(error)) as caught:
        engine.sweep([encode(ROWS)])
    assert caught.value is error
    check_next(engine, store, "patience:2")
    engine.close()


@pytest.fixture
def interrupts():
    """`ask(delay)`: raise KeyboardInterrupt in this thread so many seconds later; `pending` while it has not come."""

    class Interrupts:
        pending, delays = False, SimpleQueue()

        def ask(self, delay):
            self.pending = True
            self.delays.put(delay)

        def send(self, main):
            for delay in iter(self.delays.get, None):
                time.sleep(delay)
                signal.pthread_kill(main, signal.SIGUSR1)

        def arrive(self, *_):
            self.pending = False
            raise KeyboardInterrupt

    interrupts = Interrupts()
    before = signal.signal(signal.SIGUSR1, interrupts.arrive)
    sender = threading.Thread(target=interrupts.send, args=[threading.get_ident()])
    sender.start()
    yield interrupts
    interrupts.delays.put(None)
    sender.join()
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("reads", ["buffered", "mapped"])
def test_an_interrupt_at_any_moment_leaves_the_next_batch_right(shelf, interrupts, no_collector, reads):
    """Signals at random moments: they land anywhere in the engine and the ring."""
    store, rng = shelf.open(Toy()), random.Random(0)
    engine = open_engine(store, "patience:1", 2, ["layer-01-up"], reads=reads)
    wanted = expected(store, ROWS, "patience:1")
    for _ in range(100):
        with contextlib.suppress(KeyboardInterrupt):
            interrupts.ask(rng.uniform(0, 3e-3))
            while interrupts.pending:
                assert answers(engine.sweep([encode(ROWS)], more=rng.random() < 0.5)) == wanted
        assert answers(engine.sweep([encode(ROWS)])) == wanted
    engine.close()


@pytest.mark.parametrize("reads", ["buffered", "direct", "mapped"])
def test_a_damaged_shard_is_reported_by_its_file(tmp_path, reads):
    store = write_toy(tmp_path / "store", Toy())
    file = store.path / "layer-01-up.safetensors"
    flipped = bytearray(file.read_bytes())
    flipped[4100] ^= 1
    file.write_bytes(flipped)
    engine = open_engine(store, "none", 2, reads=reads)
    for _ in range(2):
        with pytest.raises(DamagedError, match=r"sha256 differs .*layer-01-up"):
            engine.sweep([encode(ROWS)])
    engine.close()


@pytest.mark.parametrize(
    ("reads", "message"), [("buffered", "file ends at byte 4096"), ("mapped", "file has 4096 bytes")]
)
def test_a_shard_that_is_cut_while_it_is_open_is_reported(tmp_path, reads, message):
    store = write_toy(tmp_path / "store", Toy())
    engine = open_engine(store, "none", 2, reads=reads)
    engine.sweep([encode(ROWS)])
    os.truncate(store.path / "layer-01-up.safetensors", 4096)
    with pytest.raises(DamagedError, match=message):
        engine.sweep([encode(ROWS)])
    engine.close()


def test_close_stops_the_reader_and_the_backend(shelf):
    before = set(threading.enumerate())
    engine = open_engine(shelf.open(Toy()), "none", 2)
    engine.sweep([encode(ROWS)], more=True)
    engine.close()
    engine.close()
    assert engine.backend.closed
    assert set(threading.enumerate()) <= before
