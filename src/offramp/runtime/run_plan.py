"""The plan of a run: the cost of each use of a shard, the buffers that the plan allocates, and the way of reading.

The costs are nominal: they rank plans against one another (equal layers, equal costs) and predict no seconds.

Shards are read directly (O_DIRECT) if memory is scarce, otherwise buffered through the page cache. Buffered reads near
a memory limit thrash: the kernel evicts the pages that the next pass needs, and the process waits for reclaim. Direct
reads leave no pages behind, but every pass pays for the disk. Where memory is not scarce, the pages of the page cache
are mapped, which saves the copy (see `mapping`).
"""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from typing import Dict, FrozenSet, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from offramp.errors import DamagedError
from offramp.measure import address_space_bytes, read_memory
from offramp.program.dtypes import DTYPES
from offramp.runtime.config import READS
from offramp.runtime.feed import Buffers, WeightFeed
from offramp.runtime.ledger import Limit
from offramp.runtime.mapping import mapping_obstacle
from offramp.runtime.memory_model import SMALL_SHARD_BYTES, Footprint, Workload
from offramp.runtime.planner import UNRESTRICTED, Item, Memory, Plan, Strategy, layers_of, make_plan, page_rounded
from offramp.runtime.schedule import Schedule
from offramp.runtime.slots import EqualSlots, Slot, aligned_slot, huge_slot
from offramp.store import Store

NOMINAL_FLOPS_PER_SECOND = 60e9
"""Nominal speed of one core."""
NOMINAL_READ_BYTES_PER_SECOND = 2e9


class Reads(NamedTuple):
    """A way to read shards, and why it is not the one that was asked for, or that would be fastest."""

    name: str
    because: Optional[str] = None

    @property
    def options(self) -> Dict[str, bool]:
        """Options of `WeightFeed` for it."""
        return {"direct": self.name == "direct", "mapped": self.name == "mapped"}


DIRECT, BUFFERED, MAPPED = Reads("direct"), Reads("buffered"), Reads("mapped")


