"""Bulk mode: inputs of similar length run together, as many rows as a budget has memory for.

A sweep over the weights consists of batches that run one after another through each shard. A batch is what is
multiplied at once; its activations are several times its hidden states.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, Dict, Iterator, List, Sequence, Tuple

from offramp.runtime.backend import Backend
from offramp.runtime.inputs import InputReader
from offramp.runtime.memory_model import BULK_FACTOR, MemoryModel, Workload, small_shards
from offramp.store.upcasting import staging_bytes

if TYPE_CHECKING:
    from offramp.session.classifier import Classifier

MAX_BULK_ROWS = 256
MAX_ROWS, MAX_SWEEP_ROWS = 32, 256
"""Most rows of a batch of the longest inputs: more multiply no faster. Most rows of a sweep: more read hardly less."""
BATCH_ROWS = 0.3
"""Cost of a batch in rows, besides its own rows. Measured: BERT-base in transformers, two cores, 1 row against 8."""
SWEEP_TOKENS = 480
"""Cost of a sweep in tokens: the number that two cores compute while float32 weights are read at 500 MB/s."""
NO_TEXT_TOKENS = 128
"""Tokens that an image or a record counts as."""
SLOTS = 2
"""Slots for the largest shard; with fewer nothing is read ahead."""


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


def with_most_rows(plan_for: Callable[[int, int], Classifier], *, has_deadline: bool = False) -> Classifier:
    """Return the classifier with the cheapest rows whose plan fits the budget; one row a sweep if no other fits.

    The plan for one row measures the process. Larger ones are estimated and not tried, since the memory of a trial
    stays with the process.

    Args:
        plan_for: returns the classifier for a number of rows of a batch and of batches of a sweep.
        has_deadline: a sweep is one batch.
    """
    single = plan_for(1, 1)
    store, backend, settings = single.store, single.backend, single.settings
    model, program, length = MemoryModel(InputReader(store), backend), store.program, single.length
    used = {shard for step in program.steps() for shard in step.shards}
    sizes = [layout.num_bytes for name, layout in store.manifest.layouts.items() if name in used]
    taken_bytes = single.plan.base_bytes + settings.encoding_bytes + staging_bytes(store.manifest)
    available_bytes = single.plan.budget_bytes - taken_bytes

    def left(num_rows: int, weights: int) -> int:
        activations = int(BULK_FACTOR * backend.activation_bytes(num_rows, length))
        return available_bytes - weights - model.sweep_bytes(Workload(num_rows, length), activations)

    streamed, num_inputs = sum(small_shards(sizes)) + SLOTS * max(sizes), settings.num_inputs
    most = MAX_SWEEP_ROWS if num_inputs is None else max(num_inputs, 1)
    fitting = [num_rows for num_rows in range(1, min(MAX_ROWS, most) + 1) if left(num_rows, streamed) >= 0]
    choices: Dict[int, int] = {}
    if fitting and (has_deadline or left(max(fitting), sum(sizes)) >= 0):  # all weights are resident: nothing to share
        choices[max(fitting)] = 1
    elif fitting:
        keeps = any(kernel.keeps_intermediates for kernel in program.kernels.values())
        for num_rows in fitting:
            fit = model.most_batches(num_rows, length, left(num_rows, streamed + max(sizes) * keeps))
            choices[num_rows] = min(fit, MAX_SWEEP_ROWS // num_rows, -(-most // num_rows))
    tokens = NO_TEXT_TOKENS if program.texts is None else length
    num_rows, num_batches = min(choices.items(), key=lambda choice: _cost(*choice, tokens), default=(1, 1))
    if num_inputs:
        num_rows, num_batches = _evenly(num_inputs, num_rows, num_batches)
    if num_rows * num_batches == 1:
        return single
    backend.trim()  # free the memory of the trial
    several = plan_for(num_rows, num_batches)
    return several if several.plan.feasible else single


def _evenly(num_inputs: int, num_rows: int, num_batches: int) -> Tuple[int, int]:
    """Return the fewest rows of a batch and batches of a sweep that take these inputs in no more sweeps.

    What the last sweep, or the last batch of the only one, would have left empty is memory for weights.
    """
    num_sweeps = -(-num_inputs // (num_rows * num_batches))
    sweep_rows = -(-num_inputs // num_sweeps)
    num_batches = -(-sweep_rows // num_rows)
    return -(-sweep_rows // num_batches), num_batches


def _cost(num_rows: int, num_batches: int, length: int) -> float:
    """Return the cost of one row relative to computing it."""
    return 1 + BATCH_ROWS / num_rows + SWEEP_TOKENS / length / (num_rows * num_batches)
