"""The ring: one reader thread that fills slots in the order of use, and the loop that empties them.

The reader is never more than `depth` reads ahead of the loop, first reads of residents included, so that an exit leaves
at most that many unused; a shard that is *gated* is not read before the loop has decided to go on past the stage before
it. When a pass ends, what was read ahead is dropped, a read in flight stops at its next chunk, and the first shards of
the next pass are fetched while the loop is idle.

It knows nothing of models: a shard is a name and a number of bytes. One loop thread at a time.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Callable, Deque, Dict, NamedTuple, Optional, Sequence, Tuple

from offramp.runtime.slots import Room, Slot

Reader = Callable[[str, memoryview, Callable[[], bool]], Tuple[int, bool]]
"""(shard, buffer, cancelled) -> (bytes read, complete)."""
OnRead = Callable[[str, float, float, int, bool], None]
"""(shard, start seconds, end seconds, bytes, idle): called in the reader thread after each read."""


@dataclass(frozen=True)
class Turn:
    """One shard in the order of a pass. The reader waits until the loop has gone past stage `after` (0: at once)."""

    shard: str
    after: int = 0


class Acquired(NamedTuple):
    """A shard that is there. Bytes and seconds are those of its read where this pass is the first to use it, else 0."""

    slot: Slot
    num_bytes: int
    """0 also where it was read while the loop was idle."""
    seconds: float


@dataclass
class _Loaded:
    slot: Slot
    num_bytes: int
    seconds: float
    uses: int
    idle: bool
    ahead: bool
    """Read, and not used yet."""

    def forget_cost(self) -> None:
        """Some pass has paid, or none ever will."""
        self.num_bytes, self.seconds, self.ahead = 0, 0.0, False


class Ring:
    """`residents` are read once, into buffers of their own; everything else passes through `room`."""

    def __init__(self, read: Reader, room: Room, residents: Dict[str, Slot], *, depth: int, on_read: OnRead) -> None:
        self._read, self._on_read, self._depth = read, on_read, depth
        self._room, self._resident_slots = room, residents
        self._filling: Optional[Slot] = None
        self._residents: Dict[str, _Loaded] = {}
        self._loaded: Dict[str, _Loaded] = {}
        self._wanted: Deque[Turn] = deque()
        self._ahead = self._epoch = self._passed = 0
        self._idle = self._closed = False
        self._error: Optional[BaseException] = None
        self.bytes_read = self.bytes_used = 0
        # In C, not in Python like threading.Condition: an interrupt cannot stop the loop half-way through one of these.
        self._lock, self._loop_bell, self._reader_bell = threading.Lock(), SimpleQueue(), SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="offramp-reader", daemon=True)
        self._thread.start()

    def begin_pass(self, turns: Sequence[Turn]) -> None:
        """Start to fetch a pass. What the wrap-around has fetched of the same order is kept."""
        with self._lock:
            if not self._idle:
                self._restart(turns)
            self._idle = False
            self._wake_reader()

    def acquire(self, shard: str, until: Optional[float] = None) -> Optional[Acquired]:
        """Wait for the next shard of the pass; None if it is not there at `until`, a time of `time.perf_counter`."""
        while True:
            with self._lock:
                entry = self._loaded.get(shard) or self._residents.get(shard)
                if entry is not None:
                    acquired = Acquired(entry.slot, 0 if entry.idle else entry.num_bytes, entry.seconds)
                    self._ahead -= entry.ahead
                    entry.forget_cost()
                    self._wake_reader()
                    return acquired
                if self._error is not None:
                    raise self._error
                if self._closed:
                    raise RuntimeError("the ring is closed")
            try:
                self._loop_bell.get(timeout=None if until is None else max(until - time.perf_counter(), 0.0))
            except Empty:
                return None

    def release(self, shard: str, *, lost: bool = False) -> None:
        """The loop is done with this use of the shard; its slot is free if no other use was read ahead.

        `lost`: somebody still reads from the slot, so that nothing may be read into it.
        """
        with self._lock:
            entry = self._loaded.get(shard)
            if entry is not None:
                entry.uses -= 1
                if entry.uses == 0 or lost:
                    del self._loaded[shard]
                    (self._room.lose if lost else self._room.give)(entry.slot)
                    self._wanted.extendleft([Turn(shard)] * entry.uses)  # they counted on what is lost: read it again
            self._wake_reader()

    def go_past(self, stage: int) -> None:
        """The loop has decided to go on after `stage`: what waited for that may be read."""
        with self._lock:
            self._passed = stage
            self._wake_reader()

    def end_pass(self, next_turns: Sequence[Turn] = ()) -> None:
        """Drop what was read ahead, stop the read in flight, and fetch the start of the next pass if there is one."""
        with self._lock:
            self._restart(next_turns)
            self._idle = bool(next_turns)
            self._wake_reader()

    def count(self, num_bytes: int) -> None:
        """Add bytes that the loop read by itself (gathered rows)."""
        with self._lock:
            self.bytes_read += num_bytes

    def use(self, num_bytes: int) -> None:
        """Bytes that a finished pass charged to its rows."""
        with self._lock:
            self.bytes_used += num_bytes

    @property
    def bytes_idle(self) -> int:
        """Bytes that no row paid for: read while idle, read ahead in vain, or for a pass that failed."""
        return self.bytes_read - self.bytes_used

    def close(self) -> None:
        """Stop the reader and let go of all buffers. A read in flight ends at its next chunk."""
        with self._lock:
            self._closed = True
            self._epoch += 1
        _wake(self._reader_bell)
        _wake(self._loop_bell)
        self._thread.join()
        self._restart(())
        self._room.close()
        self._resident_slots = {}
        self._residents.clear()

    def _restart(self, turns: Sequence[Turn]) -> None:
        """Forget the pass. From whatever state: an interrupt may have stopped the loop between any two instructions."""
        self._epoch += 1
        self._error = None
        self._loaded = {}
        self._room.clear(self._filling)
        for entry in self._residents.values():
            entry.forget_cost()
        self._wanted = deque(turns)
        self._ahead = self._passed = 0

    def _wake_reader(self) -> None:
        """If there is anything that it could read now: of a model that is resident there is nothing, and a thread that
        wakes for that takes the interpreter from the loop.
        """
        if self._next() is not None:
            _wake(self._reader_bell)

    def _next(self) -> Optional[Turn]:
        """The turn to read now, or None while the loop must catch up. Turns whose shard is here are passed over."""
        while self._wanted and self._wanted[0].after <= self._passed:
            turn = self._wanted[0]
            here = self._loaded.get(turn.shard)
            if here is None and turn.shard not in self._residents:
                has_room = turn.shard in self._resident_slots or self._room.fits(turn.shard)
                return turn if has_room and self._ahead < self._depth else None
            if here is not None:
                here.uses += 1
            self._wanted.popleft()
        return None

    def _run(self) -> None:
        while not self._closed:
            job = self._start_next()
            if job is None:
                self._reader_bell.get()
            else:
                self._fetch(*job)

    def _start_next(self) -> Optional[Tuple[str, Slot, int, bool]]:
        with self._lock:
            turn = self._next()
            if turn is None or self._closed:
                return None
            self._wanted.popleft()
            self._ahead += 1
            self._filling = self._resident_slots.get(turn.shard) or self._room.take(turn.shard)
            return turn.shard, self._filling, self._epoch, self._idle

    def _fetch(self, shard: str, slot: Slot, epoch: int, idle: bool) -> None:
        start, seconds, num_bytes, complete = time.perf_counter(), 0.0, 0, False
        error: Optional[BaseException] = None
        try:
            num_bytes, complete = self._read(shard, slot.view, lambda: self._epoch != epoch)
            ended = time.perf_counter()
            seconds = ended - start
            self._on_read(shard, start, ended, num_bytes, idle)
        except BaseException as caught:  # whatever it is, it belongs to the loop
            error = caught
        with self._lock:
            self.bytes_read += num_bytes
            self._filling = None
            current = epoch == self._epoch
            if error is not None and current:
                self._error = error
                self._wanted.clear()
            entry = _Loaded(slot, num_bytes, seconds, 1, idle, True)
            if not current:
                entry.forget_cost()
            self._place(shard, complete, current, entry)
            self._next()  # later turns of this very shard hold it now, before the loop can release it
        _wake(self._loop_bell)
        error = None  # its traceback holds this frame, and so the slot

    def _place(self, shard: str, complete: bool, current: bool, entry: _Loaded) -> None:
        """Put what was read where the loop finds it, unless the pass that wanted it is over; a resident stays."""
        if complete and shard in self._resident_slots:
            self._residents[shard] = entry
        elif complete and current:
            self._loaded[shard] = entry
        elif shard not in self._resident_slots:
            self._room.give(entry.slot)


def _wake(bell: SimpleQueue) -> None:
    """Wake who waits for this bell, now or when he next does; one stroke is enough."""
    if bell.empty():
        bell.put(None)
