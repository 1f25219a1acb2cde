"""Page-aligned buffers for shards, as O_DIRECT requires, and pools that hand them out. Buffers are not on the heap.

Layers are of about one size and share equal slots. Shards of a divided module differ in size. Allocating a buffer of
matching size for every read would make the kernel clear and map pages each time, which takes longer than the copy. The
pages of an arena stay mapped, and shards that are needed at about the same time do not overlap, so one can be read
while another is used.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from contextlib import suppress
from itertools import chain
from typing import Any, Dict, FrozenSet, Iterable, List, Mapping, Optional, Sequence, Set, Tuple

import numpy as np

from offramp.errors import BudgetError
from offramp.store import pages as page_table
from offramp.store.pages import HUGE_BYTES
from offramp.units import format_size

Stages = Sequence[Sequence[str]]
"""The shards that each stage needs at once, in the order of a pass; after the last stage the first one follows."""
PAGE = mmap.PAGESIZE
AHEAD = 8
"""Maximum distance in stages at which two shards are kept apart; shards that are used further apart may overlap."""


def new_pages(num_bytes: int) -> mmap.mmap:
    """Return anonymous page-aligned memory. Pages use physical memory when they are first touched.

    Raises BudgetError where the system gives none (`ulimit -v`).
    """
    try:
        return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        what = f"the system refuses {format_size(num_bytes)} of memory for weights"
        raise BudgetError(what, None, "raise the limit of ulimit -v, or give a smaller --budget") from None


def new_aligned_pages(num_bytes: int) -> Tuple[mmap.mmap, int]:
    """Return memory, as `new_pages` does, and where in it `num_bytes` start at a multiple of HUGE_BYTES."""
    found = new_pages(num_bytes + HUGE_BYTES)
    first = np.frombuffer(found, np.uint8).ctypes.data
    start = -first % HUGE_BYTES
    end = first + start + pages_of(num_bytes) * PAGE
    # The rest cannot be used: else the kernel might make it part of a huge page of memory at the end.
    page_table.reserve(end, first + pages_of(num_bytes + HUGE_BYTES) * PAGE - end)
    return found, start


class Slot:
    """One buffer: its own pages, or a range of other pages that starts on a page boundary."""

    def __init__(self, num_bytes: int, pages: Optional[mmap.mmap] = None, start: int = 0) -> None:
        self.num_bytes, self.start = num_bytes, start
        self.pages = new_pages(num_bytes) if pages is None else pages
        self.view = memoryview(self.pages)[start : start + num_bytes]
        self.array = np.frombuffer(self.pages, np.uint8, num_bytes, start)
        self.address = self.array.ctypes.data
        self.notes: Dict[str, Any] = {}
        """Views of it that the user of the slot keeps as long as the slot lives, by tensor or by shard."""

    def part(self, start: int, num_bytes: int) -> Slot:
        """Return a slot in a range of this one, which starts on a page boundary."""
        return Slot(num_bytes, self.pages, self.start + start)

    def drop_pages(self) -> None:
        """Return the pages to the kernel. Reading them afterwards returns zeros."""
        self.pages.madvise(mmap.MADV_DONTNEED, self.start, self.num_bytes)


def aligned_slot(num_bytes: int) -> Slot:
    """Return a slot that starts at a multiple of HUGE_BYTES."""
    return Slot(num_bytes, *new_aligned_pages(num_bytes))


def huge_slot(num_bytes: int) -> Slot:
    """Return an aligned slot in huge pages, where the system has them. Its end, which fills none, is in small ones.

    The kernel hands a disk one request for a piece of memory, so that small pages make direct reads slow.
    """
    if num_bytes < HUGE_BYTES:
        return Slot(num_bytes)
    slot = aligned_slot(num_bytes)
    whole = num_bytes // HUGE_BYTES * HUGE_BYTES
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            slot.pages.madvise(mmap.MADV_HUGEPAGE, slot.start, whole)
    return slot


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
    def pages(self) -> Iterable[mmap.mmap]:
        """Return the mappings in which all buffers lie."""

    @abstractmethod
    def close(self) -> None:
        """Drop all buffers."""


class EqualSlots(BufferPool):
    """Pool of slots of equal size; each holds any shard."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.num_slots = len(slots)
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

    def pages(self) -> Iterable[mmap.mmap]:
        """Return the mappings of all slots."""
        return [slot.pages for slot in self._slots]

    def close(self) -> None:
        """Drop all slots."""
        self._slots, self._free = [], []


