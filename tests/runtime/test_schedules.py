"""Random schedules of one engine: answers, exits, failures, cancelled reads, forks, closing and opening, in any order.

`OFFRAMP_SCHEDULES=100000` runs as many; without it, a sample.
"""

import errno
import os
import random
import signal
import threading
import time
from functools import partial

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from offramp.errors import DamagedError
from offramp.runtime import mapping
from offramp.runtime.guard import NO_DEADLINE, DeadlineGuard
from offramp.store import reader
from tests.forked import in_child
from tests.leases import num_leases
from tests.runtime.conftest import DEADLOCK_SECONDS
from tests.runtime.driver import answers, batches, encode, expected, logits_alone
from tests.toy import KINDS, Toy, layer_shards, open_engine

EARLIER = set()
"""Threads of tests before this one."""
NUM_SCHEDULES = int(os.environ.get("OFFRAMP_SCHEDULES", "40"))
STEPS = 12
TOYS = (Toy(), Toy(shared=True), Toy(exit_bias=((2, 50.0),), seed=3), Toy(whole=True), Toy(padding_bytes=1 << 16))
POLICIES = ("none", "stage:2", "patience:1", "confidence:0.6", "patience:2|confidence:0.9")
READ_ERRORS = st.sampled_from((OSError, MemoryError, DamagedError))
COMPUTE_ERRORS = st.sampled_from((ValueError, MemoryError, KeyboardInterrupt))
DELAYS = (0, 0, 0, 0, 1e-5, 1e-4, 1e-3)
"""Seconds that a read may take longer."""


class Disk:
    """The reads of a store, delayed at random. `errors` are raised by the next reads."""

    def __init__(self, store, seed):
        self._read, self._random = store.read_shard, random.Random(seed)
        self.errors, self.raised, self.num_bytes = [], [], 0
        store.read_shard = self.read_shard
        self._verify = reader.verify_mapped
        mapping.verify_mapped = self.verify_mapped

    def disturb(self):
        time.sleep(self._random.choice(DELAYS))
        if self.errors:
            self.raised.append(self.errors.pop())
            raise self.raised[-1]

    def verify_mapped(self, *args):
        self.disturb()
        return self._verify(*args)

    def read_shard(self, name, view, **options):
        self.disturb()
        num_bytes, complete = self._read(name, view, **options)
        self.num_bytes += num_bytes
        return num_bytes, complete


