"""Weight feeds without look-ahead, to measure what the ring gains: a read starts when its step is due.

`DueFeed` has the plan of the ring. `ListFeed` keeps a list of layers, as programs do that load a layer when it is not
there and delete another one. Of L layers with n in the list, `fifo` and `lru` load all L in each pass: each is deleted
before it is due again. `mru`, which deletes the one loaded last, keeps the first n - 1.
"""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Sequence

from offramp.runtime.config import LRU, MRU
from offramp.runtime.feed import Buffers, WeightFeed
from offramp.runtime.planner import page_rounded
from offramp.runtime.ring import Loaded, Turn
from offramp.runtime.slots import BufferPool, Slot
from offramp.store import Store


class DueFeed(WeightFeed):
    """A weight feed that reads nothing ahead: each turn waits until the driver asks for its shard."""

    _num_due = 0

    def begin_pass(self, turns: Sequence[Turn], *, restart: bool = False) -> None:
        """Start a pass: the shards are read when they are due."""
        self._num_due = 0
        due = [Turn(turn.shard, number) for number, turn in enumerate(turns, 1)]
        super().begin_pass(due, restart=restart)

    def acquire(self, shard: str, until: Optional[float] = None) -> Optional[Loaded]:
        """Read the next shard of the pass, unless it is in memory."""
        self._num_due += 1
        super().continue_past(self._num_due)
        return super().acquire(shard, until)

    def continue_past(self, stage: int) -> None:
        """Do nothing: no read waits for a stage."""

    def end_pass(self, next_turns: Sequence[Turn] = ()) -> None:
        """End the pass. Nothing of the next one is read."""
        super().end_pass()


class ListFeed(DueFeed):
    """A feed with a list of layers. The shards of a layer are residents as long as it is in the list.

    Args:
        buffers: slots, each of which holds a layer, and the residents that are always in memory.
        layer_of: shard -> index of its layer, for shards of layers.
        rule: one of `config.LISTS`.
    """

    def __init__(self, store: Store, buffers: Buffers, layer_of: Mapping[str, int], rule: str, *more: Any, **how: bool):
        self._layer_of, self._rule, self._slots = layer_of, rule, _all_of(buffers.pool)
        self._places: Dict[int, Slot] = {}
        """Layer in the list -> its slot, in the order in which they were loaded, or for `lru` used."""
        self._sizes = {shard: page_rounded(store.manifest.layouts[shard].num_bytes) for shard in layer_of}
        super().__init__(store, buffers, *more, **how)

    def acquire(self, shard: str, until: Optional[float] = None) -> Optional[Loaded]:
        """Read the next shard of the pass, unless its layer is in the list."""
        layer = self._layer_of.get(shard)
        if layer is not None:
            with self._lock:
                self._place(layer)
        return super().acquire(shard, until)

    def close(self) -> None:
        """Stop the reader and release all buffers."""
        super().close()
        self._slots, self._places = [], {}

    def _place(self, layer: int) -> None:
        """Bring a layer into the list, in the slot of another one if all are taken. An interrupt may stop it."""
        if layer in self._places:
            if self._rule == LRU:
                self._places[layer] = self._places.pop(layer)
            return
        while len(self._places) >= len(self._slots):
            del self._places[list(self._places)[-1 if self._rule == MRU else 0]]
        for shard, other in self._layer_of.items():
            if other not in self._places:
                self._resident_slots.pop(shard, None)
                self._residents.pop(shard, None)
        slot, start = next(slot for slot in self._slots if slot not in self._places.values()), 0
        for shard, other in self._layer_of.items():
            if other == layer:
                self._resident_slots[shard] = slot.part(start, self._sizes[shard])
                start += self._sizes[shard]
        self._places[layer] = slot


def _all_of(pool: BufferPool) -> List[Slot]:
    """Take all slots of a pool."""
    slots: List[Slot] = []
    while pool.fits(""):
        slots.append(pool.acquire(""))
    return slots
