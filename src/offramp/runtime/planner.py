"""Selection of resident shards and of the number of slots, before the first weight is read.

The cost of a plan follows the recurrence of a ring with w slots and one reader,

    io_end[j]   = max(io_end[j-1], comp_end[j-w]) + r_j          (j over the streamed shards)
    comp_end[i] = max(comp_end[i-1], io_end[i]) + c_i            (i over all shards)

over two consecutive passes, each shard weighted by the probability that it is reached. It is exact for a machine with
these costs. The planner is independent of files, clocks and backends.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, combinations
from typing import Dict, FrozenSet, Iterable, Iterator, List, Optional, Sequence, Set, Tuple

from offramp.errors import BudgetError
from offramp.runtime.config import LISTS, PLANNED
from offramp.runtime.ledger import ADDRESS_SPACE, BUDGET, CONTAINER, MEMORY, OTHER_BUDGET, Limit, group_bytes
from offramp.units import format_size, named_budget

PAGE_BYTES = 4096
"""Unit in bytes to which buffers are rounded."""
MAX_SLOTS = 3
"""Maximum number of slots that the planner considers, unless a step needs more."""
MAX_EXHAUSTIVE = 8
"""Number of shards up to which all sets of residents are tried. Above it, even spreads and greedy sequences are
tried."""
CONTENTION = 0.15
"""Fraction of the time of an overlapped read that still adds to the latency, because the reader shares memory bandwidth
and cores with the computation."""

SPREAD_BYTES = 1 << 20
"""Most by which the memory of two equal processes differs before the first weight is read. A budget that is named is
larger by this, so that the next process accepts it. Measured: 0.3 MiB with PyTorch, in 14 processes."""

EVICTED_BYTES = 4 << 20
"""Code that a container which is too small may have evicted while the process was measured; the limit that is named is
larger by this. Measured: up to 3 MiB where the plan was short of less than 10 MiB."""

REMEDIES = {
    BUDGET: "the smallest budget that works is {option}{least}",
    CONTAINER: "raise the memory limit of the container to {group}",
    MEMORY: "end other programs until {more} KiB more are available",
    ADDRESS_SPACE: "raise the limit of ulimit -v by {more}, in KiB",
    OTHER_BUDGET: "close the other engine first",
}
"""Source of a limit -> remedy where the limit is too small."""


def too_small(
    limit: Limit, parts: Sequence[Tuple[str, int]], needed_bytes: int, option: str = "", hint: str = ""
) -> BudgetError:
    """Return the error for a process that needs more than its limit.

    Args:
        parts: what the process takes besides the weights of other open engines, by name, in bytes.
        needed_bytes: smallest limit that works.
        option: spelling of the option that sets a budget, before its value.
        hint: follows the remedy.
    """
    what = f"{limit.source} of {format_size(limit.num_bytes + limit.margin_bytes)} is too small"
    others = [("other open engines", limit.reserved_bytes)] if limit.reserved_bytes else []
    kernel = [("kernel", limit.margin_bytes)] if limit.margin_bytes else []
    where = " + ".join(f"{name} {format_size(size)}" for name, size in (*parts[:1], *others, *parts[1:], *kernel))
    fits_alone = needed_bytes - limit.reserved_bytes <= limit.num_bytes
    source = OTHER_BUDGET if limit.reserved_bytes and fits_alone else limit.source
    more_kib = -(-(needed_bytes + SPREAD_BYTES - limit.num_bytes) >> 10)
    least, group = needed_bytes + SPREAD_BYTES, group_bytes(needed_bytes + SPREAD_BYTES + EVICTED_BYTES)
    facts = {"option": option, "least": named_budget(least), "group": named_budget(group), "more": more_kib}
    return BudgetError(what, where, REMEDIES[source].format(**facts) + hint)


@dataclass(frozen=True)
class Item:
    """One use of a shard within a pass, in order."""

    shard: str
    stage: int
    """Index of the layer that uses the shard, from 1; 0 before the layers, n + 1 after them."""
    num_bytes: int
    compute_seconds: float
    read_seconds: float
    survival: float = 1.0
    """Probability that the pass reaches this use."""


@dataclass(frozen=True)
class Plan:
    """Resident shards and slots.

    `slot_bytes` is the size of each of the `num_slots` slots; sizes are rounded to pages.
    """

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
    """Most memory of the process: the budget, or less where `limited_by` says so."""
    limited_by: str = BUDGET
    """Source of `budget_bytes`, one of those in `ledger`."""
    reserved_bytes: int = 0
    """Part of `base_bytes` that other open engines have reserved for their weights."""
    margin_bytes: int = 0
    """Part of the limit of a container that is left to the kernel, beside `budget_bytes`."""

    @property
    def limit(self) -> Limit:
        """The limit that the plan was made for."""
        return Limit(self.budget_bytes, self.limited_by, self.reserved_bytes, self.margin_bytes)

    @property
    def feasible(self) -> bool:
        """True if the plan fits the budget."""
        return self.predicted_peak_bytes <= self.budget_bytes

    def require_feasible(self, items: Sequence[Item], hint: str = "") -> None:
        """Raise BudgetError with the smallest budget that works and the reason, unless the plan is feasible.

        `hint` follows the remedy.
        """
        if self.feasible:
            return
        largest = max(items, key=lambda item: item.num_bytes)
        parts = (
            ("process", self.base_bytes - self.reserved_bytes),
            ("activations", self.activation_bytes),
            (f"one slot for {largest.shard}", page_rounded(largest.num_bytes)),
        )
        raise too_small(self.limit, parts, self.smallest_budget_bytes, option="--budget ", hint=hint)


@dataclass(frozen=True)
class Memory:
    """Memory other than weights: `base_bytes` before the first input, `activation_bytes` for the longest input."""

    base_bytes: int
    activation_bytes: int
    always_resident: FrozenSet[str] = frozenset()
    """Shards that are too small to be worth a slot."""
    start_bytes: int = 0
    """Peak of the process during start-up, if it counts; no plan can reduce it."""
    min_slots: int = 1
    """Number of shards that a single step holds at once; fewer slots would deadlock."""


@dataclass(frozen=True)
class Strategy:
    """Restriction of the plans that are compared, to measure what the choice of the planner gains."""

    residency: str = PLANNED
    """One of `config.RESIDENCIES`."""
    slots: Optional[int] = None
    """Number of slots; None: the planner chooses."""
    layers: Optional[int] = None
    """Most layers whose weights are in memory, slots included; None: the planner chooses, and one in a list."""

    @property
    def is_list(self) -> bool:
        """True if layers are kept in a list: each of its slots holds a layer."""
        return self.residency in LISTS

    @property
    def is_of_layers(self) -> bool:
        """True if layers are counted: what belongs to none of them stays in memory."""
        return self.is_list or self.layers is not None


UNRESTRICTED = Strategy()


def page_rounded(num_bytes: int) -> int:
    """Return `num_bytes` rounded up to whole pages."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def make_plan(items: Sequence[Item], memory: Memory, budget_bytes: int, strategy: Strategy = UNRESTRICTED) -> Plan:
    """Return the fastest plan within the budget, or the smallest plan (not `feasible`) if none fits.

    The candidates are the same for every budget, so a larger budget never gives a slower plan. A strategy restricts
    them.
    """
    choice = _Choice(items, memory)
    if strategy == UNRESTRICTED:
        floors, candidates = choice.floors(), choice.candidates(budget_bytes)
    else:
        floors = choice.within_layers(strategy, budget_bytes)
        candidates = iter(floors)
    smallest = min(floors, key=lambda pair: choice.peak_bytes(*pair))
    fitting = [pair for pair in candidates if choice.peak_bytes(*pair) <= budget_bytes]
    best = min(fitting, key=lambda pair: (pass_seconds(items, *pair), choice.peak_bytes(*pair)), default=smallest)
    return choice.plan(*best, budget_bytes, choice.peak_bytes(*smallest))


