"""Which shards of a divided module stay in memory under a limit of bytes, and in which order the others are read.

Stages are as unequal as the module is, so there are no slots to count: what streams passes through a room of so many
bytes, and a plan is good if two stages that follow one another fit there, for one is read while the other computes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Dict, FrozenSet, Iterable, List, Mapping, Sequence, Tuple

from offramp.errors import BudgetError
from offramp.units import format_size

SLICE_BYTES = 8 << 20
Stages = Sequence[Sequence[str]]
"""The shards that each stage needs, in order."""


@dataclass(frozen=True)
class WeightPlan:
    """`residents` stay, and take `resident_bytes`; all others share a room of `room_bytes`."""

    residents: FrozenSet[str]
    resident_bytes: int
    room_bytes: int
    sliced: FrozenSet[str] = frozenset()
    """Shards that do not fit as a whole: they are read some rows at a time, when they are used."""
    slice_bytes: int = 0
    """Of these rows."""


def plan_weights(
    stages: Stages,
    sizes: Mapping[str, int],
    pinned: Iterable[str],
    limit_bytes: int,
    sliceable: Iterable[str] = (),
) -> WeightPlan:
    """Keep what the limit holds, such that the rest streams, if possible with one stage read ahead.

    `sliceable` shards, the largest first, are read in slices if a stage does not fit otherwise. Raises BudgetError
    naming the stage that does not fit, and the smallest limit.
    """
    kept = frozenset(pinned)
    choices = _slicings(kept, sizes, sliceable)
    left_out = next(
        (sliced for sliced in choices if _fewest(stages, sizes, kept, sliced) <= limit_bytes),
        min(choices, key=lambda sliced: _fewest(stages, sizes, kept, sliced)),
    )
    rest = [[shard for shard in shards if shard not in left_out] for shards in stages]
    needed, reserved = _fewest(stages, sizes, kept, left_out), slice_bytes(left_out, sizes)
    if needed > limit_bytes:
        index = max(range(len(rest)), key=lambda i: _bytes(set(rest[i]) - kept, sizes))
        what = f"weights of {format_size(limit_bytes)} are too few for stage {index}"
        why = f"it needs {format_size(_bytes(set(rest[index]) - kept, sizes))} at once"
        raise BudgetError(what, why, f"{needed} bytes of weights are the smallest that would do")
    return replace(_plan_whole(rest, sizes, kept, limit_bytes - reserved), sliced=left_out, slice_bytes=reserved)


def _plan_whole(stages: Stages, sizes: Mapping[str, int], kept: FrozenSet[str], limit_bytes: int) -> WeightPlan:
    used = {shard for shards in stages for shard in shards}
    if _bytes(used | kept, sizes) <= limit_bytes:
        return _plan(used | kept, sizes, limit_bytes)
    for shard in _in_order_of_worth(stages, sizes, kept):
        more = kept | {shard}
        if _bytes(more, sizes) + _two_stages(stages, sizes, more) <= limit_bytes:
            kept = more
    return _plan(kept, sizes, limit_bytes)


def smallest_bytes(
    stages: Stages, sizes: Mapping[str, int], pinned: Iterable[str] = (), sliceable: Iterable[str] = ()
) -> int:
    """The fewest bytes of weights that the stages can run with, if the shards `sliceable` may be read in slices."""
    kept = frozenset(pinned)
    return min(_fewest(stages, sizes, kept, sliced) for sliced in _slicings(kept, sizes, sliceable))


def _slicings(kept: FrozenSet[str], sizes: Mapping[str, int], sliceable: Iterable[str]) -> List[FrozenSet[str]]:
    """What may be sliced, from nothing to all: the largest first."""
    order = sorted(set(sliceable) - kept, key=lambda shard: (-sizes[shard], shard))
    return [frozenset(order[:count]) for count in range(len(order) + 1)]


def _fewest(stages: Stages, sizes: Mapping[str, int], kept: FrozenSet[str], sliced: FrozenSet[str]) -> int:
    """The fewest bytes, with these in slices."""
    streamed = max(_bytes(set(shards) - kept - sliced, sizes) for shards in stages)
    return _bytes(kept, sizes) + streamed + slice_bytes(sliced, sizes)


def slice_bytes(sliced: Iterable[str], sizes: Mapping[str, int]) -> int:
    """What one slice takes."""
    return min(SLICE_BYTES, max((-(-sizes[shard] // 4) for shard in sliced), default=0))


def reading_order(stages: Stages) -> List[List[str]]:
    """The shards that must be read when each stage begins: those of the stage before are still there."""
    before: Sequence[str] = ()
    order = []
    for shards in stages:
        order.append([shard for shard in shards if shard not in before])
        before = shards
    return order


def _plan(kept: Iterable[str], sizes: Mapping[str, int], limit_bytes: int) -> WeightPlan:
    residents = frozenset(kept)
    return WeightPlan(residents, _bytes(residents, sizes), limit_bytes - _bytes(residents, sizes))


def _two_stages(stages: Stages, sizes: Mapping[str, int], kept: FrozenSet[str]) -> int:
    """The most that a stage and the next one need together; behind the last comes the first of the next pass."""
    pairs = zip(stages, [*stages[1:], stages[0]])
    return max(_bytes({*one, *other} - kept, sizes) for one, other in pairs)


def _in_order_of_worth(stages: Stages, sizes: Mapping[str, int], kept: FrozenSet[str]) -> List[str]:
    """Large ones first, since the room must hold the largest that stream; of equal ones such that those that are kept
    lie evenly between those that are read.
    """
    names = list(dict.fromkeys(shard for shards in stages for shard in shards if shard not in kept))
    width = max(len(names) - 1, 1).bit_length()
    rank: Dict[str, int] = {name: int(format(place, f"0{width}b")[::-1], 2) for place, name in enumerate(names)}

    def worth(name: str) -> Tuple[int, int]:
        return -sizes[name], rank[name]

    return sorted(names, key=worth)


def _bytes(names: Iterable[str], sizes: Mapping[str, int]) -> int:
    return sum(sizes[name] for name in names)
