"""Batches of bulk mode: inputs of similar length, limited by the memory of the plan.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

from typing import Iterator, List, Sequence

from offramp.runtime.backend import Backend
from offramp.runtime.memory_model import Workload

MAX_BULK_ROWS = 256


def bulk_batches(lengths: Sequence[int], workload: Workload, backend: Backend) -> Iterator[List[int]]:
    """Yield indices of inputs with these lengths in batches, the longest inputs first.

    A batch takes no more activations, and has no more tokens, than the largest batch of the workload: arrays with more
    tokens would be larger than any that the backend has kept.
    """
    planned_bytes = backend.activation_bytes(workload.num_rows, workload.length)
    planned_tokens = workload.num_rows * workload.length
    batch: List[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        longest = lengths[batch[0]] if batch else lengths[index]
        fits = backend.activation_bytes(len(batch) + 1, longest) <= planned_bytes
        fits = fits and (len(batch) + 1) * longest <= planned_tokens
        if batch and (not fits or len(batch) == MAX_BULK_ROWS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
