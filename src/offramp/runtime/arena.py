"""One buffer for all that streams, in which each shard has a place of its own from the start.

Shards of a divided module are as unequal as its stages. If each took a buffer of its size when it came, and the next
one another, the kernel would clear and map pages for every read, which takes longer than the copying. In an arena the
pages stay, and shards that are needed at about the same time lie apart in it, so that one can be read while another
computes.
"""

from __future__ import annotations

import mmap
from typing import Dict, FrozenSet, Iterable, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

import numpy as np

from offramp.runtime.slots import Room, Slot, new_pages

Stages = Sequence[Sequence[str]]
"""The shards that each stage needs at once, in the order of a pass; behind the last stage comes the first."""
PAGE = mmap.PAGESIZE
AHEAD = 8
"""Stages; what is needed further apart may lie in one place."""


class Arena(Room):
    """Places for the shards of `stages`, in as many bytes as those take that a limit lets be there together.

    `buffer_bytes`: what each shard needs. `counted_bytes`: what it counts against the limit, in use or left over.
    """

    def __init__(
        self, stages: Stages, buffer_bytes: Mapping[str, int], counted_bytes: Mapping[str, int], limit_bytes: int
    ) -> None:
        self._buffer_bytes, self._counted_bytes, self.limit_bytes = buffer_bytes, counted_bytes, limit_bytes
        self.num_bytes = most_together(stages, buffer_bytes, counted_bytes, limit_bytes)
        self._starts = lay_out(stages, buffer_bytes, self.num_bytes)
        self._slots: Dict[str, Slot] = {}
        self._used: Dict[str, Slot] = {}
        self._map: Optional[mmap.mmap] = None
        self._names = list(buffer_bytes)
        self._numbers = {shard: number for number, shard in enumerate(self._names)}
        self._owners = np.zeros(0, np.int32)
        """Of each page of the arena, the number of the shard that was read there last, or -1."""
        self._pages_left: Dict[str, int] = {}
        """Of shards that were read, the pages that nothing was read over since."""
        self.peak_bytes = 0

    @property
    def used_bytes(self) -> int:
        """What the shards in use count."""
        return sum(self._counted_bytes[shard] for shard in self._used)

    @property
    def held_bytes(self) -> int:
        """These, and what is left of others."""
        left = ((shard, pages) for shard, pages in self._pages_left.items() if pages and shard not in self._used)
        return self.used_bytes + sum(
            -(-self._counted_bytes[shard] * pages // pages_of(self._buffer_bytes[shard])) for shard, pages in left
        )

    def fits(self, shard: str) -> bool:
        """Whether the limit has room for it, and its place is free."""
        if self.used_bytes + self._counted_bytes[shard] > self.limit_bytes:
            return False
        return not any(other == shard or self._overlap(shard, other) for other in self._used)

    def take(self, shard: str) -> Slot:
        """Its place, or a buffer beside the arena, for which the arena gives up the pages that nobody uses."""
        slot = self._slots.get(shard)
        if slot is None:
            slot = self._slots[shard] = self._made(shard)
        self._used[shard] = slot
        self._overwrite(shard)
        if self.held_bytes > self.limit_bytes:
            self._drop_pages(self._used)
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return slot

    def give(self, slot: Slot) -> None:
        """It is free again. One beside the arena, or in an arena that was left, is none any more."""
        shard = self._forget(slot)
        if shard not in self._starts:
            del self._slots[shard]
        elif self._slots.get(shard) is not slot:
            slot.drop_pages()

    def lose(self, slot: Slot) -> None:
        """All others move to another arena; of this one the pages of the lost slot stay, and of those in use."""
        shard = self._forget(slot)
        if shard in self._starts:
            self._drop_pages({shard, *self._used})
            self._map, self._pages_left = None, {}
            self._slots = {name: other for name, other in self._slots.items() if name not in self._starts}
        else:
            del self._slots[shard]

    def clear(self, kept: Optional[Slot]) -> None:
        """All are free but the one that is being filled."""
        for slot in [slot for slot in self._used.values() if slot is not kept]:
            self.give(slot)

    def close(self) -> None:
        """Let go of all."""
        self._map, self._slots, self._used = None, {}, {}

    def _forget(self, slot: Slot) -> str:
        shard = next(shard for shard, used in self._used.items() if used is slot)
        del self._used[shard]
        return shard

    def _made(self, shard: str) -> Slot:
        if shard not in self._starts:
            self._drop_pages(self._used)
            return Slot(self._buffer_bytes[shard])
        if self._map is None:
            self._map = new_pages(self.num_bytes)
            self._owners = np.full(pages_of(self.num_bytes), -1, np.int32)
        return Slot(self._buffer_bytes[shard], self._map, self._starts[shard])

    def _overwrite(self, shard: str) -> None:
        """Whatever lay in its place is gone."""
        if shard not in self._starts:
            return
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
        """Give the kernel the pages of the arena that these shards do not lie on."""
        if self._map is None:
            return
        self._pages_left = {shard: pages for shard, pages in self._pages_left.items() if shard in set(keeping)}
        at = 0
        places = sorted((self._starts[shard], self._buffer_bytes[shard]) for shard in keeping if shard in self._starts)
        for start, size in [*places, (self.num_bytes, 0)]:
            if start > at:
                self._map.madvise(mmap.MADV_DONTNEED, at, start - at)
                self._owners[at // PAGE : start // PAGE] = -1
            at = max(at, start + size)


def pages_of(num_bytes: int) -> int:
    """As many as hold so many bytes."""
    return -(-num_bytes // PAGE)


def most_together(
    stages: Stages, buffer_bytes: Mapping[str, int], counted_bytes: Mapping[str, int], limit_bytes: int
) -> int:
    """The most bytes of buffers that shards following one another need while they count no more than the limit; at
    least what any stage needs.
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


def lay_out(stages: Stages, sizes: Mapping[str, int], num_bytes: int) -> Dict[str, int]:
    """Where each shard begins in so many bytes: shards of a stage apart, and those of stages that follow one another as
    far as there is space. What finds no place is left out.
    """
    near = _near(stages)
    starts: Dict[str, int] = {}
    for shard in near:
        placed = [(other, far) for other, far in near[shard].items() if other in starts]
        best, best_far = None, 0
        for start in _candidates(sizes[shard], [(starts[other], sizes[other]) for other, _ in placed], num_bytes):
            end = start + sizes[shard]
            meets = [far for other, far in placed if start < starts[other] + sizes[other] and starts[other] < end]
            if min(meets, default=AHEAD + 1) > best_far:
                best, best_far = start, min(meets, default=AHEAD + 1)
        if best is not None:
            starts[shard] = best
    return starts


def _candidates(size: int, places: Sequence[Tuple[int, int]], num_bytes: int) -> Iterator[int]:
    """Where so many bytes could begin: at both ends, or beside one of these places (start, bytes)."""
    found = [0, num_bytes - size]
    for start, taken in places:
        found += [start + taken, start - size]
    return (start for start in dict.fromkeys(found) if 0 <= start <= num_bytes - size)


def _near(stages: Stages) -> Dict[str, Dict[str, int]]:
    """Each shard, in the order of use -> those that are needed at most AHEAD stages away, and how many."""
    found: Dict[str, Dict[str, int]] = {shard: {} for shards in stages for shard in shards}
    members: List[FrozenSet[str]] = [frozenset(shards) for shards in stages]
    for index, here in enumerate(members):
        for far in range(min(AHEAD + 1, len(members))):
            for shard in here:
                for other in members[(index + far) % len(members)] - {shard}:
                    for one, two in ((shard, other), (other, shard)):
                        found[one][two] = min(found[one].get(two, far), far)
    return found
