"""Memory limits of containers: what is known before the process is measured, and limits that are lowered while it runs.

Near its limit a container evicts the code that runs. A process that cannot fit would take minutes to start, so it is
refused by estimates before its libraries are loaded.
"""

from __future__ import annotations

import time
from typing import Dict, NamedTuple, Optional, Tuple

import numpy as np

from offramp.measure import major_faults, read_memory
from offramp.program.program import Program
from offramp.runtime.config import EngineConfig
from offramp.runtime.ledger import CONTAINER, Limit, container_limit
from offramp.runtime.memory_model import HEADROOM_BYTES, Footprint, Workload
from offramp.runtime.planner import EVICTED_BYTES, Plan, too_small
from offramp.runtime.run_plan import make_run_plan, plan_items
from offramp.runtime.schedule import Schedule
from offramp.store import Store
from offramp.units import format_size


class Start(NamedTuple):
    """Memory in bytes, code included, that a backend adds to the anonymous memory of a process with an open store."""

    least_bytes: int
    most_bytes: int


STARTS: Dict[str, Start] = {
    "ort": Start(16 << 20, 40 << 20),
    "numpy": Start(6 << 20, 28 << 20),
    "torch": Start(64 << 20, 384 << 20),
}
"""Backend -> what it adds, without a tokenizer. Measured: ONNX Runtime 18 to 28 MiB, NumPy 8 to 14 MiB, PyTorch 260
MiB. The least is with the code of a pass only."""
TOKENIZER_FACTOR = 16
"""Memory of a tokenizer in sizes of its files. Measured: 12 (WordPiece, 30,522 tokens)."""
ACTIVATION_FACTOR = 3
"""Factor on the inputs and outputs of the largest step, to bound its activations from above."""
FOLLOW_SECONDS = 1.0
"""Time between two looks at the limit of the container."""
THRASHING_FAULTS = 400
"""Major faults between two looks from which a container evicts code that is needed again. Measured: at most 235 in a
whole cold run, from 1,000 on in each pass of a process that thrashes."""


def require_start(store: Store, config: EngineConfig, limit: Limit, last_exit: int) -> None:
    """Raise BudgetError if a container cannot hold the process even with the least that its parts can take.

    The error names a limit that is large enough by estimates from above. Call it before the backend is loaded.
    """
    start, held_bytes = STARTS.get(config.backend), read_memory().anon_bytes
    if limit.source != CONTAINER or start is None or held_bytes is None:
        return
    schedule = Schedule(store.program, last_exit)
    items = plan_items(store, schedule.uses(), Workload(1, 1), 1)

    def needed(base_bytes: int, activation_bytes: int) -> int:
        footprint = Footprint(held_bytes + base_bytes, activation_bytes + HEADROOM_BYTES)
        return make_run_plan(schedule, items, 1, footprint, limit._replace(num_bytes=0), False).smallest_budget_bytes

    if needed(start.least_bytes, 0) <= limit.num_bytes:
        return
    tokenizer = TOKENIZER_FACTOR * sum(file.bytes for file in store.manifest.files)
    base_bytes, activations = start.most_bytes + tokenizer, _most_activation_bytes(store.program, config)
    most = needed(base_bytes, activations)
    process = held_bytes + base_bytes
    weights = most - process - activations - HEADROOM_BYTES
    parts = (("process", process), ("activations", activations + HEADROOM_BYTES), ("weights", weights))
    raise too_small(limit, [(f"{name} at most", size) for name, size in parts], most)


def _most_activation_bytes(program: Program, config: EngineConfig) -> int:
    """Return an upper bound on the activations of a batch of the longest inputs."""
    num_rows = config.batch if isinstance(config.batch, int) else 1
    length = 1 if program.texts is None else config.longest or config.max_length or program.texts.max_length
    values = program.values()

    def size(name: str) -> int:
        return int(np.prod(values[name].shape(num_rows, length))) * np.dtype(values[name].dtype).itemsize

    steps = max(sum(map(size, {*step.reads.values(), *step.writes})) for step in program.steps())
    num_heads = max(int(kernel.attributes.get("num_heads") or 0) for kernel in program.kernels.values())
    scores = 2 * num_heads * num_rows * length * length * np.dtype(np.float32).itemsize
    rows, tokens = program.example if program.activation_bytes else (1, 1)
    captured = program.activation_bytes * num_rows * length // max(rows * tokens, 1)
    return ACTIVATION_FACTOR * (steps + captured) + scores


class ContainerWatch:
    """Looks at the limit of the container from time to time, and at the faults of this process.

    A page of code that is evicted is read back with those around it, up to the read-ahead of the disk, which may be 8
    MiB. They evict more code, so that a process at its limit may never come to rest where it did before. A smaller plan
    ends that.
    """

    def __init__(self) -> None:
        self._next_seconds, self._faults = time.monotonic() + FOLLOW_SECONDS, major_faults()

    def limit(self, plan: Plan) -> Tuple[Optional[Limit], str]:
        """Return what the container allows now, and the reason that is given for a smaller plan; None and no reason
        between two looks and without a container.

        Where code of this process is evicted again and again, the limit is less than the plan takes, if a smaller one
        fits.
        """
        now = time.monotonic()
        if now < self._next_seconds:
            return None, ""
        self._next_seconds = now + FOLLOW_SECONDS
        limit, before, self._faults = container_limit(), self._faults, major_faults()
        if limit is None:
            return None, ""
        whole_bytes = limit.num_bytes + limit.margin_bytes
        least_bytes = max(plan.predicted_peak_bytes - EVICTED_BYTES, plan.smallest_budget_bytes)
        if self._faults - before > THRASHING_FAULTS and least_bytes < min(plan.predicted_peak_bytes, limit.num_bytes):
            less = Limit(least_bytes, CONTAINER, margin_bytes=whole_bytes - least_bytes)
            return less, "the container evicts code of this process"
        return limit, f"the container was lowered to {format_size(whole_bytes)}"
