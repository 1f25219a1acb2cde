"""Deadlines: what the guard decides from times that it is told, and that the engine never waits past one."""

import threading
import time

import pytest

from offramp.errors import UsageError
from offramp.runtime.backend import StoppedError
from offramp.runtime.guard import DeadlineGuard, guard_for
from offramp.units import format_duration, parse_duration
from tests.runtime.driver import answers, encode, expected
from tests.toy import Toy, layer_shards, open_engine

ROWS = ["abc", "defghijkl", "k"]
LONG = 1e6
"""Seconds; no test waits so long."""


def test_it_goes_on_while_the_next_answer_is_in_time():
    guard = DeadlineGuard(1.0, lambda exit_index, length: 0.1 * exit_index)
    assert guard.allows_next_exit(1, 8, 0.8)
    assert not guard.allows_next_exit(1, 8, 0.801)
    assert guard.allows_next_exit(2, 8, 0.7)
    assert not guard.allows_next_exit(2, 8, 0.71)


def test_what_was_seen_counts_if_it_is_slower_than_expected():
    guard = DeadlineGuard(1.0, lambda exit_index, length: 0.1)
    guard.record(2, 8, 0.5, 0.2)
    assert not guard.allows_next_exit(1, 9, 0.6), "lengths alike share what was seen"
    assert guard.allows_next_exit(1, 100, 0.6), "others do not"
    assert guard.allows_next_exit(2, 9, 0.6), "nor do other exits"
    assert guard.latest_seconds(1, 8) == pytest.approx(0.8), "0.2 are for computing"
    guard.record(2, 8, 0.3, 0.1)
    assert not guard.allows_next_exit(1, 8, 0.6), "the slowest counts"


def test_what_was_slow_is_tried_again():
    guard = DeadlineGuard(1.0)
    guard.record(2, 8, 10.0, 0.0)
    tries = 0
    while not guard.allows_next_exit(1, 8, 0.1):
        guard.begin()
        tries += 1
    assert 20 < tries < 300


@pytest.mark.parametrize(("text", "seconds"), [("40ms", 0.04), ("0.5 s", 0.5), ("250us", 0.00025), (0.1, 0.1)])
def test_durations_are_read(text, seconds):
    assert parse_duration(text) == pytest.approx(seconds)
    assert guard_for(text).deadline_seconds == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "ms", "-1ms", "0", "0ms", "1h", "nan", "inf", True, float("inf"), -1])
def test_other_durations_are_refused(text):
    with pytest.raises(ValueError, match="a duration must be a number above 0"):
        parse_duration(text)


def test_durations_are_shown():
    assert format_duration(0.0123) == "12.3 ms"
    assert format_duration(2.5) == "2.50 s"


@pytest.mark.parametrize("policy", ["none", "patience:1", "stage:3"])
@pytest.mark.parametrize("residents", [(), "all"])
def test_a_deadline_that_is_far_changes_no_answer(shelf, policy, residents):
    store = shelf.open(Toy())
    kept = ["embedding", "head", *layer_shards(store)] if residents else ()
    engine = open_engine(store, policy, 2, kept, guard=DeadlineGuard(LONG))
    for _ in range(3):
        outcomes = engine.sweep([encode(ROWS)], more=True)
        assert answers(outcomes) == expected(store, ROWS, policy)
        assert not any(outcome.is_cut for outcome in outcomes)
    engine.close()


@pytest.mark.parametrize("exit_index", [1, 2, 3])
def test_who_has_no_time_for_the_next_exit_leaves_with_the_answer_of_this_one(shelf, exit_index):
    store = shelf.open(Toy())
    guard = DeadlineGuard(LONG, lambda to, length: 2 * LONG if to == exit_index + 1 else 0.0)
    engine = open_engine(store, "none", 2, guard=guard)
    outcomes = engine.sweep([encode(ROWS)])
    assert answers(outcomes) == expected(store, ROWS, f"stage:{exit_index}")
    assert all(outcome.is_cut for outcome in outcomes)
    engine.close()


def test_only_who_is_still_there_is_cut(shelf):
    store = shelf.open(Toy())
    policy = "patience:1"
    deep = [row for row in ("abc", "defghijkl", "k", "", "kkk", "lb", "abcdefghij") if _exit(store, row, policy) > 2]
    early = [row for row in ("abc", "defghijkl", "k", "", "kkk", "lb") if _exit(store, row, policy) == 2]
    assert deep and early, "the toy has both"
    guard = DeadlineGuard(LONG, lambda to, length: 2 * LONG if to == 3 else 0.0)
    engine = open_engine(store, policy, 2, guard=guard)
    outcomes = engine.sweep([encode([deep[0], early[0]])])
    assert [outcome.is_cut for outcome in outcomes] == [True, False]
    assert answers(outcomes) == expected(store, [deep[0], early[0]], "stage:2")
    engine.close()


