"""Which shards stay resident, and how many slots the others pass through: computed before the first weight is read.

The cost of a plan is exact for the machine that its costs describe, by the recurrence of a ring with w slots and one
reader,

    io_end[j]   = max(io_end[j-1], comp_end[j-w]) + r_j          (j over the streamed shards)
    comp_end[i] = max(comp_end[i-1], io_end[i]) + c_i            (i over all shards)

run over two passes end to end, each shard weighted by the probability that it is reached. Nothing here knows of files,
clocks or backends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import FrozenSet, Iterable, Iterator, List, Sequence, Set, Tuple

from offramp.errors import BudgetError
from offramp.units import format_size

PAGE_BYTES = 4096
MAX_SLOTS = 3
MAX_EXHAUSTIVE = 8
"""Up to so many shards every set of residents is tried; beyond, even spreads, and orders of keeping more and more."""
CONTENTION = 0.15
"""Share of a hidden read that still costs: the reader takes memory bandwidth and a core from the one who multiplies."""


@dataclass(frozen=True)
class Item:
    """One use of a shard within a pass, in order."""

    shard: str
    stage: int
    """Index of the layer it belongs to, from 1; 0 before the layers, n + 1 after them."""
    num_bytes: int
    compute_seconds: float
    read_seconds: float
    survival: float = 1.0
    """Probability that the pass comes here."""


@dataclass(frozen=True)
class Plan:
    """What is kept and what is streamed. `slot_bytes` is the size of each of `num_slots`; sizes are page-rounded."""

    num_slots: int
    slot_bytes: int
    residents: FrozenSet[str]
    base_bytes: int
    activation_bytes: int
    resident_bytes: int
    predicted_peak_bytes: int
    predicted_seconds: float
    smallest_budget_bytes: int
    budget_bytes: int

    @property
    def feasible(self) -> bool:
        """Whether the budget holds this plan."""
        return self.predicted_peak_bytes <= self.budget_bytes

    def require_feasible(self, items: Sequence[Item]) -> None:
        """Raise BudgetError naming the smallest budget that would do, and why."""
        if self.feasible:
            return
        largest = max(items, key=lambda item: item.num_bytes)
        raise BudgetError(
            f"budget of {format_size(self.budget_bytes)} is too small",
            f"process {format_size(self.base_bytes)} + activations {format_size(self.activation_bytes)}"
            f" + one slot for {largest.shard} {format_size(page_rounded(largest.num_bytes))}",
            f"--budget {-(-self.smallest_budget_bytes >> 20)}MiB is the smallest that would do",
        )


@dataclass(frozen=True)
class Memory:
    """What is not weights: `base_bytes` before the first input, `activation_bytes` for the longest one."""

    base_bytes: int
    activation_bytes: int
    always_resident: FrozenSet[str] = field(default_factory=frozenset)
    """Shards too small to be worth a slot."""
    start_bytes: int = 0
    """The peak of getting here, where it counts: no plan can undo it."""
    min_slots: int = 1
    """Shards that one step holds at once: with fewer slots it would wait for ever."""


def page_rounded(num_bytes: int) -> int:
    """Bytes as whole pages."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def make_plan(items: Sequence[Item], memory: Memory, budget_bytes: int) -> Plan:
    """The fastest plan within the budget; if none fits, the smallest one (`feasible` is False then).

    The candidates are the same for every budget, so that more memory never gives a slower plan.
    """
    choice = _Choice(items, memory)
    smallest = min(choice.floors(), key=lambda pair: choice.peak_bytes(*pair))
    fitting = [pair for pair in choice.candidates(budget_bytes) if choice.peak_bytes(*pair) <= budget_bytes]
    best = min(fitting, key=lambda pair: (pass_seconds(items, *pair), choice.peak_bytes(*pair)), default=smallest)
    return choice.plan(*best, budget_bytes, choice.peak_bytes(*smallest))


def pass_seconds(items: Sequence[Item], residents: FrozenSet[str], num_slots: int) -> float:
    """Expected seconds of one pass in a steady stream of passes, by the recurrence above."""
    io_end, comp_end, expected = 0.0, 0.0, 0.0
    ends: List[float] = []
    for turn in (0, 1):
        for item in items:
            previous = comp_end
            if item.shard in residents:
                comp_end += item.compute_seconds
            else:
                free = ends[-num_slots] if len(ends) >= num_slots else 0.0
                io_end = max(io_end, free) + item.read_seconds
                comp_end = max(comp_end, io_end) + item.compute_seconds
                ends.append(comp_end)
                expected += turn * item.survival * item.read_seconds * CONTENTION
            expected += turn * item.survival * (comp_end - previous)
    return expected


