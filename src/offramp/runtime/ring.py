"""Prefetching ring: one reader thread fills slots in the order of use, and the engine thread consumes them.

The reader stays at most `depth` reads ahead of the engine, including first reads of residents, so an exit wastes at
most that many reads. A *gated* shard is not read until the engine has decided to continue past a given stage. When a
pass ends, prefetched shards are dropped, a read in flight stops at its next chunk, and the first shards of the next
pass are prefetched while the engine is idle.

The ring is independent of models: a shard is a name and a number of bytes. One engine thread at a time. In the child of
a fork, where the reader thread is gone, the first shard that can be read starts another one.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Callable, Deque, Dict, NamedTuple, Optional, Sequence, Tuple

from offramp.forks import Forked
from offramp.measure import resident_bytes
from offramp.runtime.slots import BufferPool, Slot

Reader = Callable[[str, memoryview, Callable[[], bool]], Tuple[int, bool]]
"""Function (shard, buffer, cancelled) -> (bytes read, complete)."""
OnRead = Callable[[str, float, float, int, bool], None]
"""Callback (shard, start seconds, end seconds, bytes, idle), called in the reader thread after each read."""
Wait = Callable[[SimpleQueue], Any]
"""Function that waits, in the reader thread, for an item of a queue: there may be a shard to read."""
LIVENESS_SECONDS = 1.0
"""Time between two checks that the thread that is waited for is alive."""


class Turn(NamedTuple):
    """One shard in the reading order of a pass. It is not read before the engine has continued past stage `after` (0:
    no gate).
    """

    shard: str
    after: int = 0


class Loaded(NamedTuple):
    """A shard in memory. Bytes and seconds of its read are 0 unless this is the first use since the read."""

    slot: Slot
    num_bytes: int
    """0 also if the shard was read between passes."""
    read_seconds: float
    waited_seconds: float


@dataclass
class _Entry:
    """State of a shard in memory: its slot, the cost of its read, and the number of uses that remain."""

    slot: Slot
    num_bytes: int
    seconds: float
    uses: int = 1
    ahead: bool = True
    """True if the shard was read but not used yet."""

    def forget_cost(self) -> None:
        """Set the cost to 0, after it was charged to a pass or when it never will be."""
        self.num_bytes, self.seconds, self.ahead = 0, 0.0, False


class Ring(Forked):
    """Reader thread with buffers.

    `residents` are read once, into their own buffers; all other shards go through `pool`.
    """

    def __init__(
        self,
        read: Reader,
        pool: BufferPool,
        residents: Dict[str, Slot],
        *,
        depth: int,
        on_read: OnRead,
        wait: Wait = SimpleQueue.get,
    ) -> None:
        self._read, self._on_read, self._depth, self._wait = read, on_read, depth, wait
        self._pool, self._resident_slots = pool, residents
        self._filling: Optional[Slot] = None
        self._fetching: Optional[Tuple[Turn, int]] = None
        """The turn that the reader has taken, and its epoch."""
        self._residents: Dict[str, _Entry] = {}
        self._loaded: Dict[str, _Entry] = {}
        self._wanted: Deque[Turn] = deque()
        self._ahead = self._epoch = self._passed = 0
        self._idle, self.is_open = False, True
        self._error: Optional[BaseException] = None
        self.bytes_read = self.bytes_used = self.pass_index = 0
        # Implemented in C, unlike threading.Condition: KeyboardInterrupt cannot leave them in an intermediate state.
        self._lock = threading.Lock()
        self._engine_wakeups, self._reader_wakeups = SimpleQueue(), SimpleQueue()
        self._thread: Optional[threading.Thread] = _started(self, self._reader_wakeups)
        self._is_frozen = False
        self.survive_forks()

    def begin_pass(self, turns: Sequence[Turn], *, restart: bool = False) -> None:
        """Start to read the shards of a pass. Keep what was read ahead for it, unless `restart`."""
        with self._lock:
            if restart or not self._idle:
                self._restart(turns)
            self._idle = False
            self._wake_reader()

    def acquire(self, shard: str, until: Optional[float] = None) -> Optional[Loaded]:
        """Wait for the next shard of the pass. Return None if it is not there at `until`, a time of
        `time.perf_counter`. Raises the error of the reader thread, if any.
        """
        started = time.perf_counter()
        while True:
            with self._lock:
                entry = self._loaded.get(shard) or self._residents.get(shard)
                if entry is not None:
                    waited_seconds = time.perf_counter() - started
                    loaded = Loaded(entry.slot, entry.num_bytes, entry.seconds, waited_seconds)
                    self._ahead -= entry.ahead
                    entry.forget_cost()
                    self._wake_reader()
                    return loaded
                if self._error is not None:
                    raise self._error
                if not self.is_open:
                    raise RuntimeError("the ring is closed")
                if self._thread is None:
                    self._wake_reader()
            left = None if until is None else max(until - time.perf_counter(), 0.0)
            try:
                self._engine_wakeups.get(timeout=LIVENESS_SECONDS if left is None else min(left, LIVENESS_SECONDS))
            except Empty:
                if left is not None and left <= LIVENESS_SECONDS:
                    return None
                if self._thread is not None and not self._thread.is_alive() and self.is_open:
                    raise RuntimeError("the reader thread has ended") from None

    def release(self, shard: str, *, discard: bool = False) -> None:
        """End this use of the shard. Its slot becomes free unless another use was prefetched.

        `discard`: a caller still references the slot, so it must not be overwritten; it is replaced by a new one.
        """
        with self._lock:
            entry = self._loaded.get(shard)
            if entry is not None:
                entry.uses -= 1
                if entry.uses == 0 or discard:
                    del self._loaded[shard]
                    (self._pool.discard if discard else self._pool.release)(entry.slot)
                    self._wanted.extendleft([Turn(shard)] * entry.uses)  # later uses need another read
            self._wake_reader()

    def continue_past(self, stage: int) -> None:
        """Record that the engine continues after `stage`, which allows the reads gated by it."""
        with self._lock:
            self._passed = stage
            self._wake_reader()

    def end_pass(self, next_turns: Sequence[Turn] = ()) -> None:
        """Drop prefetched shards, stop the read in flight, and prefetch the start of the next pass, if any."""
        with self._lock:
            self._restart(next_turns)
            self._idle = bool(next_turns)
            self._wake_reader()
        self.pass_index += 1

    def count_read(self, num_bytes: int) -> None:
        """Count bytes that the engine read itself (gathered rows)."""
        with self._lock:
            self.bytes_read += num_bytes

    def count_charged(self, num_bytes: int) -> None:
        """Count bytes that a finished pass charged to its rows."""
        with self._lock:
            self.bytes_used += num_bytes

    @property
    def bytes_idle(self) -> int:
        """Bytes that were not charged to any row: read while idle, prefetched but unused, or read for a failed pass."""
        return self.bytes_read - self.bytes_used

    def resident_bytes(self) -> int:
        """Return the bytes of its buffers that are in memory."""
        with self._lock:
            pages = {*self._pool.pages(), *(slot.pages for slot in self._resident_slots.values())}
        return sum(map(resident_bytes, pages))

    def close(self) -> None:
        """Stop the reader and release all buffers. A read in flight ends at its next chunk."""
        with self._lock:
            self.is_open = False
            self._epoch += 1
        _wake(self._reader_wakeups)
        _wake(self._engine_wakeups)
        if self._thread is not None:
            self._thread.join()
        self._restart(())
        self._pool.close()
        self._resident_slots = {}
        self._residents.clear()
        # They may refer to this ring, which would stay until collected.
        self._read = self._on_read = self._wait = _never

    def before_fork(self) -> None:
        """Take the lock, so that no thread is in the middle of a change. Give up if the forking thread holds it."""
        self._is_frozen = self._lock.acquire(timeout=LIVENESS_SECONDS)

    def after_fork_in_parent(self) -> None:
        """Release the lock."""
        if self._is_frozen:
            self._lock.release()

    def after_fork(self) -> None:
        """Forget the reader. The shard that it was reading is wanted again."""
        self._lock, self._thread = threading.Lock(), None
        self._engine_wakeups, self._reader_wakeups = SimpleQueue(), SimpleQueue()
        if self._fetching is None or self._filling is None:
            return
        turn, epoch = self._fetching
        if turn.shard not in self._resident_slots:
            self._pool.release(self._filling)
        if epoch == self._epoch:
            self._ahead -= 1
            self._wanted.appendleft(turn)
        self._filling = self._fetching = None

    def _restart(self, turns: Sequence[Turn]) -> None:
        """Discard the state of the pass. Safe in any state, because an interrupt can stop the engine anywhere."""
        self._epoch += 1
        self._error, self._loaded = None, {}
        self._pool.clear(self._filling)
        for entry in self._residents.values():
            entry.forget_cost()
        self._wanted = deque(turns)
        self._ahead = self._passed = 0

    def _wake_reader(self) -> None:
        """Wake the reader if a shard can be read now.

        With a fully resident model there is none; waking the thread anyway would take the interpreter lock from the
        engine.
        """
        if self._next() is not None:
            if self._thread is None:
                self._thread = _started(self, self._reader_wakeups)
            _wake(self._reader_wakeups)

    def _next(self) -> Optional[Turn]:
        """Return the next turn to read, or None while the reader must wait.

        Turns whose shard is in memory are skipped.
        """
        while self._wanted and self._wanted[0].after <= self._passed:
            turn = self._wanted[0]
            if turn.shard in self._loaded:
                self._loaded[turn.shard].uses += 1
            elif turn.shard not in self._residents:
                has_slot = turn.shard in self._resident_slots or self._pool.fits(turn.shard)
                return turn if has_slot and self._ahead < self._depth else None
            self._wanted.popleft()
        return None

    def _read_next(self) -> Optional[Wait]:
        """Read the next shard. Return None after that, or the function that waits until there is one."""
        job = self._start_next()
        if job is None:
            return self._wait
        self._fetch(*job)
        return None

    def _start_next(self) -> Optional[Tuple[str, Slot, int, bool]]:
        with self._lock:
            turn = self._next()
            if turn is None or not self.is_open:
                return None
            try:
                slot = self._resident_slots.get(turn.shard) or self._pool.acquire(turn.shard)
            except BaseException as error:  # no memory for a buffer; raised in the engine thread
                self._error = error
                self._wanted.clear()
                _wake(self._engine_wakeups)
                return None
            self._wanted.popleft()
            self._ahead += 1
            self._filling, self._fetching = slot, (turn, self._epoch)
            return turn.shard, slot, self._epoch, self._idle

    def _fetch(self, shard: str, slot: Slot, epoch: int, idle: bool) -> None:
        error: Optional[BaseException] = None
        num_bytes, complete, is_resident = 0, False, shard in self._resident_slots
        started = ended = time.perf_counter()
        try:
            num_bytes, complete = self._read(shard, slot.view, lambda: self._epoch != epoch)
            ended = time.perf_counter()
            self._on_read(shard, started, ended, num_bytes, idle)
        except BaseException as caught:  # raised in the engine thread by acquire
            error = caught
        with self._lock:
            self.bytes_read += num_bytes
            self._filling = self._fetching = None
            is_current = epoch == self._epoch
            if error is not None and is_current:
                self._error = error
                self._wanted.clear()
            entry = _Entry(slot, 0 if idle else num_bytes, ended - started)
            if not is_current:
                entry.forget_cost()
            if complete and (is_resident or is_current):  # residents are kept even if their pass is over
                (self._residents if is_resident else self._loaded)[shard] = entry
            elif not is_resident:
                self._pool.release(slot)
            self._next()  # later turns of the same shard register their use before the engine can release it
        _wake(self._engine_wakeups)
        error = None  # its traceback references this frame and thus the slot


def _never(*_: object) -> Any:
    raise AssertionError("a closed ring does not read")


def _started(ring: Ring, wakeups: SimpleQueue) -> threading.Thread:
    """Start the reader. It ends with its ring, also without `close`."""
    thread = threading.Thread(target=_run, args=[weakref.ref(ring), wakeups], name="offramp-reader", daemon=True)
    weakref.finalize(ring, wakeups.put, None).atexit = False  # `put` may be called in a collection of garbage
    thread.start()
    return thread


def _run(reference: weakref.ref[Ring], wakeups: SimpleQueue) -> None:
    """Read for a ring until it is closed or collected. While the reader waits, it does not keep the ring."""
    while True:
        ring = reference()
        if ring is None or not ring.is_open:
            return
        wait = ring._read_next()
        del ring
        if wait is not None:
            wait(wakeups)


def _wake(queue: SimpleQueue) -> None:
    """Wake the thread that waits on `queue`, now or at its next wait. One pending item is sufficient."""
    if queue.empty():
        queue.put(None)
