"""From a store and a budget to a plan: what a pass uses, in order, with what it is thought to cost.

The costs are nominal: they rank plans against one another (equal layers, equal costs) and promise no seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Sequence, Tuple

from offramp.measure import available_bytes, read_memory
from offramp.runtime.backend import Backend
from offramp.runtime.course import Course
from offramp.runtime.footprint import trim_memory
from offramp.runtime.loop import Loop
from offramp.runtime.planner import Item, Memory, Plan, make_plan, page_rounded
from offramp.runtime.slots import Slot
from offramp.store import Store

NOMINAL_FLOPS_PER_SECOND = 60e9
"""Of one core, for the ranking of plans."""
NOMINAL_READ_BYTES_PER_SECOND = 2e9
SMALL_SHARD_BYTES = 256 << 10
"""A shard up to this size is always kept: a slot's turn would cost more than its memory."""
HELD_MARGIN = 1.1
"""What states take, of what backends promise: 25 of BERT-base took 0.7 MiB more than 9.6."""
SMALL_LENGTH = 8
"""Tokens of the first rehearsals, which only bring in code."""
HEADROOM_BYTES = 4 << 20
"""What Python's own heap and the kernel's per-thread counters (64 pages each, unsynchronised) may add to a plan."""


@dataclass(frozen=True)
class Workload:
    """The largest input that the plan is made for: B rows of S tokens, and how many such batches share a sweep."""

    num_rows: int
    length: int
    num_batches: int = 1


def plan_items(
    store: Store,
    uses: Sequence[Tuple[str, int]],
    workload: Workload,
    num_threads: int,
    reached: Sequence[float] = (),
) -> List[Item]:
    """One item for each use of a shard in a pass, (name, stage), in order. `reached`: the share of rows that come to
    each layer; all, if it is empty.
    """
    num_rows, speed = workload.num_batches * workload.num_rows, NOMINAL_FLOPS_PER_SECOND * num_threads
    tokens = num_rows * workload.length

    def survival(stage: int) -> float:
        share = reached[min(stage, len(reached)) - 1] if reached and stage else 1.0
        return 1 - (1 - share) ** num_rows

    def item(name: str, stage: int) -> Item:
        shard = store.contents.shards[name]
        compute_seconds = 2 * shard.data_bytes / 4 * tokens / speed
        read_seconds = shard.bytes / NOMINAL_READ_BYTES_PER_SECOND
        return Item(name, stage, shard.bytes, compute_seconds, read_seconds, survival(stage))

    return [item(*use) for use in uses]


def settle(
    loop: Loop, encode: Callable[[], Any], workload: Workload, budget_bytes: int, encoding_bytes: int = 0
) -> Tuple[int, int]:
    """Bring the process to the footprint that it has while it runs, and weigh it: (base bytes, activation bytes).

    What only start-up needed is given back, what a pass needs is brought in. Activations are those that the backend
    promises or those that a rehearsal was seen to take, whichever is more; a workload that cannot fit is not rehearsed,
    the plan will say so. `encoding_bytes`: what it takes to make an array of the largest input.
    """

    def rehearse(num_rows: int, length: int) -> int:
        loop.rehearse(num_rows, length)
        encode()
        return read_memory().rss_bytes

    rehearse(1, SMALL_LENGTH)
    trim_memory()
    base_bytes = rehearse(1, SMALL_LENGTH)
    activation_bytes = loop.backend.activation_bytes(workload.num_rows, workload.length)
    if base_bytes + activation_bytes <= budget_bytes:
        activation_bytes = max(
            activation_bytes, *(rehearse(workload.num_rows, workload.length) - base_bytes for _ in range(3))
        )
    return base_bytes, sweep_bytes(loop.backend, loop.course, workload, activation_bytes) + encoding_bytes


def sweep_bytes(backend: Backend, course: Course, workload: Workload, activation_bytes: int) -> int:
    """What a sweep takes beside weights, when a batch takes so much to compute."""
    gathered = course.gathered_bytes(workload.num_rows, workload.length)  # gone when activations are weighed
    held = (workload.num_batches - 1) * held_bytes(backend, course, workload.num_rows, workload.length)
    return activation_bytes + held + gathered + HEADROOM_BYTES


def held_bytes(backend: Backend, course: Course, num_rows: int, length: int) -> int:
    """What a batch takes while another of its sweep is computed."""
    return int(HELD_MARGIN * backend.state_bytes(num_rows, length)) + course.input_bytes(num_rows, length)


def make_run_plan(
    loop: Loop,
    workload: Workload,
    footprint: Tuple[int, int],
    budget_bytes: int,
    own_process: bool,
    reached: Sequence[float] = (),
) -> Tuple[Plan, List[Item]]:
    """The plan for a process of this footprint (base and activation bytes).

    `own_process`: the budget holds from the start of the process on, so its peak so far counts. `reached`: as
    `plan_items` takes it.
    """
    uses = [
        (name, index) for index, stage in enumerate(loop.stages()) for step in stage.steps for name in loop.loads(step)
    ]
    items = plan_items(loop.store, uses, workload, loop.backend.num_threads, reached)
    small = frozenset(item.shard for item in items if item.num_bytes <= SMALL_SHARD_BYTES)
    groups = (steps for stage in loop.stages() for steps in loop.at_once(stage, workload.num_batches))
    widest = max(len({name for step in steps for name in loop.loads(step)} - small) for steps in groups)
    memory = Memory(*footprint, small, read_memory().peak_bytes if own_process else 0, max(widest, 1))
    return make_plan(items, memory, budget_bytes), items


def allocate(store: Store, plan: Plan) -> Tuple[List[Slot], Dict[str, Slot]]:
    """The slots and resident buffers of a plan. Pages are taken when they are first filled."""
    slots = [Slot(plan.slot_bytes) for _ in range(plan.num_slots)]
    residents = {name: Slot(page_rounded(store.contents.shards[name].bytes)) for name in sorted(plan.residents)}
    return slots, residents


def unlimited_bytes() -> int:
    """The budget of those who name none: all that this process may still use, and what it has."""
    return available_bytes() + read_memory().rss_bytes
