"""The weight feed: gives a driver the weights of its next step while the following ones are read.

Two drivers use it. The engine pushes a pass through it, step by step. `offramp.stream` is pulled by foreign code, which
decides what it touches next.
"""

from __future__ import annotations

import time
from typing import AbstractSet, Callable, Dict, Mapping, NamedTuple, Optional, Tuple

import numpy as np

from offramp.measure import Span, Trace
from offramp.program.program import Step
from offramp.runtime.mapping import MappedPool
from offramp.runtime.ring import Loaded, Ring
from offramp.runtime.slots import BufferPool, EqualSlots, Slot
from offramp.store import Store
from offramp.store.reader import tensor_view


class Buffers(NamedTuple):
    """Memory for weights, and how far ahead of their use they are read."""

    pool: BufferPool
    """Slots for the shards that are streamed."""
    residents: Mapping[str, Slot]
    """Shard -> buffer of its own, in which it stays after its first read."""
    depth: int
    """Most shards that are read and not used yet."""

    @property
    def num_slots(self) -> Optional[int]:
        """Number of slots; None: the shards share an arena."""
        return self.pool.num_slots if isinstance(self.pool, EqualSlots) else None


class WeightFeed(Ring):
    """The ring of a store: reads its shards, hands out the weights of steps, and traces reads and waits.

    One driver thread at a time. Every method leaves the feed usable if an interrupt stops it.
    """

    def __init__(
        self,
        store: Store,
        buffers: Buffers,
        stage_of: Mapping[str, int],
        trace: Trace,
        *,
        mapped: bool = False,
        **how: bool,
    ) -> None:
        """Start the reader thread.

        Args:
            stage_of: shard -> stage that the trace names it under; 0 for other shards.
            mapped: map streamed shards over their slots, as long as that is possible.
            how: options of `Store.read_shard`: `direct`, `halves`.
        """
        self.trace, self._stage_of, self._num_slots = trace, stage_of, buffers.num_slots
        self._tensors, self._layouts = store.manifest.tensors(), store.manifest.layouts

        def read(shard: str, view: memoryview, cancelled: Callable[[], bool]) -> Tuple[int, bool]:
            return store.read_shard(shard, view, cancelled=cancelled, **how)

        residents, how_to_run = dict(buffers.residents), {"depth": buffers.depth, "on_read": self._trace_read}
        self._mapped = MappedPool(store, buffers.pool, read) if mapped else None
        if self._mapped is None:
            super().__init__(read, buffers.pool, residents, **how_to_run)
        else:
            super().__init__(self._mapped.read, self._mapped, residents, wait=self._mapped.wait, **how_to_run)

    @property
    def mapping_obstacle(self) -> Optional[str]:
        """Why shards that were to be mapped are copied by now, or None."""
        return None if self._mapped is None else self._mapped.obstacle

    def require_slots(self, num_shards: int) -> None:
        """Raise ValueError for more shards at once than there are slots: the last of them would be waited for without
        end."""
        if self._num_slots is not None and num_shards > self._num_slots:
            raise ValueError(f"{num_shards} shards are needed at once, and there are {self._num_slots} slots")

    @property
    def residents(self) -> AbstractSet[str]:
        """Shards that stay in memory."""
        return self._resident_slots.keys()

    def acquire(self, shard: str, until: Optional[float] = None) -> Optional[Loaded]:
        """Wait for a shard, as the ring does, and trace the wait."""
        loaded = super().acquire(shard, until)
        if loaded is not None:
            ended, stage = time.perf_counter(), self._stage_of.get(shard, 0)
            started = ended - loaded.waited_seconds
            self.trace.add(Span(shard, stage, "wait", started, ended, loaded.num_bytes, "loop", self.pass_index))
        return loaded

    def views(self, step: Step, slots: Mapping[str, Slot]) -> Dict[str, np.ndarray]:
        """Return the weights of a step by kernel input, as views of the slots that hold its shards.

        A slot keeps its views: each shard that it holds lies at the same place every time.
        """
        views = {}
        for role, name in step.weights.items():
            shard, _ = self._tensors[name]
            slot = slots[shard.name]
            if name not in slot.notes:
                layout = self._layouts[shard.name]
                slot.notes[name] = tensor_view(layout.tensors[name], slot.array, layout.start)
            views[role] = slot.notes[name]
        return views

    def before_fork(self) -> None:
        """Take the locks, and give back all leases."""
        super().before_fork()
        if self._mapped is not None:
            self._mapped.before_fork()

    def after_fork_in_parent(self) -> None:
        """Release the locks."""
        if self._mapped is not None:
            self._mapped.after_fork_in_parent()
        super().after_fork_in_parent()

    def after_fork(self) -> None:
        """Forget the reader and its files."""
        if self._mapped is not None:
            self._mapped.after_fork()
        super().after_fork()

    def _trace_read(self, shard: str, started: float, ended: float, num_bytes: int, idle: bool) -> None:
        kind, stage = "idle_read" if idle else "read", self._stage_of.get(shard, 0)
        self.trace.add(Span(shard, stage, kind, started, ended, num_bytes, "reader", self.pass_index))