def layers_of(items: Sequence[Item], outside: FrozenSet[str]) -> List[Item]:
    """Return the items with one item for each layer, as large as a slot that holds all shards of the layer.

    Shards `outside` layers keep their own items.
    """
    found: Dict[int, Item] = {}
    for item in items:
        if item.shard not in outside:
            known = found.get(item.stage, Item("", item.stage, 0, 0.0, 0.0, item.survival))
            size = known.num_bytes + page_rounded(item.num_bytes)
            seconds = known.compute_seconds + item.compute_seconds, known.read_seconds + item.read_seconds
            found[item.stage] = Item(f"layer {item.stage}", item.stage, size, *seconds, known.survival)
    return [*(item for item in items if item.shard in outside), *found.values()]


def pass_seconds(items: Sequence[Item], residents: FrozenSet[str], num_slots: int) -> float:
    """Return the expected seconds of one pass in a steady sequence of passes, by the recurrence of this module."""
    costs = [(item.shard in residents, item.compute_seconds, item.read_seconds, item.survival) for item in items]
    io_end, comp_end, expected = 0.0, 0.0, 0.0
    ends = [0.0] * num_slots
    for is_counted in (False, True):
        for is_resident, compute, read, survival in costs:
            previous = comp_end
            if is_resident:
                comp_end += compute
            else:  # conditions in place of max: this loop is most of the time of a plan
                free = ends[-num_slots]
                io_end = (free if free > io_end else io_end) + read
                comp_end = (io_end if io_end > comp_end else comp_end) + compute
                ends.append(comp_end)
            if is_counted:
                expected += 0.0 if is_resident else survival * read * CONTENTION
                expected += survival * (comp_end - previous)
    return expected


Candidate = Tuple[FrozenSet[str], int]
"""Resident shards and number of slots."""


