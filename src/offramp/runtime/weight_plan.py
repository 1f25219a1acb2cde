"""Selection of resident shards of a divided module under a limit in bytes, and the reading order of the others.

Stages differ in size, so slots cannot be counted: streamed shards share a pool of bytes. A good plan has a pool that
holds two consecutive stages, because one is read while the other computes.
"""

from __future__ import annotations

from typing import FrozenSet, Iterable, List, Mapping, NamedTuple, Sequence

from offramp.errors import BudgetError
from offramp.units import format_size, named_size

SLICE_BYTES = 8 << 20
"""Maximum size of one slice of rows in bytes."""
Stages = Sequence[Sequence[str]]
"""The shards that each stage needs, in order."""


class WeightPlan(NamedTuple):
    """`residents` stay in memory and take `resident_bytes`; all other shards share a pool of `pool_bytes`."""

    residents: FrozenSet[str]
    resident_bytes: int
    pool_bytes: int
    sliced: FrozenSet[str] = frozenset()
    """Shards that do not fit as a whole; they are read a slice of rows at a time when they are used."""
    slice_bytes: int = 0
    """Memory for one slice in bytes."""


def plan_weights(
    stages: Stages, sizes: Mapping[str, int], pinned: Iterable[str], limit_bytes: int, sliceable: Iterable[str] = ()
) -> WeightPlan:
    """Return the plan that keeps as many shards as the limit allows, if possible with one stage of read-ahead.

    Shards in `sliceable` are read in slices, the largest first, if a stage does not fit otherwise. Raises BudgetError
    that names the stage that does not fit and the smallest limit.
    """
    kept = frozenset(pinned)
    choices = [(_fewest(stages, sizes, kept, sliced), sliced) for sliced in _slicings(kept, sizes, sliceable)]
    smallest = min(choices, key=lambda choice: choice[0])
    needed, sliced = next((choice for choice in choices if choice[0] <= limit_bytes), smallest)
    rest = [[shard for shard in shards if shard not in sliced] for shards in stages]
    if needed > limit_bytes:
        stage_bytes = [_bytes(set(shards) - kept, sizes) for shards in rest]
        index = stage_bytes.index(max(stage_bytes))
        what = f"a weight budget of {format_size(limit_bytes)} is too small for stage {index}"
        why = f"it needs {format_size(stage_bytes[index])} at once"
        beside = _bytes(kept, sizes) + slice_bytes(sliced, sizes)
        if beside:
            why += f", beside {format_size(beside)} of weights that stay in memory or are read by rows"
        raise BudgetError(what, why, f"the smallest weight budget that works is {named_size(needed)}")
    reserved = slice_bytes(sliced, sizes)
    residents = _residents(rest, sizes, kept, limit_bytes - reserved)
    resident_bytes = _bytes(residents, sizes)
    return WeightPlan(residents, resident_bytes, limit_bytes - reserved - resident_bytes, sliced, reserved)


def resized(
    plan: WeightPlan, stages: Stages, sizes: Mapping[str, int], pinned: Iterable[str], limit_bytes: int
) -> WeightPlan:
    """Return a plan with the same slices for another limit, or for the fewest weights if that is too small."""
    kept = frozenset(pinned)
    limit_bytes = max(limit_bytes, _fewest(stages, sizes, kept, plan.sliced)) - plan.slice_bytes
    rest = [[shard for shard in shards if shard not in plan.sliced] for shards in stages]
    residents = _residents(rest, sizes, kept, limit_bytes)
    resident_bytes = _bytes(residents, sizes)
    return plan._replace(residents=residents, resident_bytes=resident_bytes, pool_bytes=limit_bytes - resident_bytes)


def _residents(stages: Stages, sizes: Mapping[str, int], kept: FrozenSet[str], limit_bytes: int) -> FrozenSet[str]:
    """Return the shards that stay in memory, `kept` among them."""
    used = kept.union(*stages)
    if _bytes(used, sizes) <= limit_bytes:
        return used
    pairs = list(zip(stages, [*stages[1:], stages[0]]))  # the last stage is followed by the first
    for shard in _by_priority(stages, sizes, kept):
        more = kept | {shard}
        if _bytes(more, sizes) + max(_bytes({*one, *other} - more, sizes) for one, other in pairs) <= limit_bytes:
            kept = more
    return kept


def smallest_bytes(
    stages: Stages, sizes: Mapping[str, int], pinned: Iterable[str] = (), sliceable: Iterable[str] = ()
) -> int:
    """Return the smallest number of bytes of weights with which the stages can run.

    `sliceable` shards may be read in slices.
    """
    kept = frozenset(pinned)
    return min(_fewest(stages, sizes, kept, sliced) for sliced in _slicings(kept, sizes, sliceable))


def _slicings(kept: FrozenSet[str], sizes: Mapping[str, int], sliceable: Iterable[str]) -> List[FrozenSet[str]]:
    """Return the sets of shards that may be sliced, from none to all, adding the largest first."""
    order = sorted(set(sliceable) - kept, key=lambda shard: (-sizes[shard], shard))
    return [frozenset(order[:count]) for count in range(len(order) + 1)]


def _fewest(stages: Stages, sizes: Mapping[str, int], kept: FrozenSet[str], sliced: FrozenSet[str]) -> int:
    """Return the smallest number of bytes with the shards in `sliced` read in slices."""
    streamed = max(_bytes(set(shards) - kept - sliced, sizes) for shards in stages)
    return _bytes(kept, sizes) + streamed + slice_bytes(sliced, sizes)


def slice_bytes(sliced: Iterable[str], sizes: Mapping[str, int]) -> int:
    """Return the memory of one slice in bytes."""
    return min(SLICE_BYTES, max((-(-sizes[shard] // 4) for shard in sliced), default=0))


def reading_order(stages: Stages) -> List[List[str]]:
    """Return the shards to read at the start of each stage: those that the previous stage does not hold."""
    return [[shard for shard in shards if shard not in before] for before, shards in zip([(), *stages], stages)]


def _by_priority(stages: Stages, sizes: Mapping[str, int], kept: FrozenSet[str]) -> List[str]:
    """Return the shards in the order in which they become resident.

    The largest come first, because the pool must hold the largest streamed shard. Equal ones are ordered so that
    residents are spread evenly between streamed shards.
    """
    names = list(dict.fromkeys(shard for shards in stages for shard in shards if shard not in kept))
    width = max(len(names) - 1, 1).bit_length()
    rank = {name: int(format(place, f"0{width}b")[::-1], 2) for place, name in enumerate(names)}
    return sorted(names, key=lambda name: (-sizes[name], rank[name]))


def _bytes(names: Iterable[str], sizes: Mapping[str, int]) -> int:
    return sum(sizes[name] for name in names)
