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
from tests.toy import Toy, layer_shards, open_loop, write_toy

ROWS = ["abc", "defghijkl", "k"]


def fail_once(store, shard, error):
    """The next read of `shard` raises `error`."""
    read, pending = store.read_shard, [error]

    def read_shard(name, view, **options):
        if name == shard and pending:
            raise pending.pop()
        return read(name, view, **options)

    store.read_shard = read_shard


def check_next(loop, store, policy):
    for more in (True, False):
        assert answers(loop.sweep([encode(ROWS)], more=more)) == expected(store, ROWS, policy)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O"), DamagedError("flipped"), MemoryError()], ids=repr)
@pytest.mark.parametrize("shard", ["embedding", "layer-01-up", "head"])
@pytest.mark.parametrize("num_slots", [0, 1, 3])
def test_what_the_reader_raises_comes_out_of_the_loop(shelf, error, shard, num_slots):
    store = shelf.open(Toy())
    residents = [] if num_slots else ["embedding", "head", *layer_shards(store)]
    loop = open_loop(store, "none", num_slots, residents)
    fail_once(store, shard, error)
    with pytest.raises(type(error)) as caught:
        loop.sweep([encode(ROWS)])
    assert caught.value is error
    check_next(loop, store, "none")
    loop.close()


def test_an_error_of_an_idle_read_comes_out_of_the_next_batch(shelf):
    store = shelf.open(Toy())
    loop = open_loop(store, "none", 2)
    loop.sweep([encode(ROWS)])
    fail_once(store, "layer-00-attention", OSError(errno.EIO, "I/O"))
    loop.ring.end_pass(loop.turns(1))
    with pytest.raises(OSError, match="I/O"):
        loop.sweep([encode(ROWS)])
    check_next(loop, store, "none")
    loop.close()


@pytest.mark.parametrize("error", [ValueError("shapes"), MemoryError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("kind", ["embedding", "attention", "down", "exit", "head"])
def test_what_the_backend_raises_comes_out_of_the_loop(shelf, error, kind):
    store = shelf.open(Toy())
    loop = open_loop(store, "patience:2", 2, ["layer-01-up"])
    loop.backend.fail[kind] = error
    with pytest.raises(type(error)) as caught:
        loop.sweep([encode(ROWS)])
    assert caught.value is error
    check_next(loop, store, "patience:2")
    loop.close()


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


def test_an_interrupt_at_any_moment_leaves_the_next_batch_right(shelf, interrupts, no_collector):
    """Signals at random moments: they land anywhere in the loop and the ring."""
    store, rng = shelf.open(Toy()), random.Random(0)
    loop = open_loop(store, "patience:1", 2, ["layer-01-up"])
    wanted = expected(store, ROWS, "patience:1")
    for _ in range(200):
        with contextlib.suppress(KeyboardInterrupt):
            interrupts.ask(rng.uniform(0, 3e-3))
            while interrupts.pending:
                assert answers(loop.sweep([encode(ROWS)], more=rng.random() < 0.5)) == wanted
        assert answers(loop.sweep([encode(ROWS)])) == wanted
    loop.close()


@pytest.mark.parametrize("direct", [False, True])
def test_a_damaged_shard_is_reported_by_its_file(tmp_path, direct):
    store = write_toy(tmp_path / "store", Toy())
    file = store.path / "layer-01-up.safetensors"
    flipped = bytearray(file.read_bytes())
    flipped[4100] ^= 1
    file.write_bytes(flipped)
    loop = open_loop(store, "none", 2, direct=direct)
    for _ in range(2):
        with pytest.raises(DamagedError, match=r"sha256 differs .*layer-01-up"):
            loop.sweep([encode(ROWS)])
    loop.close()


def test_a_shard_that_is_cut_while_it_is_open_is_reported(tmp_path):
    store = write_toy(tmp_path / "store", Toy())
    loop = open_loop(store, "none", 2)
    loop.sweep([encode(ROWS)])
    os.truncate(store.path / "layer-01-up.safetensors", 4096)
    with pytest.raises(DamagedError, match="file ends at byte 4096"):
        loop.sweep([encode(ROWS)])
    loop.close()


def test_close_stops_the_reader_and_the_backend(shelf):
    before = set(threading.enumerate())
    loop = open_loop(shelf.open(Toy()), "none", 2)
    loop.sweep([encode(ROWS)], more=True)
    loop.close()
    loop.close()
    assert loop.backend.closed
    assert set(threading.enumerate()) <= before
