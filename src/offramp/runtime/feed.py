"""The weight feed: gives a driver the weights of its next step while the following ones are read.

Two drivers use it. The engine pushes a pass through it, step by step. `offramp.stream` is pulled by foreign code, which
decides what it touches next.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Callable, Dict, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from offramp.measure import Span, Trace
from offramp.program.program import Step
from offramp.runtime.ring import Ring, Turn
from offramp.runtime.slots import BufferPool, Slot
from offramp.store import Shard, Store
from offramp.store.reader import tensor_view


@dataclass(frozen=True)
class Buffers:
    """Memory for weights, and how far ahead of their use they are read."""

    pool: BufferPool
    """Slots for the shards that are streamed."""
    residents: Mapping[str, Slot]
    """Shard -> buffer of its own, in which it stays after its first read."""
    depth: int
    """Most shards that are read and not used yet."""


class Loaded(NamedTuple):
    """A shard in memory. Bytes and seconds of its read are 0 unless this pass is the first to use it."""

    slot: Slot
    num_bytes: int
    """0 also if it was read between passes."""
    read_seconds: float
    waited_seconds: float


class WeightFeed:
    """Reads the shards of a pass in order, hands them out, and counts the bytes.

    One driver thread at a time. Every method leaves the feed usable if an interrupt stops it.
    """

    def __init__(
        self,
        store: Store,
        buffers: Buffers,
        stage_of: Mapping[str, int],
        trace: Trace,
        *,
        direct: bool = False,
        halves: bool = False,
    ) -> None:
        """Start the reader thread.

        Args:
            stage_of: shard -> stage that the trace names it under; 0 for other shards.
            direct, halves: how `Store.read_shard` reads.
        """
        self.trace, self.pass_index, self.is_open = trace, 0, True
        self._store, self._stage_of, self._tensors = store, stage_of, store.manifest.tensors()

        def read(shard: str, view: memoryview, cancelled: Callable[[], bool]) -> Tuple[int, bool]:
            return store.read_shard(shard, view, direct=direct, halves=halves, cancelled=cancelled)

        residents = dict(buffers.residents)
        self._ring = Ring(read, buffers.pool, residents, depth=buffers.depth, on_read=self._on_read)

    def begin_pass(self, turns: Sequence[Turn], *, restart: bool = False) -> None:
        """Start to read the shards of a pass. Keep what was read ahead for it, unless `restart`."""
        if restart:
            self._ring.end_pass()
        self._ring.begin_pass(turns)

    def acquire(self, shard: str, until: Optional[float] = None) -> Optional[Loaded]:
        """Wait for a shard. Return None if it is not there at `until`, a time of `time.perf_counter`.

        Raises what the reader raised.
        """
        started = time.perf_counter()
        acquired = self._ring.acquire(shard, until)
        if acquired is None:
            return None
        slot, num_bytes, seconds = acquired
        ended = time.perf_counter()
        stage = self._stage_of.get(shard, 0)
        self.trace.add(Span(shard, stage, "wait", started, ended, num_bytes, "loop", self.pass_index))
        return Loaded(slot, num_bytes, seconds, ended - started)

    def views(self, step: Step, slots: Mapping[str, Slot]) -> Dict[str, np.ndarray]:
        """Return the weights of a step by kernel input, as views of the slots that hold its shards."""
        views = {}
        for role, name in step.weights.items():
            shard = self._tensors[name][0]
            views[role] = _views_of(shard, slots[shard.name])[name]
        return views

    def release(self, shard: str, *, discard: bool = False) -> None:
        """End one use of a shard. `discard`: its slot is still referred to, so nothing may be read into it again."""
        self._ring.release(shard, discard=discard)

    def continue_past(self, stage: int) -> None:
        """Allow reads that wait for the decision after `stage`."""
        self._ring.continue_past(stage)

    def end_pass(self, next_turns: Sequence[Turn] = ()) -> None:
        """Drop what was read ahead, and read the first shards of the next pass if `next_turns` names some."""
        self._ring.end_pass(next_turns)
        self.pass_index += 1

    def count_read(self, num_bytes: int) -> None:
        """Count bytes that the driver read itself, such as gathered rows."""
        self._ring.add_bytes_read(num_bytes)

    def count_charged(self, num_bytes: int) -> None:
        """Count bytes that a finished pass charged to its rows."""
        self._ring.add_bytes_used(num_bytes)

    @property
    def bytes_read(self) -> int:
        """Bytes read from the store so far."""
        return self._ring.bytes_read

    @property
    def bytes_idle(self) -> int:
        """Bytes charged to no row: read between passes, read ahead without use, or read for a failed pass."""
        return self._ring.bytes_idle

    def close(self) -> None:
        """Stop the reader and free all buffers."""
        self.is_open = False
        self._ring.close()

    def _on_read(self, shard: str, started: float, ended: float, num_bytes: int, idle: bool) -> None:
        """Record a read. The reader thread calls this."""
        kind, stage = "idle_read" if idle else "read", self._stage_of.get(shard, 0)
        self.trace.add(Span(shard, stage, kind, started, ended, num_bytes, "reader", self.pass_index))


def _views_of(shard: Shard, slot: Slot) -> Dict[str, np.ndarray]:
    """Return the tensors of a shard as views of a slot, by name. They are kept with the slot: each shard that it holds
    lies at the same place every time.
    """
    views = slot.notes.get(shard.name)
    if views is None:
        views = {tensor.name: tensor_view(tensor, slot.array, shard.data_start) for tensor in shard.tensors}
        slot.notes[shard.name] = views
    return views
