"""Bulk mode: as many rows as a budget holds hidden states for, so that one sweep of the weights serves them all.

A sweep is made of batches, which run one after another through each shard: what multiplies at once is a batch, whose
activations are several times its hidden states.
"""

from __future__ import annotations

from typing import Callable, Dict

from offramp.runtime.backend import Backend
from offramp.runtime.course import course_of
from offramp.runtime.prepare import SMALL_SHARD_BYTES, Workload, held_bytes, sweep_bytes
from offramp.session.classifier import Classifier
from offramp.store import Store

MAX_ROWS, MAX_SWEEP_ROWS = 32, 256
"""Of a batch, of the longest length; more of them multiply no faster. Of a sweep; more of them read hardly less."""
BATCH_ROWS = 0.3
"""A batch takes as much more than its rows do (of BERT-base: transformers on two cores, one row against eight)."""
SWEEP_TOKENS = 480
"""A sweep of float32 weights reads as long as two cores compute so many tokens, where 500 MB are read in a second: what
larger batches and longer sweeps are weighed by.
"""
NO_TEXT_TOKENS = 128
"""What an image, or a record, counts as."""
SLOTS = 2
"""Of the largest shard, without which nothing is read ahead."""
MARGIN = 2.0
"""What activations may take, of what the backend promises to need at once: an arena keeps a buffer of every size. For
11 rows of BERT-base it took 68 MiB where 37 were needed."""


def with_most_rows(
    plan_for: Callable[[int, int], Classifier],
    store: Store,
    backend: Backend,
    length: int,
    budget_bytes: int,
    *,
    has_deadline: bool = False,
) -> Classifier:
    """The classifier with the most rows a sweep whose plan the budget holds; with one row if none does. `plan_for`
    takes the rows of a batch and the batches of a sweep. Under a deadline a sweep is one batch.

    The plan for one row tells what the process takes; more rows are then reckoned and not tried, since what a trial
    takes stays with the process.
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
    if fitting and (has_deadline or left(max(fitting), sum(sizes)) >= 0):  # all in memory: there is nothing to share
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
    backend.close()  # what the trial took
    several = plan_for(num_rows, num_batches)
    return several if several.plan.feasible else single


def _cost(num_rows: int, num_batches: int, length: int) -> float:
    """Of a row, in rows that are computed."""
    return 1 + BATCH_ROWS / num_rows + SWEEP_TOKENS / length / (num_rows * num_batches)