Candidate = Tuple[FrozenSet[str], int]
"""Residents and number of slots."""


class _Choice:
    """The sizes of one problem, and the plans that are worth a look."""

    def __init__(self, items: Sequence[Item], memory: Memory) -> None:
        self.items, self.memory = items, memory
        self.sizes = {item.shard: page_rounded(item.num_bytes) for item in items}
        self.free = [shard for shard in self.sizes if shard not in memory.always_resident]

    def peak_bytes(self, residents: FrozenSet[str], num_slots: int) -> int:
        weights_bytes = num_slots * self._slot_bytes(residents) + self._kept(residents)
        return max(self.memory.start_bytes, self.memory.base_bytes + self.memory.activation_bytes + weights_bytes)

    def plan(self, residents: FrozenSet[str], num_slots: int, budget_bytes: int, floor_bytes: int) -> Plan:
        slot_bytes = self._slot_bytes(residents)
        return Plan(
            num_slots if slot_bytes else 0,
            slot_bytes,
            residents,
            self.memory.base_bytes,
            self.memory.activation_bytes,
            self._kept(residents),
            self.peak_bytes(residents, num_slots),
            pass_seconds(self.items, residents, num_slots),
            floor_bytes,
            budget_bytes,
        )

    def floors(self) -> List[Candidate]:
        """The smallest plan for each size of slot: what does not fit a slot is kept. All in memory is one of them."""
        caps = sorted({0, *(self.sizes[shard] for shard in self.free)})
        kept = [self._keeping(shard for shard in self.free if self.sizes[shard] > cap) for cap in caps]
        return [(residents, self.memory.min_slots if cap else 0) for cap, residents in zip(caps, kept)]

    def candidates(self, budget_bytes: int) -> Iterator[Candidate]:
        """Plans to compare. Those that are left out do not fit the budget."""
        yield from self.floors()
        if self.peak_bytes(frozenset(self.sizes), 0) <= budget_bytes:
            return  # nothing is faster than to read nothing
        for num_slots in range(self.memory.min_slots, max(MAX_SLOTS, self.memory.min_slots) + 1):
            if len(self.free) <= MAX_EXHAUSTIVE:
                yield from ((self._keeping(more), num_slots) for more in _subsets(self.free))
                continue
            yield from ((self._keeping(more), num_slots) for more in _even_spreads(self.free))
            for residents in self._starts():
                yield from self._ladder(residents, num_slots, budget_bytes)

    def _starts(self) -> Set[FrozenSet[str]]:
        """Where to keep more from: all that is larger, or all that is smaller, than some shard; three sizes of many."""
        caps = sorted({self.sizes[shard] for shard in self.free})
        caps = caps[:: -(-len(caps) // 3)]
        larger = [self._keeping(shard for shard in self.free if self.sizes[shard] > cap) for cap in caps]
        return {*larger, *(self._keeping(shard for shard in self.free if self.sizes[shard] < cap) for cap in caps)}

    def _keeping(self, more: Iterable[str]) -> FrozenSet[str]:
        return self.memory.always_resident.union(more)

    def _ladder(self, residents: FrozenSet[str], num_slots: int, budget_bytes: int) -> Iterator[Candidate]:
        """Keep one shard more, each time the one that saves most a byte, until the budget is full.

        Of very many shards some are kept at a time, so that the search stays below a second.
        """
        left, step = [shard for shard in self.free if shard not in residents], 1 + len(self.free) ** 2 // 1600
        while left and self.peak_bytes(residents, num_slots) <= budget_bytes:
            yield residents, num_slots
            before = pass_seconds(self.items, residents, num_slots)
            seconds = {shard: pass_seconds(self.items, residents | {shard}, num_slots) for shard in left}
            left.sort(key=lambda shard: (seconds[shard] - before) / self.sizes[shard])
            for best in left[:step]:
                residents = residents | {best}
                yield residents, num_slots
            left = left[step:]

    def _slot_bytes(self, residents: FrozenSet[str]) -> int:
        return max((size for shard, size in self.sizes.items() if shard not in residents), default=0)

    def _kept(self, residents: FrozenSet[str]) -> int:
        return sum(size for shard, size in self.sizes.items() if shard in residents)


def _subsets(names: Sequence[str]) -> Iterator[Tuple[str, ...]]:
    return chain.from_iterable(combinations(names, count) for count in range(len(names)))


def _even_spreads(names: Sequence[str]) -> Iterator[List[str]]:
    """So many names, spread evenly, for each count: what a run of residents hides is bounded by the slots."""
    return ([names[place * len(names) // count] for place in range(count)] for count in range(1, len(names)))