class Arena(BufferPool):
    """Pool with a fixed place for each shard of `stages`.

    Its size is the largest total size of consecutive shards that the limit allows at once.

    Args:
        stages: the shards that each stage needs.
        buffer_bytes: size of the buffer of each shard.
        counted_bytes: bytes that each shard counts against the limit, while in use or left over.
        limit_bytes: limit of the pool.
        is_aligned: places start at multiples of HUGE_BYTES. What lies between them takes no memory.
    """

    def __init__(
        self,
        stages: Stages,
        buffer_bytes: Mapping[str, int],
        counted_bytes: Mapping[str, int],
        limit_bytes: int,
        *,
        is_aligned: bool = False,
    ) -> None:
        self._buffer_bytes, self._counted_bytes, self.limit_bytes = buffer_bytes, counted_bytes, limit_bytes
        unit = HUGE_BYTES if is_aligned else 1
        place_bytes = {shard: -(-size // unit) * unit for shard, size in buffer_bytes.items()}
        self.num_bytes = max_buffer_bytes(stages, place_bytes, counted_bytes, limit_bytes)
        self._starts = assign_offsets(stages, place_bytes, self.num_bytes)
        self._is_aligned, self._base = is_aligned, 0
        self._slots: Dict[str, Slot] = {}
        self._used: Dict[str, Slot] = {}
        self._map: Optional[mmap.mmap] = None
        self._names = list(buffer_bytes)
        self._numbers = {shard: number for number, shard in enumerate(self._names)}
        self._owners = np.zeros(0, np.int32)
        """Number of the shard that was last read into each page of the arena, or -1."""
        self._pages_left: Dict[str, int] = {}
        """Number of pages of each shard in memory that no later shard has overwritten."""
        self.peak_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Counted bytes of the shards in use."""
        return sum(self._counted_bytes[shard] for shard in self._used)

    @property
    def held_bytes(self) -> int:
        """Counted bytes of the shards in use and of the remains of others."""
        left = ((shard, pages) for shard, pages in self._pages_left.items() if pages and shard not in self._used)
        return self.used_bytes + sum(
            -(-self._counted_bytes[shard] * pages // pages_of(self._buffer_bytes[shard])) for shard, pages in left
        )

    def fits(self, shard: str) -> bool:
        """Return whether the limit allows the shard and its place is free."""
        if self.used_bytes + self._counted_bytes[shard] > self.limit_bytes:
            return False
        return not any(other == shard or self._overlap(shard, other) for other in self._used)

    def acquire(self, shard: str) -> Slot:
        """Return the place of the shard, or a separate buffer if it has none.

        Unused pages of the arena are then dropped.
        """
        slot = self._slots.get(shard)
        if slot is None:
            slot = self._slots[shard] = self._new_slot(shard)
        self._used[shard] = slot
        if shard in self._starts:
            self._overwrite(shard)
        if self.held_bytes > self.limit_bytes:
            self._drop_pages(self._used)
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return slot

    def release(self, slot: Slot) -> None:
        """Return a slot to the pool. Separate buffers and slots of an abandoned arena are dropped."""
        shard = self._remove_used(slot)
        if shard not in self._starts:
            del self._slots[shard]
        elif self._slots.get(shard) is not slot:
            slot.drop_pages()

    def discard(self, slot: Slot) -> None:
        """Discard a slot that a caller still references.

        The pool moves to a new arena; pages in use keep the old one alive.
        """
        shard = self._remove_used(slot)
        if shard in self._starts:
            self._drop_pages({shard, *self._used})
            self._map, self._pages_left = None, {}
            self._slots = {name: other for name, other in self._slots.items() if name not in self._starts}
        else:
            del self._slots[shard]

    def clear(self, kept: Optional[Slot]) -> None:
        """Release all slots except `kept`, the one that is being filled."""
        for slot in [slot for slot in self._used.values() if slot is not kept]:
            self.release(slot)

    def pages(self) -> Iterable[mmap.mmap]:
        """Return the mapping of the arena and those of separate buffers."""
        separate = [slot.pages for shard, slot in self._slots.items() if shard not in self._starts]
        return separate if self._map is None else [self._map, *separate]

    def close(self) -> None:
        """Drop all buffers."""
        self._map, self._slots, self._used = None, {}, {}

    def _remove_used(self, slot: Slot) -> str:
        shard = next(shard for shard, used in self._used.items() if used is slot)
        del self._used[shard]
        return shard

    def _new_slot(self, shard: str) -> Slot:
        if shard not in self._starts:
            self._drop_pages(self._used)
            return Slot(self._buffer_bytes[shard])
        if self._map is None:
            made = new_aligned_pages(self.num_bytes) if self._is_aligned else (new_pages(self.num_bytes), 0)
            self._map, self._base = made
            self._owners = np.full(pages_of(self.num_bytes), -1, np.int32)
        return Slot(self._buffer_bytes[shard], self._map, self._base + self._starts[shard])

    def _overwrite(self, shard: str) -> None:
        """Record that the shard overwrites the previous contents of its place."""
        first, num_pages = self._starts[shard] // PAGE, pages_of(self._buffer_bytes[shard])
        place = self._owners[first : first + num_pages]
        for number, count in zip(*np.unique(place[place >= 0], return_counts=True)):
            self._pages_left[self._names[number]] -= int(count)
        place[:] = self._numbers[shard]
        self._pages_left[shard] = num_pages

    def _overlap(self, shard: str, other: str) -> bool:
        if shard not in self._starts or other not in self._starts:
            return False
        one, two = self._starts[shard], self._starts[other]
        return one < two + self._buffer_bytes[other] and two < one + self._buffer_bytes[shard]

    def _drop_pages(self, keeping: Iterable[str]) -> None:
        """Return to the kernel all pages of the arena that are not part of these shards."""
        if self._map is None:
            return
        self._pages_left = {shard: pages for shard, pages in self._pages_left.items() if shard in set(keeping)}
        end = 0
        places = sorted((self._starts[shard], self._buffer_bytes[shard]) for shard in keeping if shard in self._starts)
        for start, size in [*places, (self.num_bytes, 0)]:
            if start > end:
                self._map.madvise(mmap.MADV_DONTNEED, self._base + end, start - end)
                self._owners[end // PAGE : start // PAGE] = -1
            end = max(end, start + size)


def pages_of(num_bytes: int) -> int:
    """Return the number of pages that hold `num_bytes`."""
    return -(-num_bytes // PAGE)


def max_buffer_bytes(
    stages: Stages, buffer_bytes: Mapping[str, int], counted_bytes: Mapping[str, int], limit_bytes: int
) -> int:
    """Return the largest total size of the buffers of consecutive shards whose counted bytes fit the limit.

    The result is at least what any single stage needs.
    """
    most = max((sum(buffer_bytes[shard] for shard in shards) for shards in stages), default=0)
    order = [shard for shards in stages for shard in shards]
    num_shards = len(set(order))
    for start in range(len(order)):
        together: Set[str] = set()
        counted = 0
        for shard in (*order[start:], *order[:start]):
            if shard not in together:
                counted += counted_bytes[shard]
                if counted > limit_bytes or len(together) == num_shards:
                    break
                together.add(shard)
        most = max(most, sum(buffer_bytes[shard] for shard in together))
    return most


def assign_offsets(stages: Stages, sizes: Mapping[str, int], num_bytes: int) -> Dict[str, int]:
    """Return the offset of each shard in a buffer of `num_bytes`.

    Shards of one stage never overlap; shards of nearby stages are kept apart as far as the space allows. Shards without
    a place are omitted.
    """
    near = _neighbours(stages)
    starts: Dict[str, int] = {}
    for shard in near:
        placed = [(other, distance) for other, distance in near[shard].items() if other in starts]
        best, best_distance = None, 0
        last = num_bytes - sizes[shard]
        ends = ((starts[other] + sizes[other], starts[other] - sizes[shard]) for other, _ in placed)
        for start in dict.fromkeys(chain((0, last), *ends)):
            end = start + sizes[shard]
            overlaps = (
                distance for other, distance in placed if start < starts[other] + sizes[other] and starts[other] < end
            )
            distance = min(overlaps, default=AHEAD + 1)
            if 0 <= start <= last and distance > best_distance:
                best, best_distance = start, distance
        if best is not None:
            starts[shard] = best
    return starts


def _neighbours(stages: Stages) -> Dict[str, Dict[str, int]]:
    """Return, for each shard in the order of use, the shards needed at most AHEAD stages away, with their distance."""
    found: Dict[str, Dict[str, int]] = {shard: {} for shards in stages for shard in shards}
    members: List[FrozenSet[str]] = [frozenset(shards) for shards in stages]
    for index, here in enumerate(members):
        for distance in range(min(AHEAD + 1, len(members))):
            for shard in here:
                for other in members[(index + distance) % len(members)] - {shard}:
                    for one, two in ((shard, other), (other, shard)):
                        found[one][two] = min(found[one].get(two, distance), distance)
    return found
