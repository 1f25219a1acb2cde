"""Page-aligned buffers for shards, as O_DIRECT requires, and pools that hand them out. Buffers are not on the heap."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from typing import Dict, Optional, Sequence

import numpy as np


def new_pages(num_bytes: int) -> mmap.mmap:
    """Return anonymous page-aligned memory. Pages use physical memory when they are first touched."""
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Slot:
    """One buffer: its own pages, or a range of other pages that starts on a page boundary."""

    def __init__(self, num_bytes: int, pages: Optional[mmap.mmap] = None, start: int = 0) -> None:
        self.num_bytes, self._start = num_bytes, start
        self._pages = new_pages(num_bytes) if pages is None else pages
        self.view = memoryview(self._pages)[start : start + num_bytes]
        self.array = np.frombuffer(self._pages, np.uint8, num_bytes, start)
        self.notes: Dict[str, np.ndarray] = {}
        """Views of the slot that its user keeps as long as the slot lives, by tensor."""

    def drop_pages(self) -> None:
        """Return the pages to the kernel. Reading them afterwards returns zeros."""
        self._pages.madvise(mmap.MADV_DONTNEED, self._start, self.num_bytes)


class BufferPool(ABC):
    """Pool of buffers for streamed shards."""

    @abstractmethod
    def fits(self, shard: str) -> bool:
        """Return whether a buffer for the shard is available now."""

    @abstractmethod
    def acquire(self, shard: str) -> Slot:
        """Return a buffer for a shard; `fits` must hold."""

    @abstractmethod
    def release(self, slot: Slot) -> None:
        """Return a slot to the pool."""

    @abstractmethod
    def discard(self, slot: Slot) -> None:
        """Discard a slot that a caller still references; allocate a replacement."""

    @abstractmethod
    def clear(self, kept: Optional[Slot]) -> None:
        """Release all slots except `kept`, the one that is being filled."""

    @abstractmethod
    def close(self) -> None:
        """Drop all buffers."""


class EqualSlots(BufferPool):
    """Pool of slots of equal size; each holds any shard."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots, self._free = list(slots), list(slots)

    def fits(self, shard: str) -> bool:
        """Return whether a slot is free."""
        return bool(self._free)

    def acquire(self, shard: str) -> Slot:
        """Return a free slot."""
        return self._free.pop()

    def release(self, slot: Slot) -> None:
        """Return a slot to the pool."""
        self._free.append(slot)

    def discard(self, slot: Slot) -> None:
        """Discard a slot that a caller still references; allocate a replacement."""
        self._slots = [other for other in self._slots if other is not slot] + [Slot(slot.num_bytes)]
        self._free.append(self._slots[-1])

    def clear(self, kept: Optional[Slot]) -> None:
        """Release all slots except `kept`."""
        self._free = [slot for slot in self._slots if slot is not kept]

    def close(self) -> None:
        """Drop all slots."""
        self._slots, self._free = [], []
