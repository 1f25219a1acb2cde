"""The plan of a run: the cost of each use of a shard, and the buffers that the plan allocates.

The costs are nominal: they rank plans against one another (equal layers, equal costs) and predict no seconds.
"""

from __future__ import annotations

from typing import List, Sequence, Tuple

from offramp.measure import read_memory
from offramp.program.dtypes import DTYPES
from offramp.runtime.feed import Buffers
from offramp.runtime.memory_model import SMALL_SHARD_BYTES, Footprint, Workload
from offramp.runtime.planner import Item, Memory, Plan, make_plan, page_rounded
from offramp.runtime.schedule import Schedule
from offramp.runtime.slots import EqualSlots, Slot
from offramp.store import Shard, Store

NOMINAL_FLOPS_PER_SECOND = 60e9
"""Nominal speed of one core."""
NOMINAL_READ_BYTES_PER_SECOND = 2e9


def plan_items(
    store: Store, uses: Sequence[Tuple[str, int]], workload: Workload, num_threads: int, reached: Sequence[float] = ()
) -> List[Item]:
    """Return one item for each use of a shard in a pass, in order.

    Args:
        uses: (shard, stage index) of each use.
        reached: share of rows that reach each layer; empty: all rows reach all layers.
    """
    num_rows, speed = workload.num_batches * workload.num_rows, NOMINAL_FLOPS_PER_SECOND * num_threads
    tokens = num_rows * workload.length

    def survival(stage: int) -> float:
        share = reached[min(stage, len(reached)) - 1] if reached and stage else 1.0
        return 1 - (1 - share) ** num_rows

    def item(name: str, stage: int) -> Item:
        shard = store.manifest.shards[name]
        compute_seconds = 2 * _num_weights(shard) * tokens / speed
        read_seconds = shard.bytes / NOMINAL_READ_BYTES_PER_SECOND
        return Item(name, stage, shard.bytes, compute_seconds, read_seconds, survival(stage))

    return [item(*use) for use in uses]


def make_run_plan(
    schedule: Schedule,
    items: Sequence[Item],
    num_batches: int,
    footprint: Footprint,
    budget_bytes: int,
    own_process: bool,
) -> Plan:
    """Return the plan for a process with this footprint.

    Args:
        num_batches: batches that share a sweep.
        own_process: the budget holds from the start of the process, so its peak so far counts.
    """
    small = frozenset(item.shard for item in items if item.num_bytes <= SMALL_SHARD_BYTES)
    together = max(schedule.most_shards_together(num_batches, small), 1)
    start_bytes = read_memory().peak_bytes if own_process else 0
    return make_plan(items, Memory(*footprint, small, start_bytes, together), budget_bytes)


def allocate(store: Store, plan: Plan) -> Buffers:
    """Return the slots and resident buffers of a plan. Their pages take memory when they are first filled."""
    slots = [Slot(plan.slot_bytes) for _ in range(plan.num_slots)]
    residents = {name: Slot(page_rounded(store.manifest.shards[name].bytes)) for name in sorted(plan.residents)}
    return Buffers(EqualSlots(slots), residents, depth=len(slots) or 2)


def _num_weights(shard: Shard) -> int:
    """Return the elements of a shard's tensors: each takes one multiplication and one addition a token."""
    return sum(tensor.num_bytes // DTYPES[tensor.dtype].item_bytes for tensor in shard.tensors)
