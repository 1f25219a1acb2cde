"""What the loop reads, and who pays: bytes are counted where they are read and compared with what rows are told.

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
from offramp.runtime.survival import MIN_OBSERVATIONS
from tests.runtime.driver import answers, batches, encode, eventually, expected
from tests.toy import Toy, ToyBackend, layer_shards, open_loop

quick = settings(
    deadline=None, max_examples=60, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
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


def row_bytes(loop):
    """What the last pass read of the tables."""
    return sum(
        span.bytes for span in loop.trace.spans() if span.name == "rows" and span.pass_index == loop._pass_index - 1
    )


def reads(loop, kind=("read", "idle_read")):
    """Shards that the reader read, whole or in part, in order."""
    return [span.name for span in loop.trace.spans() if span.thread == "reader" and span.kind in kind]


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

    def gather(self, *arguments):
        rows, num_bytes = self._gather(*arguments)
        self.total += num_bytes
        return rows, num_bytes


@pytest.mark.parametrize("index", [1, 2, 4])
@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("residents", [0, 1, 2], ids=["streamed", "every other resident", "resident"])
def test_an_exit_reads_the_shards_before_it_and_no_more_than_the_slots_beyond(shelf, index, num_slots, residents):
    store = shelf.open(sure(index))
    order = order_of(store)
    resident = [[], order[::2], order][residents]
    loop = open_loop(store, "confidence:0.9", num_slots, resident)
    needed = order[: 1 + 3 * index]
    (outcome,) = loop.sweep([encode(["abc"])])
    rows = row_bytes(loop)
    assert (outcome.exit_stage, outcome.bytes_read) == (index, rows + bytes_of(store, needed))
    loop.close()
    assert order[: len(needed)] == reads(loop)[: len(needed)]
    assert set(reads(loop)) <= set(order[: len(needed) + num_slots])
    assert loop.ring.bytes_idle <= bytes_of(store, order[len(needed) : len(needed) + num_slots])
    assert loop.ring.bytes_read == outcome.bytes_read + loop.ring.bytes_idle


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_an_idle_gap_reads_the_first_shards_of_the_next_pass_and_nobody_pays(shelf, num_slots):
    store = shelf.open(sure(2))
    order = order_of(store)
    loop = open_loop(store, "none", num_slots)
    (first,) = loop.sweep([encode(["abc"])], more=True)
    assert first.bytes_read == row_bytes(loop) + bytes_of(store, order)
    eventually(lambda: len(reads(loop, ["idle_read"])) == num_slots)
    (second,) = loop.sweep([encode(["abc"])], more=False)
    assert second.bytes_read == row_bytes(loop) + bytes_of(store, order[num_slots:])
    loop.close()
    assert reads(loop, ["idle_read"]) == order[:num_slots]
    assert loop.ring.bytes_idle == bytes_of(store, order[:num_slots])
    assert loop.ring.bytes_read == first.bytes_read + second.bytes_read + loop.ring.bytes_idle


def test_an_idle_gap_passes_over_residents(shelf):
    store = shelf.open(sure(2))
    order = order_of(store)
    loop = open_loop(store, "none", 2, order[:4])
    loop.sweep([encode(["abc"])], more=True)
    eventually(lambda: len(reads(loop, ["idle_read"])) == 2)
    loop.close()
    assert reads(loop, ["idle_read"]) == order[4:6]


def test_nothing_is_read_ahead_when_nothing_follows(shelf):
    loop = open_loop(shelf.open(sure(2)), "none", 3)
    loop.sweep([encode(["abc"])], more=False)
    assert not loop.ring._wanted
    loop.close()
    assert loop.ring.bytes_idle == 0


@pytest.mark.parametrize("index", [1, 3])
def test_a_fixed_stage_reads_nothing_past_it(shelf, index):
    store = shelf.open(sure(2))
    loop = open_loop(store, f"stage:{index}", 3)
    for _ in range(3):
        loop.sweep([encode(["abc", "d"])], more=True)
    loop.close()
    assert set(reads(loop)) == {"embedding", *layer_shards(store, index)}
    assert "head" not in loop.backend.computed
    assert loop.backend.computed.count("exit") == 3  # exits before it are not even asked


class Patient(ToyBackend):
    """At an exit it waits until `condition()`."""

    def __init__(self):
        super().__init__()
        self.condition = lambda: True

    def exit_logits(self, state, weights):
        eventually(self.condition)
        return super().exit_logits(state, weights)


@quick
@given(sweep=st.lists(batches, min_size=1, max_size=4), policy=st.sampled_from(["none", "patience:1", "stage:2"]))
def test_a_sweep_reads_each_shard_once_and_its_rows_pay_alike(shelf, sweep, policy):
    """However many batches there are: all of them together pay for one pass."""
    store = shelf.open(Toy(NUM_LAYERS))
    loop = open_loop(store, policy, 2)
    outcomes = loop.sweep([encode(rows) for rows in sweep])
    loop.close()
    deepest = max(outcome.exit_stage for outcome in outcomes)
    read = [name for name in reads(loop) if name in layer_shards(store, deepest)]
    assert sorted(read) == sorted(layer_shards(store, deepest))
    assert sum(outcome.bytes_read for outcome in outcomes) == loop.ring.bytes_used
    if policy == "none":
        paid = bytes_of(store, order_of(store)) + row_bytes(loop)
        assert sum(outcome.bytes_read for outcome in outcomes) == paid


def test_nothing_past_a_likely_exit_is_read_before_it_has_decided(shelf):
    store = shelf.open(sure(2))
    allowed = {"embedding", *layer_shards(store, 2)}
    backend = Patient()
    loop = open_loop(store, "from:2>confidence:0.9", 3, backend=backend)
    for count in range(1, MIN_OBSERVATIONS + 1):
        backend.condition = lambda count=count: sum(name not in allowed for name in reads(loop)) >= 2 * count
        loop.sweep([encode(["abc"])])
    backend.condition = lambda: True
    before = loop._pass_index
    for _ in range(5):
        loop.sweep([encode(["abc"])], more=True)
    loop.close()
    late = {span.name for span in loop.trace.spans() if span.thread == "reader" and span.pass_index > before}
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
    loop = open_loop(store, "confidence:0.9")
    loop.exit_statistics.evaluated[2], loop.exit_statistics.exited[2] = reached, left
    loop.close()
    after = {turn.shard: turn.after for turn in loop.turns(num_rows)}
    expected_after = [2 * (gated and place >= 7) for place in range(len(after))]
    assert [after[name] for name in order_of(store)] == expected_after


def test_an_exit_stops_a_slow_read_at_its_next_chunk(shelf):
    store = shelf.open(sure(1, padding_bytes=30 << 20))
    slow, reached, go, asked = "layer-01-attention", threading.Event(), threading.Event(), []

    class Waiting(ToyBackend):
        def exit_logits(self, state, weights):
            reached.wait()
            return super().exit_logits(state, weights)

    def read_shard(name, view, *, direct, cancelled):
        def stop():
            asked.append(name)
            if name == slow and asked.count(slow) == 2:  # one chunk is read
                reached.set()
                go.wait()
            return cancelled()

        return type(store).read_shard(store, name, view, direct=direct, cancelled=stop)

    store.read_shard = read_shard
    loop = open_loop(store, "confidence:0.9", 2, backend=Waiting())
    (outcome,) = loop.sweep([encode(["abc"])])
    go.set()
    loop.close()
    assert asked.count(slow) == 2
    assert loop.ring.bytes_idle == 2 << 20
    assert loop.ring.bytes_read == outcome.bytes_read + (2 << 20)


ERRORS = st.sampled_from([OSError(5, "I/O"), MemoryError(), DamagedError("flipped"), KeyboardInterrupt()])


@quick
@given(data=st.data(), toy=st.sampled_from([Toy(), Toy(shared=True), sure(2)]), num_slots=st.integers(1, 3))
def test_every_byte_is_paid_by_a_row_or_idle_whatever_happens(shelf, data, toy, num_slots):
    store = shelf.open(toy, data.draw(st.sampled_from(["always", "never"])))
    meter, paid, injected = Meter(store), 0, []
    residents = data.draw(st.sets(st.sampled_from(order_of(store))))
    policy = data.draw(st.sampled_from(["none", "patience:1", "confidence:0.9", "stage:2"]))
    loop = open_loop(store, policy, num_slots, residents)
    for rows, more in data.draw(st.lists(st.tuples(batches, st.booleans()), min_size=1, max_size=4)):
        error, where = (
            data.draw(st.one_of(st.none(), ERRORS)),
            data.draw(st.sampled_from(["down", "exit", *order_of(store)])),
        )
        failures = loop.backend.fail if where in ("down", "exit") else meter.errors
        if error is not None:
            failures[where] = error
            injected.append(error)
        try:
            outcomes = loop.sweep([encode(rows)], more=more)
            assert answers(outcomes) == expected(store, rows, policy)
            paid += sum(outcome.bytes_read for outcome in outcomes)
        except (OSError, MemoryError, DamagedError, KeyboardInterrupt) as caught:
            assert any(caught is error for error in injected)  # perhaps of an idle read before
        failures.pop(where, None)
    loop.close()
    assert loop.ring.bytes_read == meter.total == paid + loop.ring.bytes_idle
    assert loop.ring.bytes_idle >= 0
    store.close()


def test_a_pass_counts_the_seconds_of_all_that_was_read_for_it(shelf):
    """Whether it was read in the pass or while the loop was idle; the fill is what the loop waited for at its start."""
    store = shelf.open(Toy(4))
    read_shard, slow, done = store.read_shard, order_of(store)[0], []

    def slowly(name, *arguments, **options):
        if name == slow:
            time.sleep(0.05)
            done.append(name)
        return read_shard(name, *arguments, **options)

    store.read_shard = slowly
    loop = open_loop(store, "none", 2)
    for number in range(3):
        loop.sweep([encode(["abc"])], more=True)
        eventually(lambda number=number: len(done) == number + 2)
    loop.close()
    first, *later = loop.costs
    assert first.read_seconds >= first.fill_seconds >= 0.04
    assert all(cost.read_seconds - cost.fill_seconds >= 0.04 for cost in later)
    assert all(cost.seconds >= cost.compute_seconds > 0 for cost in loop.costs)


def test_a_read_is_shared_equally_by_the_rows_that_are_still_there(shelf):
    store = shelf.open(Toy(6))
    rows = ["abcdef"[: 1 + place % 6] * (1 + place % 3) for place in range(7)]
    loop = open_loop(store, "patience:1", 2)
    outcomes = loop.sweep([encode(rows)])
    stages = [
        ["embedding"],
        *[[name for step in stage.steps for name in step.shards] for stage in store.manifest.layers],
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
    loop.close()
    share_of_rows = row_bytes(loop) / len(rows)
    for outcome, share in zip(outcomes, shares, strict=True):
        assert abs(outcome.bytes_read - share - share_of_rows) <= 30  # the remainder of each read