def plan_items(
    store: Store, uses: Sequence[Tuple[str, int]], workload: Workload, num_threads: int, reached: Sequence[float] = ()
) -> List[Item]:
    """Return one item for each use of a shard in a pass, in order.

    Args:
        uses: (shard, stage index) of each use.
        reached: share of rows that reach each layer; empty: all rows reach all layers.
    """
    num_rows, speed = workload.num_batches * workload.num_rows, NOMINAL_FLOPS_PER_SECOND * num_threads
    tokens, items = num_rows * workload.length, []
    for name, stage in uses:
        shard = store.manifest.shards[name]
        num_weights = sum(tensor.num_bytes // DTYPES[tensor.dtype].item_bytes for tensor in shard.tensors)
        compute_seconds = 2 * num_weights * tokens / speed  # a multiplication and an addition of each for a token
        read_seconds = shard.bytes / NOMINAL_READ_BYTES_PER_SECOND
        share = reached[min(stage, len(reached)) - 1] if reached and stage else 1.0
        survival = 1 - (1 - share) ** num_rows
        num_bytes = store.manifest.layouts[name].num_bytes
        items.append(Item(name, stage, num_bytes, compute_seconds, read_seconds, survival))
    return items


def make_run_plan(
    schedule: Schedule,
    items: List[Item],
    num_batches: int,
    footprint: Footprint,
    limit: Limit,
    own_process: bool,
    strategy: Strategy = UNRESTRICTED,
) -> Plan:
    """Return the plan for a process with this footprint.

    Args:
        num_batches: batches that share a sweep.
        limit: most memory of the process, and what of it other engines have reserved.
        own_process: the budget holds from the start of the process, so its peak so far counts.
        strategy: restriction of the plans that are compared.
    """
    small = frozenset(item.shard for item in items if item.num_bytes <= SMALL_SHARD_BYTES)
    if strategy.is_of_layers:
        small = _resident_beside_layers(items, small, schedule.layer_of)
    together = max(schedule.most_shards_together(num_batches, small), 1)
    start_bytes = read_memory().peak_bytes if own_process else 0
    base_bytes = footprint.base_bytes + limit.reserved_bytes
    memory = Memory(base_bytes, footprint.activation_bytes, small, start_bytes, together)
    plan = make_plan(layers_of(items, small) if strategy.is_list else items, memory, limit.num_bytes, strategy)
    reserved_bytes, margin_bytes = limit.reserved_bytes, limit.margin_bytes
    return replace(plan, limited_by=limit.source, reserved_bytes=reserved_bytes, margin_bytes=margin_bytes)


def _resident_beside_layers(items: List[Item], small: FrozenSet[str], layer_of: Mapping[str, int]) -> FrozenSet[str]:
    """Return the shards that stay in memory where layers are counted: those of no layer, and small ones of layers that
    have larger ones. A layer of small shards alone counts as others do, or counting would have no effect on it.
    """
    large = {layer_of[item.shard] for item in items if item.shard in layer_of and item.shard not in small}
    shards = {item.shard for item in items}
    return frozenset({each for each in small if layer_of.get(each) in large} | (shards - layer_of.keys()))


def allocate(store: Store, plan: Plan, reads: Reads = BUFFERED) -> Buffers:
    """Return the slots and resident buffers of a plan. Their pages take memory when they are first filled."""
    make_resident = huge_slot if address_space_bytes() is None else Slot  # no space for alignment where it is limited
    make = aligned_slot if reads.name == "mapped" else make_resident
    slots = [make(plan.slot_bytes) for _ in range(plan.num_slots)]
    sizes = {name: page_rounded(store.manifest.layouts[name].num_bytes) for name in sorted(plan.residents)}
    residents = {name: make_resident(size) for name, size in sizes.items()}
    return Buffers(EqualSlots(slots), residents, depth=len(slots) or 2)


def choose_reads(store: Store, reads: str, streamed: Sequence[str], growth_bytes: int, available_bytes: int) -> Reads:
    """Return how to read the streamed shards.

    `auto` chooses direct reads if the size of the store plus the planned growth exceeds the available memory and the
    file system supports them; otherwise mapped reads where they are possible: the page cache has the shards, or will
    have them after the first pass.
    Raises ValueError for an unknown value of `reads`.
    """
    if reads not in READS:
        raise ValueError(f"reads must be one of {READS}, got {reads!r}")
    store_bytes = sum(shard.bytes for shard in store.manifest.shards.values())
    is_scarce = store_bytes + growth_bytes > available_bytes
    if reads == "direct" or (reads == "auto" and is_scarce):
        works = hasattr(os, "O_DIRECT") and direct_works(store)
        return DIRECT if works else Reads("buffered", "this file system does not support direct reads")
    if reads == "buffered":
        return BUFFERED
    obstacle = mapping_obstacle(store, streamed)
    return MAPPED if obstacle is None else Reads("buffered", obstacle)


def reads_by_now(planned: Reads, feed: Optional[WeightFeed]) -> Reads:
    """Return how shards are read: as planned, or copied since they could no longer be mapped."""
    obstacle = None if feed is None else feed.mapping_obstacle
    return planned if obstacle is None else Reads("buffered", obstacle)


def direct_works(store: Store) -> bool:
    """Probe: read the smallest shard to its end, into an aligned buffer; EINVAL may come at open or at read."""
    whole = [shard for shard in store.manifest.shards.values() if shard.blocks is None]
    if not whole:
        return False
    shard = min(whole, key=lambda shard: shard.bytes)
    slot = Slot(page_rounded(store.manifest.layouts[shard.name].num_bytes))
    try:
        return store.read_shard(shard.name, slot.view, direct=True)[1]
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    except DamagedError:
        return False  # a short tail: the buffered read reports whether the file is damaged
