"""What the engine reads, and who pays: bytes are counted where they are read and compared with what rows are told.

`SURE` is a toy whose only confident exit is a given one, so that every row leaves there and the layers after it are
there to be read in vain.
"""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offramp.errors import DamagedError
from offramp.runtime.gate import MIN_OBSERVATIONS
from tests.runtime.driver import answers, batches, encode, eventually, expected
from tests.selection import examples
from tests.toy import Toy, ToyBackend, layer_shards, open_engine

quick = settings(
    deadline=None, max_examples=examples(60), database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NUM_LAYERS = 5


def sure(index, **changes):
    """Every row leaves at exit `index` under `confidence:0.9`."""
    return Toy(NUM_LAYERS, exit_spread=0, exit_bias=((index, 9.0),), **changes)


def order_of(store):
    """Shards in the order of a pass."""
    return ["embedding", *layer_shards(store), "head"]


def bytes_of(store, names):
    return sum(store.manifest.shards[name].bytes for name in names)


def row_bytes(engine):
    """What the last pass read of the tables."""
    last = engine.feed.pass_index - 1
    return sum(span.bytes for span in engine.feed.trace.spans(last) if span.name == "rows")


def reads(engine, kind=("read", "idle_read")):
    """Shards that the reader read, whole or in part, in order."""
    return [span.name for span in engine.feed.trace.spans() if span.thread == "reader" and span.kind in kind]


class Meter:
    """Counts what a store reads, and fails or stops where it is told to."""

    def __init__(self, store):
        self.store, self.total, self.errors = store, 0, {}
        self._read, self._gather = store.read_shard, store.gather
        store.read_shard, store.gather = self.read_shard, self.gather

    def read_shard(self, name, view, **options):
        if name in self.errors:
            raise self.errors.pop(name)
        num_bytes, complete = self._read(name, view, **options)
        self.total += num_bytes
        return num_bytes, complete

    def gather(self, *arguments, **options):
        rows, num_bytes = self._gather(*arguments, **options)
        self.total += num_bytes
        return rows, num_bytes


@pytest.mark.parametrize("index", [1, 2, 4])
@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("residents", [0, 1, 2], ids=["streamed", "every other resident", "resident"])
def test_an_exit_reads_the_shards_before_it_and_no_more_than_the_slots_beyond(shelf, index, num_slots, residents):
    store = shelf.open(sure(index))
    order = order_of(store)
    resident = [[], order[::2], order][residents]
    engine = open_engine(store, "confidence:0.9", num_slots, resident)
    needed = order[: 1 + 3 * index]
    (outcome,) = engine.sweep([encode(["abc"])])
    rows = row_bytes(engine)
    assert (outcome.exit_stage, outcome.bytes_read) == (index, rows + bytes_of(store, needed))
    engine.close()
    assert order[: len(needed)] == reads(engine)[: len(needed)]
    assert set(reads(engine)) <= set(order[: len(needed) + num_slots])
    assert engine.feed.bytes_idle <= bytes_of(store, order[len(needed) : len(needed) + num_slots])
    assert engine.feed.bytes_read == outcome.bytes_read + engine.feed.bytes_idle


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_an_idle_gap_reads_the_first_shards_of_the_next_pass_and_nobody_pays(shelf, num_slots):
    store = shelf.open(sure(2))
    order = order_of(store)
    engine = open_engine(store, "none", num_slots)
    (first,) = engine.sweep([encode(["abc"])], more=True)
    assert first.bytes_read == row_bytes(engine) + bytes_of(store, order)
    eventually(lambda: len(reads(engine, ["idle_read"])) == num_slots)
    (second,) = engine.sweep([encode(["abc"])], more=False)
    assert second.bytes_read == row_bytes(engine) + bytes_of(store, order[num_slots:])
    engine.close()
    assert reads(engine, ["idle_read"]) == order[:num_slots]
    assert engine.feed.bytes_idle == bytes_of(store, order[:num_slots])
    assert engine.feed.bytes_read == first.bytes_read + second.bytes_read + engine.feed.bytes_idle


def test_an_idle_gap_passes_over_residents(shelf):
    store = shelf.open(sure(2))
    order = order_of(store)
    engine = open_engine(store, "none", 2, order[:4])
    engine.sweep([encode(["abc"])], more=True)
    eventually(lambda: len(reads(engine, ["idle_read"])) == 2)
    engine.close()
    assert reads(engine, ["idle_read"]) == order[4:6]


def test_nothing_is_read_ahead_when_nothing_follows(shelf):
    engine = open_engine(shelf.open(sure(2)), "none", 3)
    engine.sweep([encode(["abc"])], more=False)
    assert not engine.feed._wanted
    engine.close()
    assert engine.feed.bytes_idle == 0


@pytest.mark.parametrize("index", [1, 3])
def test_a_fixed_stage_reads_nothing_past_it(shelf, index):
    store = shelf.open(sure(2))
    engine = open_engine(store, f"stage:{index}", 3)
    for _ in range(3):
        engine.sweep([encode(["abc", "d"])], more=True)
    engine.close()
    assert set(reads(engine)) == {"embedding", *layer_shards(store, index)}
    assert "head" not in engine.backend.computed
    assert engine.backend.computed.count("exit") == 3  # exits before it are not even asked


class Patient(ToyBackend):
    """At an exit it waits until `condition()`."""

    def __init__(self):
        super().__init__()
        self.condition = lambda: True

    def exit_logits(self, state, value, weights):
        eventually(self.condition)
        return super().exit_logits(state, value, weights)


@quick
@given(sweep=st.lists(batches, min_size=1, max_size=4), policy=st.sampled_from(["none", "patience:1", "stage:2"]))
def test_a_sweep_reads_each_shard_once_and_its_rows_pay_alike(shelf, sweep, policy):
    """However many batches there are: all of them together pay for one pass."""
    store = shelf.open(Toy(NUM_LAYERS))
    engine = open_engine(store, policy, 2)
    outcomes = engine.sweep([encode(rows) for rows in sweep])
    engine.close()
    deepest = max(outcome.exit_stage for outcome in outcomes)
    read = [name for name in reads(engine) if name in layer_shards(store, deepest)]
    assert sorted(read) == sorted(layer_shards(store, deepest))
    assert sum(outcome.bytes_read for outcome in outcomes) == engine.feed.bytes_read - engine.feed.bytes_idle
    if policy == "none":
        paid = bytes_of(store, order_of(store)) + row_bytes(engine)
        assert sum(outcome.bytes_read for outcome in outcomes) == paid


def test_nothing_past_a_likely_exit_is_read_before_it_has_decided(shelf):
    store = shelf.open(sure(2))
    allowed = {"embedding", *layer_shards(store, 2)}
    backend = Patient()
    engine = open_engine(store, "from:2>confidence:0.9", 3, backend=backend)
    for count in range(1, MIN_OBSERVATIONS + 1):
        backend.condition = lambda count=count: sum(name not in allowed for name in reads(engine)) >= 2 * count
        engine.sweep([encode(["abc"])])
    backend.condition = lambda: True
    before = engine.feed.pass_index
    for _ in range(5):
        engine.sweep([encode(["abc"])], more=True)
    engine.close()
    late = {span.name for span in engine.feed.trace.spans() if span.thread == "reader" and span.pass_index > before}
    assert late and late <= allowed


@pytest.mark.parametrize(
    ("reached", "left", "num_rows", "gated"),
    [(8, 5, 1, True), (8, 4, 1, False), (7, 7, 1, False), (9, 0, 1, False), (100, 91, 8, False), (100, 92, 8, True)],
)
def test_the_gate_needs_eight_rows_and_a_pass_that_ends_there_more_likely_than_not(
    shelf, reached, left, num_rows, gated
):
    """Of eight rows all must leave: 0.91 ** 8 is below a half, 0.92 ** 8 above it."""
    store = shelf.open(sure(2))
    engine = open_engine(store, "confidence:0.9")
    engine.gate.exit_statistics.evaluated[2], engine.gate.exit_statistics.exited[2] = reached, left
    engine.close()
    after = {turn.shard: turn.after for turn in engine.turns(num_rows)}
    expected_after = [2 * (gated and place >= 7) for place in range(len(after))]
    assert [after[name] for name in order_of(store)] == expected_after


def test_an_exit_stops_a_slow_read_at_its_next_chunk(shelf):
    store = shelf.open(sure(1, padding_bytes=30 << 20))
    slow, reached, go, asked = "layer-01-attention", threading.Event(), threading.Event(), []

    class Waiting(ToyBackend):
        def exit_logits(self, state, value, weights):
            reached.wait()
            return super().exit_logits(state, value, weights)

    def read_shard(name, view, *, cancelled, **how):
        def stop():
            asked.append(name)
            if name == slow and asked.count(slow) == 2:  # one chunk is read
                reached.set()
                go.wait()
            return cancelled()

        return type(store).read_shard(store, name, view, cancelled=stop, **how)

    store.read_shard = read_shard
    engine = open_engine(store, "confidence:0.9", 2, backend=Waiting())
    (outcome,) = engine.sweep([encode(["abc"])])
    go.set()
    engine.close()
    assert asked.count(slow) == 2
    assert engine.feed.bytes_idle == 2 << 20
    assert engine.feed.bytes_read == outcome.bytes_read + (2 << 20)


ERRORS = st.sampled_from([OSError(5, "I/O"), MemoryError(), DamagedError("flipped"), KeyboardInterrupt()])


@quick
@given(data=st.data(), toy=st.sampled_from([Toy(), Toy(shared=True), sure(2)]), num_slots=st.integers(1, 3))
def test_every_byte_is_paid_by_a_row_or_idle_whatever_happens(shelf, data, toy, num_slots):
    store = shelf.open(toy, data.draw(st.sampled_from(["always", "never"])))
    meter, paid, injected = Meter(store), 0, []
    residents = data.draw(st.sets(st.sampled_from(order_of(store))))
    policy = data.draw(st.sampled_from(["none", "patience:1", "confidence:0.9", "stage:2"]))
    engine = open_engine(store, policy, num_slots, residents)
    for rows, more in data.draw(st.lists(st.tuples(batches, st.booleans()), min_size=1, max_size=4)):
        error, where = (
            data.draw(st.one_of(st.none(), ERRORS)),
            data.draw(st.sampled_from(["down", "exit", *order_of(store)])),
        )
        failures = engine.backend.fail if where in ("down", "exit") else meter.errors
        if error is not None:
            failures[where] = error
            injected.append(error)
        try:
            outcomes = engine.sweep([encode(rows)], more=more)
            assert answers(outcomes) == expected(store, rows, policy)
            paid += sum(outcome.bytes_read for outcome in outcomes)
        except (OSError, MemoryError, DamagedError, KeyboardInterrupt) as caught:
            assert any(caught is error for error in injected)  # perhaps of an idle read before
        failures.pop(where, None)
    engine.close()
    assert engine.feed.bytes_read == meter.total == paid + engine.feed.bytes_idle
    assert engine.feed.bytes_idle >= 0
    store.close()


def test_a_pass_counts_the_seconds_of_all_that_was_read_for_it(shelf):
    """Whether it was read in the pass or between passes; the fill is what the engine waited for at its start."""
    store = shelf.open(Toy(4))
    read_shard, slow, done = store.read_shard, order_of(store)[0], []

    def slowly(name, *arguments, **options):
        if name == slow:
            time.sleep(0.05)
            done.append(name)
        return read_shard(name, *arguments, **options)

    store.read_shard = slowly
    engine = open_engine(store, "none", 2)
    for number in range(3):
        engine.sweep([encode(["abc"])], more=True)
        eventually(lambda number=number: len(done) == number + 2)
    engine.close()
    first, *later = engine.costs
    assert first.read_seconds >= first.fill_seconds >= 0.04
    assert all(cost.read_seconds - cost.fill_seconds >= 0.04 for cost in later)
    assert all(cost.seconds >= cost.compute_seconds > 0 for cost in engine.costs)


def test_a_read_is_shared_equally_by_the_rows_that_are_still_there(shelf):
    store = shelf.open(Toy(6))
    rows = ["abcdef"[: 1 + place % 6] * (1 + place % 3) for place in range(7)]
    engine = open_engine(store, "patience:1", 2)
    outcomes = engine.sweep([encode(rows)])
    stages = [
        ["embedding"],
        *[[name for step in stage.steps for name in step.shards] for stage in store.program.layers],
        ["head"],
    ]
    shares = [0.0] * len(rows)
    for index, names in enumerate(stages):
        here = [place for place, outcome in enumerate(outcomes) if index <= outcome.exit_stage or index == 0]
        if index == len(stages) - 1:
            here = [
                place for place, (exit_stage, _) in enumerate(expected(store, rows, "patience:1")) if exit_stage == 6
            ]
        for place in here:
            shares[place] += bytes_of(store, names) / len(here)
    engine.close()
    share_of_rows = row_bytes(engine) / len(rows)
    for outcome, share in zip(outcomes, shares, strict=True):
        assert abs(outcome.bytes_read - share - share_of_rows) <= 30  # the remainder of each read