def _exit(store, row, policy):
    return expected(store, [row], policy)[0][0]


class Stuck:
    """A store whose reads of one shard do not end before they are cancelled or released."""

    def __init__(self, store, shard):
        self.read, self.shard, self.released = store.read_shard, shard, threading.Event()
        self.cancelled = threading.Event()
        store.read_shard = self.read_shard

    def read_shard(self, name, view, *, cancelled, **options):
        while name == self.shard and not self.released.wait(0.001):
            if cancelled():
                self.cancelled.set()
                return 0, False
        return self.read(name, view, cancelled=cancelled, **options)


@pytest.mark.parametrize("shard", ["layer-01-attention", "layer-01-down", "layer-02-up", "head"])
def test_a_read_that_does_not_end_is_left_at_the_deadline(shelf, shard):
    """The answer goes out, the read is cancelled, and the next request is right."""
    store = shelf.open(Toy())
    stuck = Stuck(store, shard)
    engine = open_engine(store, "none", 1, guard=DeadlineGuard(0.4))
    outcomes = engine.sweep([encode(ROWS)])
    stage = len(store.program.layers) - 1 if shard == "head" else int(shard[6:8])
    assert answers(outcomes) == expected(store, ROWS, f"stage:{stage}")
    assert all(outcome.is_cut for outcome in outcomes)
    assert stuck.cancelled.wait(5)
    stuck.released.set()
    engine.gate.guard = DeadlineGuard(LONG)
    assert answers(engine.sweep([encode(ROWS)])) == expected(store, ROWS, "none")
    engine.close()


@pytest.mark.parametrize("answered", [0, 1, 2, 3])
def test_a_kernel_that_does_not_end_is_stopped_at_the_deadline(shelf, clock, answered):
    """The last answer goes out, the next request is right, and without an answer the kernel is not told to stop."""
    store = shelf.open(Toy())
    engine, deadline = open_engine(store, "none", 1, guard=DeadlineGuard(LONG)), 0.05
    compute, slow = engine.backend.run, engine.schedule.stages[answered + 1].steps[1]

    def run(state, step, weights):
        if step is slow and state.latest is not None:
            clock.sleep(max(state.latest - clock.read(), 0))
            raise StoppedError
        compute(state, step, weights)

    engine.backend.run = run
    began = clock.read()
    engine.gate.guard = DeadlineGuard(deadline)
    outcomes = engine.sweep([encode(ROWS)], began=began)
    seconds = clock.read() - began
    if answered:
        assert answers(outcomes) == expected(store, ROWS, f"stage:{answered}")
        assert all(outcome.is_cut for outcome in outcomes)
        assert seconds > deadline, "it counts as late"
    engine.backend.run, engine.gate.guard = compute, DeadlineGuard(LONG)
    assert answers(engine.sweep([encode(ROWS)])) == expected(store, ROWS, "none")
    engine.close()


def test_without_any_answer_it_waits(shelf):
    store = shelf.open(Toy())
    stuck = Stuck(store, "layer-00-up")
    threading.Timer(0.1, stuck.released.set).start()
    engine = open_engine(store, "none", 1, guard=DeadlineGuard(0.01))
    outcomes = engine.sweep([encode(ROWS)])
    assert answers(outcomes) == expected(store, ROWS, "stage:1")
    assert all(outcome.is_cut for outcome in outcomes)
    engine.close()


def test_a_store_without_exits_has_no_deadline(shelf):
    store = shelf.open(Toy(exits=False))
    with pytest.raises(UsageError, match="a deadline needs exits and this store has none"):
        open_engine(store, "none", 1, guard=DeadlineGuard(1.0))


def test_a_model_of_one_layer_has_no_deadline(shelf):
    store = shelf.open(Toy(num_layers=1, exits=False))
    with pytest.raises(UsageError, match="a deadline needs exits and this model has one layer"):
        open_engine(store, "none", 1, guard=DeadlineGuard(1.0))


def test_a_disk_that_becomes_slow_leads_to_earlier_exits(shelf):
    """Three shards a layer, none resident: at 0.2 s each the fourth layer is out of reach."""
    store = shelf.open(Toy())
    read, pause = store.read_shard, [0.0]

    def read_shard(name, view, **options):
        time.sleep(pause[0])
        return read(name, view, **options)

    store.read_shard = read_shard
    engine = open_engine(store, "none", 1, guard=DeadlineGuard(2.0))
    assert answers(engine.sweep([encode(ROWS)])) == expected(store, ROWS, "none")
    pause[0] = 0.2
    slow = engine.sweep([encode(ROWS)])
    assert all(outcome.is_cut and 1 <= outcome.exit_stage < 4 for outcome in slow)
    engine.close()
