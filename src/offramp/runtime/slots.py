"""Page-aligned buffers for shards, what O_DIRECT and SIMD want and never the heap's, and the rooms that hand them out.

A room of equal slots is allocated once. One of unequal ones makes a slot when a shard needs it and keeps it for the
next shard of that size: of a model with equal layers nothing is allocated after the first pass.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np


class Slot:
    """One anonymous, page-aligned buffer. Pages cost memory when they are first touched."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._map = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self._map)
        self.array = np.frombuffer(self._map, np.uint8)
        self.notes: Dict[str, Any] = {}
        """What its user keeps as long as the slot lives: views of it, by shard."""


class Room(ABC):
    """Where streamed shards lie."""

    @abstractmethod
    def fits(self, shard: str) -> bool:
        """Whether there is a place for a shard now."""

    @abstractmethod
    def take(self, shard: str) -> Slot:
        """A place for a shard that fits."""

    @abstractmethod
    def give(self, slot: Slot) -> None:
        """It is free again."""

    @abstractmethod
    def lose(self, slot: Slot) -> None:
        """It is not free, and will never be: somebody still reads from it."""

    @abstractmethod
    def clear(self, kept: Optional[Slot]) -> None:
        """All are free but the one that is being filled."""

    @abstractmethod
    def close(self) -> None:
        """Let go of all."""


class EqualSlots(Room):
    """Slots that each hold any shard."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = list(slots)
        self._free = list(slots)

    def fits(self, shard: str) -> bool:
        """Whether a slot is free."""
        return bool(self._free)

    def take(self, shard: str) -> Slot:
        """A free slot."""
        return self._free.pop()

    def give(self, slot: Slot) -> None:
        """To the free ones."""
        self._free.append(slot)

    def lose(self, slot: Slot) -> None:
        """A new one takes its place."""
        self._slots = [other for other in self._slots if other is not slot] + [Slot(slot.num_bytes)]
        self._free.append(self._slots[-1])

    def clear(self, kept: Optional[Slot]) -> None:
        """All but one."""
        self._free = [slot for slot in self._slots if slot is not kept]

    def close(self) -> None:
        """None are left."""
        self._slots, self._free = [], []


class SizedSlots(Room):
    """Slots of the size of each shard, as many as a limit holds; free ones count until they are let go.

    `buffer_bytes`: what each shard needs. `counted_bytes`: what it counts against the limit.
    """

    def __init__(self, buffer_bytes: Mapping[str, int], counted_bytes: Mapping[str, int], limit_bytes: int) -> None:
        self._buffer_bytes, self._counted_bytes, self.limit_bytes = buffer_bytes, counted_bytes, limit_bytes
        self._counts: Dict[int, int] = {}
        self._used: Dict[int, Slot] = {}
        self._free: List[Slot] = []
        self.peak_bytes = self._held_bytes = 0

    @property
    def used_bytes(self) -> int:
        """What the slots in use count."""
        return sum(self._counts[key] for key in self._used)

    def fits(self, shard: str) -> bool:
        """Whether the limit has room for it."""
        return self.used_bytes + self._counted_bytes[shard] <= self.limit_bytes

    def take(self, shard: str) -> Slot:
        """A slot of its size, of those that are free or new."""
        size, counted = self._buffer_bytes[shard], self._counted_bytes[shard]
        slot = next((s for s in self._free if s.num_bytes == size and self._counts[id(s)] == counted), None)
        if slot is not None:
            self._free = [other for other in self._free if other is not slot]
        else:
            while self._free and self._held_bytes + counted > self.limit_bytes:
                self._forget(self._free.pop(0))
            slot = Slot(size)
            self._counts[id(slot)] = counted
            self._held_bytes += counted
            self.peak_bytes = max(self.peak_bytes, self._held_bytes)
        self._used[id(slot)] = slot
        return slot

    def give(self, slot: Slot) -> None:
        """To the free ones."""
        self._free.append(self._used.pop(id(slot)))

    def lose(self, slot: Slot) -> None:
        """It counts no more here."""
        self._forget(self._used.pop(id(slot)))

    def clear(self, kept: Optional[Slot]) -> None:
        """All but one."""
        for slot in [slot for slot in self._used.values() if slot is not kept]:
            self.give(slot)

    def close(self) -> None:
        """None are left."""
        self._free, self._used, self._counts, self._held_bytes = [], {}, {}, 0

    def _forget(self, slot: Slot) -> None:
        self._held_bytes -= self._counts.pop(id(slot))
