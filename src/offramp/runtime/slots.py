"""Page-aligned buffers for shards, what O_DIRECT and SIMD want and never the heap's, and rooms that hand them out."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from typing import Any, Dict, Optional, Sequence

import numpy as np


def new_pages(num_bytes: int) -> mmap.mmap:
    """Anonymous memory from the start of a page. Pages cost memory when they are first touched."""
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Slot:
    """One buffer: pages of its own, or of others from a page on."""

    def __init__(self, num_bytes: int, pages: Optional[mmap.mmap] = None, start: int = 0) -> None:
        self.num_bytes, self._start = num_bytes, start
        self._pages = new_pages(num_bytes) if pages is None else pages
        self.view = memoryview(self._pages)[start : start + num_bytes]
        self.array = np.frombuffer(self._pages, np.uint8, num_bytes, start)
        self.notes: Dict[str, Any] = {}
        """What its user keeps as long as the slot lives: views of it, by shard."""

    def drop_pages(self) -> None:
        """Give them to the kernel; what is read here now is 0."""
        self._pages.madvise(mmap.MADV_DONTNEED, self._start, self.num_bytes)


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