class _Choice:
    """Shard sizes of one problem, and the plans to compare."""

    def __init__(self, items: Sequence[Item], memory: Memory) -> None:
        self.items, self.memory = items, memory
        self.sizes = {item.shard: page_rounded(item.num_bytes) for item in items}
        self.free = [shard for shard in self.sizes if shard not in memory.always_resident]

    def peak_bytes(self, residents: FrozenSet[str], num_slots: int) -> int:
        weights_bytes = self._weight_bytes(residents, num_slots)
        return max(self.memory.start_bytes, self.memory.base_bytes + self.memory.activation_bytes + weights_bytes)

    def _weight_bytes(self, residents: FrozenSet[str], num_slots: int) -> int:
        return num_slots * self._slot_bytes(residents) + self._kept(residents)

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
        """Return the smallest plan for each slot size: larger shards are resident. Includes the fully resident plan."""
        caps = sorted({0, *(self.sizes[shard] for shard in self.free)})
        kept = [self._keeping(shard for shard in self.free if self.sizes[shard] > cap) for cap in caps]
        return [(residents, self.memory.min_slots if cap else 0) for cap, residents in zip(caps, kept)]

    def candidates(self, budget_bytes: int) -> Iterator[Candidate]:
        """Yield the plans to compare. Plans that are skipped do not fit the budget."""
        yield from self.floors()
        if self.peak_bytes(frozenset(self.sizes), 0) <= budget_bytes:
            return  # a fully resident model is the fastest
        for num_slots in range(self.memory.min_slots, max(MAX_SLOTS, self.memory.min_slots) + 1):
            are_few = len(self.free) <= MAX_EXHAUSTIVE
            for more in _subsets(self.free) if are_few else _even_spreads(self.free):
                yield self._keeping(more), num_slots
            for residents in () if are_few else self._starts():
                yield from self._ladder(residents, num_slots, budget_bytes)

    def restricted(self, strategy: Strategy, budget_bytes: int) -> Iterator[Candidate]:
        """Yield the plans of a strategy, the smallest among them."""
        if strategy.is_list:
            yield self._keeping(()), min(strategy.layers or 1, len(self.free))
            return
        least = self.memory.min_slots
        counts = range(least, max(MAX_SLOTS, least) + 1)
        if strategy.slots is not None:
            counts = range(max(strategy.slots, least), max(strategy.slots, least) + 1)
        spreads: Iterable[Sequence[str]] = ([], *_even_spreads(self.free), self.free)
        if strategy.residency == "prefix":
            spreads = (self.free[:count] for count in range(len(self.free) + 1))
        kept = [self._keeping(more) for more in spreads]
        if strategy.residency == PLANNED:
            kept = [residents for residents, _ in (*self.floors(), *self.candidates(budget_bytes))]
        for residents in dict.fromkeys(kept):
            for num_slots in counts:
                yield residents, num_slots if self._slot_bytes(residents) else 0

    def within_layers(self, strategy: Strategy, budget_bytes: int) -> List[Candidate]:
        """Return the plans of a strategy whose weights take at most its layers, at least one."""
        if strategy.layers is None or strategy.is_list:
            return list(self.restricted(strategy, budget_bytes))
        stages: Dict[int, Dict[str, int]] = {}
        for item in self.items:
            if item.shard in self.free:
                stages.setdefault(item.stage, {})[item.shard] = self.sizes[item.shard]
        largest = max((sum(sizes.values()) for sizes in stages.values()), default=0)
        most = strategy.layers * largest + self._kept(self.memory.always_resident)
        process = max(self.memory.base_bytes + self.memory.activation_bytes, self.memory.start_bytes)
        found = list(self.restricted(strategy, min(budget_bytes, process + most)))
        few = [pair for pair in found if self._weight_bytes(*pair) <= most]
        return few or [min(found, key=lambda pair: self._weight_bytes(*pair))]

    def _starts(self) -> Set[FrozenSet[str]]:
        """Return initial sets of residents: all shards above, or below, each of about three sizes."""
        caps = sorted({self.sizes[shard] for shard in self.free})
        caps = caps[:: -(-len(caps) // 3)]
        larger = [self._keeping(shard for shard in self.free if self.sizes[shard] > cap) for cap in caps]
        return {*larger, *(self._keeping(shard for shard in self.free if self.sizes[shard] < cap) for cap in caps)}

    def _keeping(self, more: Iterable[str]) -> FrozenSet[str]:
        return self.memory.always_resident.union(more)

    def _ladder(self, residents: FrozenSet[str], num_slots: int, budget_bytes: int) -> Iterator[Candidate]:
        """Add residents greedily, each time those that save the most time per byte, until the budget is exhausted.

        With many shards several are added at a time, so that the search takes less than a second.
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
    """Yield evenly spaced subsets of each size: the slots limit how many consecutive residents can hide reads."""
    return ([names[place * len(names) // count] for place in range(count)] for count in range(1, len(names)))