class Schedules(RuleBasedStateMachine):
    """One engine on the toy backend, compared with the toy computed row by row without ring or engine."""

    shelf = None

    def __init__(self):
        super().__init__()
        signal.setitimer(signal.ITIMER_REAL, DEADLOCK_SECONDS, 5)  # for each schedule, not for all of them
        self.engine = None

    @initialize(
        toy=st.sampled_from(TOYS),
        policy=st.sampled_from(POLICIES),
        num_slots=st.integers(0, 3),
        stays=st.sets(st.integers(0, 13)),
        deadline_seconds=st.sampled_from((None, None, 1e-3, 10.0)),
        reads=st.sampled_from(("buffered", "mapped")),
        seed=st.integers(0, 1 << 30),
    )
    def begin(self, toy, policy, num_slots, stays, deadline_seconds, reads, seed):
        self.store, self.policy, self.deadline_seconds = self.shelf.open(toy), policy, deadline_seconds
        shards = ["embedding", *layer_shards(self.store), "head"]
        self.num_slots = max(num_slots, 3) if toy.whole and num_slots else num_slots
        self.residents = [name for place, name in enumerate(shards) if place in stays or not num_slots]
        self.disk, self.reads = Disk(self.store, seed), reads
        self.open()

    def open(self):
        guard = NO_DEADLINE if self.deadline_seconds is None else DeadlineGuard(self.deadline_seconds)
        self.engine = open_engine(
            self.store, self.policy, self.num_slots, self.residents, guard=guard, reads=self.reads
        )
        self.disk.num_bytes, self.gathered_bytes, count_read = 0, 0, self.engine.feed.count_read

        def count(num_bytes):
            self.gathered_bytes += num_bytes
            count_read(num_bytes)

        self.engine.feed.count_read = count
        if self.reads == "mapped":
            self.engine.feed._mapped.fill = partial(self.count_filled, self.engine.feed._mapped.fill)

    def count_filled(self, fill, *args):
        """Count what is mapped as read; `fill` may copy it instead."""
        before = self.disk.num_bytes
        num_bytes, complete = fill(*args)
        self.disk.num_bytes = before + num_bytes
        return num_bytes, complete

    def sweep(self, parts, more):
        """Answer batches rightly, or raise an error that was asked for."""
        try:
            outcomes = self.engine.sweep([encode(rows) for rows in parts], more=more)
        except (OSError, DamagedError, MemoryError, ValueError, KeyboardInterrupt) as error:
            assert any(error is raised for raised in self.disk.raised), error
            return
        rows = [row for part in parts for row in part]
        wanted = expected(self.store, rows, self.policy)
        for outcome, row, found, right in zip(outcomes, rows, answers(outcomes), wanted, strict=True):
            if outcome.is_cut:
                assert self.deadline_seconds is not None
                right = (found[0], logits_alone(self.store.path, row)[found[0] - 1].tobytes())
            assert found == right

    @rule(rows=batches, more=st.booleans())
    def answer(self, rows, more):
        self.sweep([rows], more)

    @precondition(lambda self: self.deadline_seconds is None and self.num_slots != 1)  # `up` and `down` run together
    @rule(parts=st.lists(batches, min_size=2, max_size=3), more=st.booleans())
    def answer_in_one_sweep(self, parts, more):
        self.sweep(parts, more)

    @rule(rows=batches, kernel=st.sampled_from((*KINDS, "exit")), kind=COMPUTE_ERRORS, more=st.booleans())
    def fail_while_computing(self, rows, kernel, kind, more):
        self.disk.raised.append(kind("asked for"))
        self.engine.backend.fail[kernel] = self.disk.raised[-1]
        self.sweep([rows], more)
        self.engine.backend.fail.clear()

    @rule(kind=READ_ERRORS)
    def fail_the_next_read(self, kind):
        self.disk.errors.append(kind(errno.EIO, "asked for") if kind is OSError else kind("asked for"))

    @rule(num_rows=st.integers(1, 5), num_used=st.integers(0, 3))
    def leave_a_pass(self, num_rows, num_used):
        """As an interrupt would leave it."""
        feed, turns = self.engine.feed, self.engine.turns(num_rows)
        feed.begin_pass(turns)
        for turn in turns[: min(num_used, self.num_slots)]:
            if turn.after:
                break
            try:
                feed.acquire(turn.shard)
            except (OSError, DamagedError, MemoryError) as error:
                assert any(error is raised for raised in self.disk.raised), error
                break

    @rule(num_rows=st.integers(1, 5))
    def read_ahead(self, num_rows):
        self.engine.feed.end_pass(self.engine.turns(num_rows))

    @rule()
    def end_a_pass(self):
        self.engine.feed.end_pass()

    @rule(rows=batches, more=st.booleans())
    def fork(self, rows, more):
        def act():
            self.sweep([rows], more)
            self.sweep([rows], more)
            self.engine.close()
            assert readers() == []

        assert in_child(act) == 0

    @rule(is_closed_twice=st.booleans(), by_thread=st.booleans())
    def close_and_open(self, is_closed_twice, by_thread):
        self.close(by_thread)
        if is_closed_twice:
            self.engine.close()
        try:
            self.engine.sweep([encode(["a"])])
        except RuntimeError as error:
            assert str(error) == "the ring is closed"
        else:
            raise AssertionError("a closed engine has answered")
        self.open()

    def close(self, by_thread=False):
        closing = threading.Thread(target=self.engine.close)
        closing.run() if not by_thread else closing.start()
        if by_thread:
            closing.join()
        feed = self.engine.feed
        assert readers() == [] and self.engine.backend.closed and num_leases() == 0
        assert feed.bytes_used <= feed.bytes_read == self.disk.num_bytes + self.gathered_bytes

    @invariant()
    def no_slot_is_lost(self):
        if self.engine is not None:
            pool = self.engine.feed._pool
            pool = pool if self.reads == "buffered" else pool._pool
            with self.engine.feed._lock:
                assert len(pool._slots) == self.num_slots
                assert len({id(slot) for slot in pool._free}) == len(pool._free) <= self.num_slots
                assert len(readers()) <= 1

    def teardown(self):
        mapping.verify_mapped = reader.verify_mapped
        if self.engine is not None:
            self.close()
            self.store.close()


def readers():
    """Threads that read ahead, other than those that tests before have left."""
    return [each for each in threading.enumerate() if each.name == "offramp-reader" and each not in EARLIER]


def test_no_schedule_breaks_an_engine(shelf):
    Schedules.shelf = shelf
    EARLIER.update(threading.enumerate())
    options = settings(
        max_examples=NUM_SCHEDULES,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Schedules, settings=options)
