"""Bulk mode: as many rows as the budget holds hidden states for share one sweep of the weights.

A sweep consists of batches that run one after another through each shard. Only one batch is computed at a time, since
its activations are several times the size of its hidden states.
"""

from __future__ import annotations

from typing import Callable, Dict

from offramp.runtime.backend import Backend
from offramp.runtime.course import course_of
from offramp.runtime.prepare import SMALL_SHARD_BYTES, Workload, held_bytes, sweep_bytes
from offramp.session.classifier import Classifier
from offramp.store import Store

MAX_ROWS, MAX_SWEEP_ROWS = 32, 256
"""Maximum rows of a batch of the longest length, beyond which throughput does not grow, and of a sweep, beyond which
the bytes read per row hardly fall."""
BATCH_ROWS = 0.3
"""Fixed cost of a batch in rows. Measured for BERT-base in transformers on two cores, one row against eight."""
SWEEP_TOKENS = 480
"""Cost of reading the weights of a sweep, in tokens computed by two cores at 500 MB/s of reads (float32 weights)."""
NO_TEXT_TOKENS = 128
"""Number of tokens that an image or a record of arrays counts as."""
SLOTS = 2
"""Number of slots of the largest shard; prefetching needs two."""
MARGIN = 2.0
"""Safety factor on Backend.activation_bytes: an arena keeps a buffer of every size. Measured: 11 rows of BERT-base took
68 MiB, estimate 37 MiB."""


def with_most_rows(
    plan_for: Callable[[int, int], Classifier],
    store: Store,
    backend: Backend,
    length: int,
    budget_bytes: int,
    *,
    has_deadline: bool = False,
) -> Classifier:
    """Return the classifier with the cheapest rows whose plan fits the budget; with one row if none does.

    `plan_for` takes the rows of a batch and the batches of a sweep. Under a deadline a sweep is one batch.

    The memory of the process is measured with one row, and computed for other numbers of rows, since the memory of a
    trial is not returned to the system.
    """
    single = plan_for(1, 1)
    course = course_of(store)
    sizes = [shard.bytes for name, shard in store.contents.shards.items() if not course.is_gathered(name)]
    base = single.plan.base_bytes + single.settings.encoding_bytes
    small = sum(size for size in sizes if size <= SMALL_SHARD_BYTES)

    def left(num_rows: int, weights: int) -> int:
        activations = int(MARGIN * backend.activation_bytes(num_rows, length))
        return budget_bytes - base - weights - sweep_bytes(backend, course, Workload(num_rows, length), activations)

    streamed = small + SLOTS * max(sizes)
    fitting = [num_rows for num_rows in range(1, MAX_ROWS + 1) if left(num_rows, streamed) >= 0]
    choices: Dict[int, int] = {}
    if fitting and (
        has_deadline or left(max(fitting), sum(sizes)) >= 0
    ):  # all weights are resident, so sweeps do not pay
        choices[max(fitting)] = 1
    elif fitting:
        together = streamed + max(sizes) * bool(backend.unsettled)
        for num_rows in fitting:
            room = left(num_rows, together) // held_bytes(backend, course, num_rows, length)
            choices[num_rows] = 1 + min(max(room, 0), MAX_SWEEP_ROWS // num_rows - 1)
    tokens = NO_TEXT_TOKENS if course.texts is None else length
    num_rows, num_batches = min(choices.items(), key=lambda each: _cost(*each, tokens), default=(1, 1))
    if num_rows * num_batches == 1:
        return single
    backend.close()  # free the memory of the plan for one row
    several = plan_for(num_rows, num_batches)
    return several if several.plan.feasible else single


def _cost(num_rows: int, num_batches: int, length: int) -> float:
    """Return the cost of a row, in rows computed."""
    return 1 + BATCH_ROWS / num_rows + SWEEP_TOKENS / length / (num_rows * num_batches)
