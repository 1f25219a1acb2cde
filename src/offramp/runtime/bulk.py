"""Bulk mode: as many rows as a budget holds activations for, so that one sweep of the weights serves them all."""

from __future__ import annotations

from typing import Callable

from offramp.runtime.backend import Backend
from offramp.runtime.classifier import Classifier
from offramp.runtime.course import course_of
from offramp.runtime.prepare import HEADROOM_BYTES, SMALL_SHARD_BYTES
from offramp.store import Store

BULK = "bulk"
"""What `batch` is called then."""
MAX_ROWS = 32
"""Of the longest length; more of them multiply no faster."""
SLOTS = 2
"""Of the largest shard, without which nothing is read ahead."""
MARGIN = 2.0
"""What activations may take, of what the backend promises to need at once: an arena keeps a buffer of every size. For
11 rows of BERT-base it took 68 MiB where 37 were needed."""


def with_most_rows(
    plan_for: Callable[[int], Classifier], store: Store, backend: Backend, length: int, budget_bytes: int
) -> Classifier:
    """The classifier with the most rows whose plan the budget holds; with one row if none does.

    The plan for one row tells what the process takes; more rows are then reckoned and not tried, since what a trial
    takes stays with the process.
    """
    single = plan_for(1)
    course = course_of(store)
    sizes = [shard.bytes for name, shard in store.contents.shards.items() if not course.is_gathered(name)]
    fixed = single.plan.base_bytes + single.settings.encoding_bytes + HEADROOM_BYTES + SLOTS * max(sizes)
    fixed += sum(size for size in sizes if size <= SMALL_SHARD_BYTES)

    def needed(num_rows: int) -> float:
        activations = MARGIN * backend.activation_bytes(num_rows, length)
        return fixed + activations + course.gathered_bytes(num_rows, length)

    fitting = [num_rows for num_rows in range(2, MAX_ROWS + 1) if needed(num_rows) <= budget_bytes]
    if not fitting:
        return single
    backend.close()  # what the trial took
    several = plan_for(max(fitting))
    return several if several.plan.feasible else single
