"""The ring alone: a disk made of events, so that every order of things can be forced, then many random ones."""

from __future__ import annotations

import errno
import gc
import random
import sys
import threading
import time
import weakref

import pytest

import offramp.runtime.ring as ring_module
from offramp.errors import DamagedError
from offramp.runtime.ring import Ring, Turn
from offramp.runtime.slots import Arena, EqualSlots, Slot
from tests.forked import in_child
from tests.runtime.driver import eventually

BYTES = 4096
CHUNKS = 4


class Disk:
    """Reads a shard in four chunks, stamping them with its name; `hold` makes reads wait before each chunk."""

    def __init__(self):
        self.started, self.errors, self.total = [], {}, 0
        self.hold, self.chunk_done = {}, {}

    def __call__(self, shard, view, cancelled):
        self.started.append(shard)
        for chunk in range(CHUNKS):
            if cancelled():
                return self._count(chunk), False
            if shard in self.hold:
                self.chunk_done[shard].set()
                self.hold[shard].wait()
            begin = chunk * BYTES // CHUNKS
            view[begin : begin + BYTES // CHUNKS] = shard.encode().ljust(BYTES // CHUNKS)
        if shard in self.errors:
            raise self.errors.pop(shard)
        return self._count(CHUNKS), True

    def _count(self, chunks):
        self.total += chunks * BYTES // CHUNKS
        return chunks * BYTES // CHUNKS

    def slow(self, shard):
        """From now on `shard` stops after its first chunk is asked for, until `hold[shard]` is set."""
        self.hold[shard], self.chunk_done[shard] = threading.Event(), threading.Event()


def make_ring(disk, num_slots=1, residents=(), depth=None, on_read=lambda *_: None):
    slots = EqualSlots([Slot(BYTES) for _ in range(num_slots)])
    return Ring(
        disk, slots, {shard: Slot(BYTES) for shard in residents}, depth=depth or num_slots or 2, on_read=on_read
    )


def turns(names, after=0):
    return [Turn(name, after) for name in names]


def use(ring, shard):
    """Acquire, look, release. Returns the bytes charged."""
    slot, cost, seconds, waited = ring.acquire(shard)
    assert seconds >= 0 <= waited
    assert bytes(slot.view) == shard.encode().ljust(BYTES // CHUNKS) * CHUNKS
    ring.release(shard)
    return cost


def test_a_pass_reads_each_shard_once_in_order():
    disk = Disk()
    ring = make_ring(disk, 2)
    for _ in range(3):
        ring.begin_pass(turns("abcd"))
        assert [use(ring, shard) for shard in "abcd"] == [BYTES] * 4
        ring.end_pass()
    ring.close()
    assert disk.started == list("abcd") * 3
    assert ring.bytes_read == disk.total == 12 * BYTES


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_no_more_is_read_ahead_than_there_are_slots(num_slots):
    disk = Disk()
    ring = make_ring(disk, num_slots)
    ring.begin_pass(turns("abcdef"))
    eventually(lambda: len(disk.started) == num_slots)
    ring.acquire("a")
    eventually(lambda: disk.started == list("abcdef"[:num_slots]))
    ring.release("a")
    eventually(lambda: len(disk.started) == num_slots + 1)
    ring.end_pass()
    ring.close()
    assert disk.started == list("abcdef"[: num_slots + 1])


def test_residents_are_read_once_and_the_first_reads_of_them_count_as_ahead():
    disk = Disk()
    ring = make_ring(disk, 1, "bcde")
    ring.begin_pass(turns("abcde"))
    assert use(ring, "a") == BYTES
    eventually(lambda: len(disk.started) == 2)
    ring.end_pass()
    ring.begin_pass(turns("abcde"))
    assert sum(use(ring, shard) for shard in "abcde") == 4 * BYTES  # b was read in vain, yet it stays
    ring.end_pass()
    ring.close()
    assert disk.started == list("ab") + list("acde")


def test_residents_that_are_there_do_not_hold_the_reader_back():
    disk = Disk()
    ring = make_ring(disk, 1, "bcd")
    ring.begin_pass(turns("abcde"))
    for shard in "abcde":
        use(ring, shard)
    ring.end_pass()
    ring.begin_pass(turns("abcde"))
    use(ring, "a")
    eventually(lambda: disk.started[5:] == ["a", "e"])  # while b, c and d are computed
    ring.end_pass()
    ring.close()


def test_the_reader_sleeps_while_all_that_a_pass_needs_is_there(monkeypatch):
    """It would take the interpreter from the loop, at each of a pass's steps."""
    disk = Disk()
    ring = make_ring(disk, num_slots=0, residents="abc")
    passed(ring)
    woken, wake = [], ring_module._wake
    monkeypatch.setattr(ring_module, "_wake", lambda bell: (woken.append(bell), wake(bell)))
    passed(ring)
    assert ring._reader_wakeups not in woken
    ring.close()
    assert disk.started == ["a", "b", "c"]


def passed(ring):
    """One whole pass over a, b and c, gated as by an exit after the first."""
    ring.begin_pass([*turns("a"), *turns("bc", after=1)])
    for shard in "abc":
        use(ring, shard)
        ring.continue_past(1)
    ring.end_pass(turns("abc"))


def test_the_next_pass_begins_while_the_loop_is_idle_and_nobody_pays_for_it():
    disk = Disk()
    ring = make_ring(disk, 2)
    ring.begin_pass(turns("abc"))
    for shard in "abc":
        use(ring, shard)
    ring.end_pass(turns("abc"))
    eventually(lambda: len(disk.started) == 5)
    ring.begin_pass(turns("abc"))
    assert [use(ring, shard) for shard in "abc"] == [0, 0, BYTES]
    ring.end_pass()
    ring.close()
    assert disk.started == list("abc") + list("abc")


def test_an_idle_read_in_flight_serves_the_pass_that_begins():
    disk = Disk()
    ring = make_ring(disk, 1)
    disk.slow("a")
    ring.end_pass(turns("ab"))
    disk.chunk_done["a"].wait()
    ring.begin_pass(turns("ab"))
    disk.hold["a"].set()
    assert [use(ring, shard) for shard in "ab"] == [0, BYTES]
    ring.end_pass()
    ring.close()
    assert disk.started == ["a", "b"]


def test_a_gated_shard_waits_for_the_decision():
    disk = Disk()
    ring = make_ring(disk, 3)
    ring.begin_pass([Turn("a"), Turn("b"), Turn("c", after=2)])
    use(ring, "a")
    ring.continue_past(1)
    use(ring, "b")
    assert disk.started == ["a", "b"]
    ring.continue_past(2)
    use(ring, "c")
    ring.end_pass()
    ring.close()


def test_the_end_of_a_pass_stops_a_read_in_flight_at_its_next_chunk():
    disk = Disk()
    ring = make_ring(disk, 2)
    disk.slow("b")
    ring.begin_pass(turns("abc"))
    use(ring, "a")
    disk.chunk_done["b"].wait()
    ring.end_pass()
    disk.hold["b"].set()
    ring.close()
    assert disk.started == ["a", "b"]
    assert ring.bytes_read == BYTES + BYTES // CHUNKS  # one chunk of b, no more


def test_a_cancelled_resident_is_read_again_and_its_slot_mate_too():
    disk = Disk()
    ring = make_ring(disk, 1, "b")
    disk.slow("b")
    ring.begin_pass(turns("ab"))
    use(ring, "a")
    disk.chunk_done["b"].wait()
    ring.end_pass()
    disk.hold.pop("b").set()
    ring.begin_pass(turns("ab"))
    assert [use(ring, shard) for shard in "ab"] == [BYTES, BYTES]
    ring.end_pass()
    ring.close()


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O"), DamagedError("flipped"), MemoryError("none")])
def test_what_the_reader_raises_comes_out_of_acquire_as_it_is(error):
    disk = Disk()
    ring = make_ring(disk, 2)
    disk.errors["b"] = error
    ring.begin_pass(turns("abc"))
    use(ring, "a")
    with pytest.raises(type(error)) as caught:
        ring.acquire("b")
    assert caught.value is error
    ring.end_pass()
    ring.begin_pass(turns("abc"))
    assert [use(ring, shard) for shard in "abc"] == [BYTES] * 3
    ring.end_pass()
    ring.close()
    assert disk.started == list("ab") + list("abc")


def test_shards_before_the_error_are_still_served():
    disk = Disk()
    ring = make_ring(disk, 2)
    disk.errors["b"] = OSError(errno.EIO, "I/O")
    ring.begin_pass(turns("ab"))
    eventually(lambda: len(disk.started) == 2)
    assert use(ring, "a") == BYTES
    with pytest.raises(OSError):
        ring.acquire("b")
    ring.end_pass()
    ring.close()


def test_an_error_of_an_idle_read_comes_out_in_the_next_pass():
    disk = Disk()
    ring = make_ring(disk, 1)
    disk.errors["a"] = OSError(errno.EIO, "I/O")
    ring.end_pass(turns("a"))
    eventually(lambda: disk.started)
    ring.begin_pass(turns("a"))
    with pytest.raises(OSError):
        ring.acquire("a")
    ring.end_pass()
    ring.begin_pass(turns("a"))
    assert use(ring, "a") == BYTES
    ring.end_pass()
    ring.close()


class Stubborn(Disk):
    """Does not look whether a read was cancelled, as a read whose last chunk is under way does not."""

    def __call__(self, shard, view, cancelled):
        return super().__call__(shard, view, lambda: False)


def leave_in_flight(ring, disk, shard):
    """End a pass while `shard` is being read, then let the read end, while the next pass waits."""
    disk.chunk_done[shard].wait()
    ring.end_pass()
    ring.begin_pass(turns("ab"))
    disk.hold.pop(shard).set()


@pytest.mark.parametrize("error", [None, MemoryError()])
def test_a_read_that_outlives_its_pass_is_dropped_with_its_error(error):
    disk = Stubborn()
    ring = make_ring(disk, 1)
    disk.slow("b")
    ring.begin_pass(turns("ab"))
    use(ring, "a")
    if error:
        disk.errors["b"] = error
    leave_in_flight(ring, disk, "b")
    assert [use(ring, shard) for shard in "ab"] == [BYTES, BYTES]
    ring.end_pass()
    ring.close()
    assert disk.started == list("abab")


def test_a_resident_that_outlives_its_pass_stays_and_the_next_does_not_pay_for_it():
    disk = Stubborn()
    ring = make_ring(disk, 1, "b")
    disk.slow("b")
    ring.begin_pass(turns("ab"))
    use(ring, "a")
    leave_in_flight(ring, disk, "b")
    assert [use(ring, shard) for shard in "ab"] == [BYTES, 0]
    ring.end_pass()
    ring.close()
    assert disk.started == list("aba")


def test_a_listener_that_fails_does_not_kill_the_reader():
    failures = [ZeroDivisionError()]

    def on_read(*_):
        if failures:
            raise failures.pop()

    ring = make_ring(Disk(), 1, on_read=on_read)
    ring.begin_pass(turns("ab"))
    with pytest.raises(ZeroDivisionError):
        for shard in "ab":
            use(ring, shard)
    ring.end_pass()
    ring.begin_pass(turns("ab"))
    assert [use(ring, shard) for shard in "ab"] == [BYTES, BYTES]
    ring.end_pass()
    ring.close()


@pytest.mark.parametrize("stopped_after", ["begin", "acquire", "release"])
def test_a_pass_that_was_left_without_an_end_is_dropped_by_the_next(stopped_after):
    ring = make_ring(Disk(), 2, "c")
    ring.begin_pass(turns("abcd"))
    if stopped_after != "begin":
        ring.acquire("a")
    if stopped_after == "release":
        ring.release("a")
    for _ in range(3):
        ring.begin_pass(turns("abcd"))
        for shard in "abcd":
            use(ring, shard)
        ring.end_pass()
    ring.close()


def test_an_interrupt_between_losing_a_slot_and_freeing_it_loses_nothing():
    ring = make_ring(Disk(), 1)
    ring.begin_pass(turns("ab"))
    ring.acquire("a")
    with ring._lock:  # as if KeyboardInterrupt had come in the middle of `release`
        del ring._loaded["a"]
    ring.end_pass()
    ring.begin_pass(turns("ab"))
    assert [use(ring, shard) for shard in "ab"] == [BYTES, BYTES]
    ring.end_pass()
    ring.close()


@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("residents", ["", "u", "aud"])
def test_stages_that_share_shards_neither_block_nor_mix_them_up(num_slots, residents):
    disk = Disk()
    ring = make_ring(disk, num_slots, residents)
    for _ in range(2):
        ring.begin_pass(turns("aud" * 12))
        for shard in "aud" * 12:
            use(ring, shard)
        ring.end_pass()
    ring.close()
    if num_slots == 3:
        assert disk.started == list("aud") + list("aud".translate(str.maketrans("", "", residents)))


def test_one_slot_and_one_shard_for_all_stages_is_one_read_a_pass():
    disk, released = Disk(), threading.Event()
    ring = make_ring(disk, 1)
    start_next = ring._start_next
    ring._start_next = lambda: (not disk.started or released.wait()) and start_next()  # the loop is always faster
    ring.begin_pass(turns("a" * 12))
    assert use(ring, "a") == BYTES
    released.set()
    assert [use(ring, "a") for _ in range(11)] == [0] * 11
    ring.end_pass()
    ring.close()
    assert disk.started == ["a"]


def test_close_ends_a_slow_read_and_may_be_called_again():
    disk = Disk()
    ring = make_ring(disk, 1)
    disk.slow("a")
    ring.begin_pass(turns("a"))
    disk.chunk_done["a"].wait()
    closing = threading.Thread(target=ring.close)
    closing.start()
    eventually(lambda: not ring.is_open)
    disk.hold["a"].set()
    closing.join()
    ring.close()
    assert ring.bytes_read == BYTES // CHUNKS
    with pytest.raises(RuntimeError, match="closed"):
        ring.acquire("a")


def test_close_wakes_a_loop_that_waits():
    disk = Disk()
    ring = make_ring(disk, 1)
    disk.slow("a")
    ring.begin_pass(turns("a"))
    errors = []

    def wait():
        try:
            ring.acquire("a")
        except RuntimeError as error:
            errors.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()
    disk.chunk_done["a"].wait()
    closing = threading.Thread(target=ring.close)
    closing.start()
    eventually(lambda: not ring.is_open)
    disk.hold["a"].set()
    closing.join()
    waiting.join()
    assert errors == ["the ring is closed"]


def sized_ring(disk, limit, sizes, residents=()):
    """A ring over an arena of shards that count so many units of `BYTES`, each of them a stage."""
    counted = {name: size * BYTES for name, size in sizes.items()}
    pool = Arena([[name] for name in sizes], dict.fromkeys(sizes, BYTES), counted, limit * BYTES)
    return Ring(disk, pool, {name: Slot(BYTES) for name in residents}, depth=64, on_read=lambda *_: None)


def test_unequal_shards_are_read_ahead_as_far_as_the_room_holds_them():
    disk = Disk()
    ring = sized_ring(disk, 4, {"a": 3, "b": 1, "c": 2, "d": 1})
    for _ in range(2):
        ring.begin_pass(turns("abcd"))
        eventually(lambda: disk.started[-2:] == ["a", "b"])
        ring.acquire("a")
        assert disk.started[-2:] == ["a", "b"]  # c would be the fifth unit
        ring.release("a")
        eventually(lambda: disk.started[-1] == "c")
        assert [use(ring, shard) for shard in "bcd"] == [BYTES] * 3
        ring.end_pass()
    ring.close()
    assert ring._pool.peak_bytes <= 4 * BYTES


def test_a_shard_as_large_as_the_room_waits_until_it_is_empty():
    disk = Disk()
    ring = sized_ring(disk, 3, {"a": 1, "b": 1, "c": 3})
    ring.begin_pass(turns("abcab"))
    for shard in "abcab":
        use(ring, shard)
    ring.end_pass()
    ring.close()
    assert disk.started == list("abcab")


@pytest.mark.parametrize("make", [lambda disk: make_ring(disk, 2), lambda disk: sized_ring(disk, 2, {"a": 1, "b": 1})])
def test_a_lost_slot_is_not_written_to_again(make):
    disk = Disk()
    ring = make(disk)
    ring.begin_pass(turns("abab" * 3))
    lost = ring.acquire("a").slot
    before = bytes(lost.view)
    ring.release("a", discard=True)
    for shard in "bab" + "abab" * 2:
        assert ring.acquire(shard).slot is not lost
        ring.release(shard)
    ring.end_pass()
    ring.close()
    assert bytes(lost.view) == before == b"a".ljust(BYTES // CHUNKS) * CHUNKS


@pytest.mark.parametrize("num_uses", [2, 4])
@pytest.mark.parametrize(
    "make", [lambda disk: make_ring(disk, 3), lambda disk: sized_ring(disk, 3, {"a": 1, "b": 1, "c": 1})]
)
def test_a_shard_that_is_lost_while_later_stages_count_on_it_is_read_again(make, num_uses):
    disk = Disk()
    ring = make(disk)
    ring.begin_pass(turns("ab" * num_uses + "c"))
    ring.acquire("a")
    eventually(lambda: len(disk.started) == 3)  # so all later turns of a and b were passed over
    ring.release("a", discard=True)
    for shard in "b" + "ab" * (num_uses - 1) + "c":
        use(ring, shard)
    ring.end_pass()
    ring.close()
    assert disk.started == list("abca")


def test_a_slot_that_is_being_filled_when_a_pass_ends_is_not_given_to_the_next():
    disk = Stubborn()
    ring = sized_ring(disk, 2, {"a": 1, "b": 1, "c": 1})
    disk.slow("b")
    ring.begin_pass(turns("abc"))
    use(ring, "a")
    leave_in_flight(ring, disk, "b")
    assert [use(ring, shard) for shard in "ab"] == [BYTES, BYTES]
    ring.end_pass()
    ring.close()
    assert ring._pool.peak_bytes <= 2 * BYTES


def buffers(ring):
    return [weakref.ref(slot) for slot in (*ring._pool._slots, *ring._resident_slots.values())]


def test_close_lets_go_of_all_buffers(no_collector):
    ring = make_ring(Disk(), 2, "c")
    slots = buffers(ring)
    ring.begin_pass(turns("abc"))
    for shard in "abc":
        use(ring, shard)
    ring.end_pass(turns("abc"))
    assert all(slot() is not None for slot in slots)
    ring.close()
    assert [slot() for slot in slots] == [None] * 3


def test_an_error_does_not_keep_a_buffer_alive(no_collector):
    disk = Disk()
    ring = make_ring(disk, 1)
    slots = buffers(ring)
    disk.errors["a"] = OSError(errno.EIO, "I/O")
    ring.begin_pass(turns("a"))
    with pytest.raises(OSError):
        ring.acquire("a")
    ring.end_pass()
    ring.close()
    assert [slot() for slot in slots] == [None]


class Order:
    """What one order of turns allows: nothing gated early, never more than `depth` reads that nobody asked for."""

    def __init__(self, turns):
        self.turns, self.passed, self.asked, self.ahead = turns, 0, None, set()
        self.gate = {}
        for turn in turns:
            self.gate.setdefault(turn.shard, turn.after)


class Schedule:
    """Random passes over a random ring, each checked at every read and every use: one object a seed."""

    def __init__(self, seed):
        self.random, self.disk_random = random.Random(seed), random.Random(seed + 1)
        names = "abcdefgh"[: self.random.randint(1, 8)]
        self.names = [self.random.choice(names) for _ in range(self.random.randint(1, 14))]
        self.depth = self.random.randint(1, 3)
        residents = {name: Slot(BYTES) for name in names if self.random.random() < 0.3}
        self.orders, self.problems, self.injected = {}, [], []
        self.bytes_read = self.bytes_paid = self.operations = 0
        slots = EqualSlots([Slot(BYTES) for _ in range(self.depth)])
        self.ring = Ring(self.read, slots, residents, depth=self.depth, on_read=lambda *_: None)

    def read(self, shard, view, cancelled):
        """Called in the reader thread."""
        order = self.orders[self.ring._epoch]
        if not cancelled():  # so the read belongs to this order
            self.judge(shard, order)
        view[:] = b"?" * BYTES
        if self.disk_random.random() < 0.4:
            time.sleep(self.disk_random.random() * 1e-4)
        if cancelled():
            self.bytes_read += 1
            return 1, False
        if self.disk_random.random() < 0.03:
            self.injected.append(
                self.disk_random.choice([OSError(errno.EIO, "I/O"), MemoryError(), DamagedError("flipped")])
            )
            raise self.injected[-1]
        view[:] = shard.encode() * BYTES
        if self.disk_random.random() < 0.1:
            time.sleep(1e-4)  # cancelled now, it is complete all the same
        self.bytes_read += BYTES
        return BYTES, True

    def judge(self, shard, order):
        if shard != order.asked:
            order.ahead.add(shard)
        if len(order.ahead) > self.depth:
            self.problems.append(f"{order.ahead} were read ahead")
        if order.gate[shard] > order.passed:
            self.problems.append(f"{shard} was read before stage {order.gate[shard]} was decided")

    def draw(self):
        """An order with gates that never go back; a turn is a stage."""
        after, turns = 0, []
        for place, name in enumerate(self.names):
            after = place if self.random.random() < 0.15 else after
            turns.append(Turn(name, after))
        return Order(turns)

    def run(self, num_passes):
        order, fetching = self.draw(), False
        for _ in range(num_passes):
            if not fetching:
                self.orders[self.ring._epoch + 1] = order
            self.ring.begin_pass(order.turns)
            self.use_some(order)
            order, fetching = self.draw(), self.random.random() < 0.6
            if self.random.random() < 0.05:  # as an interrupt would leave it
                fetching = False
            else:
                self.orders[self.ring._epoch + 1] = order if fetching else Order([])
                self.ring.end_pass(order.turns if fetching else ())
        self.orders[self.ring._epoch + 1] = Order([])
        self.ring.close()

    def use_some(self, order):
        try:
            for place, turn in enumerate(order.turns[: self.random.randint(0, len(order.turns) + 3)], start=1):
                self.use(order, turn.shard)
                if self.random.random() < 0.1:
                    time.sleep(1e-4)
                order.passed = place
                self.ring.continue_past(place)
        except (OSError, MemoryError, DamagedError) as error:
            assert any(error is injected for injected in self.injected)

    def use(self, order, shard):
        order.asked = shard
        order.ahead.discard(shard)
        slot, cost, *_ = self.ring.acquire(shard)
        order.asked = None
        self.bytes_paid += cost
        self.operations += 3
        for _ in range(2):
            if bytes(slot.view) != shard.encode() * BYTES:
                self.problems.append(f"{shard} is not in its slot")
            if self.random.random() < 0.3:
                time.sleep(1e-5)
        self.ring.release(shard)


@pytest.fixture
def eager_switching():
    """Threads take turns two hundred times as often, so that more interleavings are seen."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 200)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("seed", range(40))
def test_random_passes_never_break_a_rule(seed, eager_switching):
    schedule = Schedule(seed)
    schedule.run(20)
    assert schedule.problems == []
    assert schedule.bytes_paid <= schedule.bytes_read == schedule.ring.bytes_read


@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("residents", ["", "b", "bd"])
@pytest.mark.parametrize("reading", ["", "b", "c", "f"])
def test_a_forked_pass_goes_on_in_both_processes(num_slots, residents, reading):
    """At every point of a pass, whatever the reader does then: in the child it is gone, with what it read."""
    names = "abcdefa"
    for point in range(len(names)):
        disk = Disk()
        ring = make_ring(disk, num_slots, residents)
        if reading and names.index(reading) >= point:
            disk.slow(reading)
        ring.begin_pass(turns(names))
        for shard in names[:point]:
            use(ring, shard)
        if disk.hold and num_slots > names.index(reading) - point:
            assert disk.chunk_done[reading].wait(10)

        def go_on(disk=disk, ring=ring, point=point):
            for held in disk.hold.values():
                held.set()
            for shard in names[point:]:
                use(ring, shard)
            ring.end_pass(turns(names))
            ring.begin_pass(turns(names))
            for shard in names:
                use(ring, shard)
            ring.close()

        assert in_child(go_on) == 0
        go_on()


def test_a_fork_between_passes_leaves_both_processes_a_reader():
    ring = make_ring(Disk(), 2)
    for _ in range(2):
        ring.end_pass(turns("abc"))
        assert in_child(lambda: [ring.begin_pass(turns("abc")), [use(ring, shard) for shard in "abc"]]) == 0
        ring.begin_pass(turns("abc"))
        assert [use(ring, shard) for shard in "abc"].count(BYTES) <= 3


def test_nobody_waits_for_a_reader_that_has_ended(monkeypatch):
    monkeypatch.setattr(ring_module, "LIVENESS_SECONDS", 0.05)
    ring = make_ring(Disk())
    ended = threading.Thread(target=lambda: None)
    ended.start()
    ended.join()
    ring._thread = ended
    with pytest.raises(RuntimeError, match="the reader thread has ended"):
        ring.acquire("a")


def test_a_buffer_that_cannot_be_had_is_an_error_of_the_pass(monkeypatch):
    ring = make_ring(Disk())
    with monkeypatch.context() as short:
        short.setattr(ring._pool, "acquire", lambda shard: (_ for _ in ()).throw(MemoryError("no memory")))
        ring.begin_pass(turns("ab"))
        with pytest.raises(MemoryError, match="no memory"):
            ring.acquire("a")
    ring.end_pass()
    ring.begin_pass(turns("ab"))
    assert [use(ring, shard) for shard in "ab"] == [BYTES] * 2


@pytest.mark.parametrize("is_forked", [False, True])
def test_a_ring_that_is_collected_ends_its_thread(is_forked):
    def use():
        ring = make_ring(Disk())
        if is_forked:
            ring._thread = None  # as in the child of a fork, where the next pass starts another
        for _ in range(2):
            ring.begin_pass([Turn("a")])
            assert ring.acquire("a")
            ring.release("a")
            ring.end_pass()
        return ring._thread, weakref.ref(ring)

    thread, reference = use()
    gc.collect()
    eventually(lambda: reference() is None and not thread.is_alive())
