"""The memory of a process besides weights: predictions, measurements, and every safety factor with its reason.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

from typing import Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple
from weakref import WeakKeyDictionary

import numpy as np

from offramp.measure import read_memory
from offramp.measure.mapped import refault_bytes
from offramp.program.program import TOKENS, Input, Program
from offramp.runtime.backend import Backend
from offramp.runtime.footprint import trim_memory
from offramp.runtime.inputs import InputReader
from offramp.runtime.ledger import LEDGER
from offramp.runtime.touched_pages import TouchedPages

HEADROOM_BYTES = 4 << 20
"""Growth of Python's heap, and error of the kernel's per-thread counters of resident pages (64 pages each)."""
HELD_BYTES = 32 << 10
"""Memory of a batch that waits, besides `Backend.state_bytes`: its objects, and parts of pages. Measured: 25 states of
BERT-base took 10.3 MiB, estimate 9.6 MiB."""
BULK_FACTOR = 2.0
"""Safety factor on `Backend.activation_bytes` for batches that are estimated and not measured: an arena keeps a buffer
of every size. Measured: 11 rows of BERT-base took 68 MiB, estimate 37 MiB."""
STREAM_FACTOR = 1.25
"""Safety factor on `Program.activation_bytes` when a module's own code runs: Python and PyTorch keep more alive."""
SMALL_SHARD_BYTES = 256 << 10
"""Largest shard that is always resident: streaming it would cost more than its memory."""
TOKEN_BYTES = 4 * 8
"""Memory of one token in a batch: id, mask and type, and as much again as one of them for intermediate arrays."""
LEAST_CODE_BYTES, MOST_CODE_BYTES = 4 << 20, 32 << 20
"""Code and constants of libraries that a pass runs. Measured: 5 to 6 MiB with ONNX Runtime and 4 MiB with NumPy without
the pages around them; 10 to 18 and 9 to 12 MiB with these, where the page table is hidden."""
RUN_CODE_BYTES = 1 << 20
"""Library pages that a run touches and no warm-up pass does: planning, opening, hashing and writing of results.
Measured: 2 to 3.5 MiB, of which the headroom was found to leave 2 MiB."""
SMALL_LENGTH = 8
"""Tokens of the first warm-up passes, which only bring code into memory."""
NUM_WARM_UPS = 3
"""Warm-up passes at full size, after which allocators have reached their final size."""


class Workload(NamedTuple):
    """The largest input of a plan: B rows of S tokens, and how many such batches share a sweep."""

    num_rows: int
    length: int
    num_batches: int = 1


class Footprint(NamedTuple):
    """Measured memory of a process besides weights: while it waits for inputs, and what a sweep adds."""

    base_bytes: int
    activation_bytes: int


_GROWN: WeakKeyDictionary[Backend, Dict[Tuple[int, int], int]] = WeakKeyDictionary()
"""Backend -> shape of a trial -> most bytes that its trials have left in memory."""


class MemoryModel:
    """Predicts what sweeps over one program take besides weights."""

    def __init__(self, inputs: InputReader, backend: Backend) -> None:
        self.backend, self._program = backend, inputs.program
        self._row_bytes, self._copied_bytes = inputs.row_bytes, inputs.copied_bytes

    def input_bytes(self, num_rows: int, length: int) -> int:
        """Return the bytes of the inputs of a batch, and of looked-up rows that are read after its first steps.

        A batch begins with these steps, so that other rows do not wait.
        """
        if self._program.texts is None:
            return self.gathering_bytes(num_rows, length)
        num_first = max(len(self._program.stages[0].steps), 1)
        held = {name for step in list(self._program.steps())[num_first:] for name in step.reads.values()}
        looked_up = sum(size for name, size in self._row_bytes.items() if name in held)
        return num_rows * length * (TOKEN_BYTES + looked_up)

    def gathering_bytes(self, num_rows: int, length: int) -> int:
        """Return the bytes that reading a batch takes.

        They are those of its looked-up rows, of the distinct rows of one table that are upcast, and of inputs other
        than texts.
        """
        inputs, lookups = self._program.inputs, self._program.lookups
        items = {name: _row_items(each, length) for name, each in inputs.items()}
        files = [items[lookups[name].input] * size for name, size in self._copied_bytes.items()]
        beside = max(files, default=0)
        if self._program.texts is None:
            beside += sum(items[name] * np.dtype(each.dtype).itemsize for name, each in inputs.items())
        return self._row_bytes_of(num_rows, length) + num_rows * beside

    def _row_bytes_of(self, num_rows: int, length: int) -> int:
        """Return the bytes of the looked-up rows of a batch."""
        inputs, lookups = self._program.inputs, self._program.lookups
        items = (_row_items(inputs[lookups[name].input], length) * size for name, size in self._row_bytes.items())
        return num_rows * sum(items)

    def held_bytes(self, num_rows: int, length: int) -> int:
        """Return the bytes that a batch [B, S] takes while another batch of its sweep is computed."""
        return self.backend.state_bytes(num_rows, length) + HELD_BYTES + self.input_bytes(num_rows, length)

    def sweep_bytes(self, workload: Workload, activation_bytes: int) -> int:
        """Return the bytes of a sweep if computing one of its batches takes `activation_bytes`.

        Rows are gathered before they are computed. Both count at once if the library keeps its buffers, unless the rows
        lie in them, and for inputs other than texts, which stay in memory.
        """
        shape = (workload.num_rows, workload.length)
        num_held = workload.num_batches - 1
        if self.backend.keeps_buffers and num_held:
            num_held += 1  # the batch that is computed was set aside too
        held, gathering = num_held * self.held_bytes(*shape), self.gathering_bytes(*shape)
        is_beside = self.backend.keeps_buffers or self._program.texts is None
        if self.backend.keeps_rows:
            gathering -= self._row_bytes_of(*shape)
        busy = activation_bytes + gathering if is_beside else max(activation_bytes, gathering)
        return busy + held + HEADROOM_BYTES

    def most_batches(self, num_rows: int, length: int, num_bytes: int) -> int:
        """Return how many batches of [B, S] tokens may share a sweep if the first of them leaves `num_bytes`."""
        num_held = max(num_bytes, 0) // self.held_bytes(num_rows, length)
        return max(num_held if self.backend.keeps_buffers else num_held + 1, 1)

    def estimate_footprint(self, workload: Workload, most_bytes: int, encoding_bytes: int = 0) -> Optional[Footprint]:
        """Return an estimate from above if the process takes more than `most_bytes` even at least, else None.

        For containers: near their limit a pass that is measured takes seconds, because its code is evicted.
        """
        memory, shape = read_memory(), (workload.num_rows, workload.length)
        activation_bytes = self.backend.activation_bytes(*shape)
        anon_bytes = memory.anon_bytes or 0
        if anon_bytes + LEAST_CODE_BYTES + self.sweep_bytes(workload, activation_bytes) <= most_bytes:
            return None
        base_bytes = max(anon_bytes + MOST_CODE_BYTES, memory.peak_bytes)
        activation_bytes = int(BULK_FACTOR * activation_bytes)
        return Footprint(base_bytes, self.sweep_bytes(workload, activation_bytes) + encoding_bytes)

    def measure_footprint(
        self,
        warm_up: Callable[[int, int], None],
        workload: Workload,
        budget_bytes: int,
        encoding_bytes: int = 0,
        *,
        most_bytes: int = 0,
    ) -> Footprint:
        """Bring the process to the footprint that it has while it runs, and measure it.

        Memory that only start-up needed is returned, and warm-up passes load what a pass needs, without the pages
        around it. A workload that cannot fit is not run: its plan is not feasible, and names a budget by the most that
        the prediction of the backend may be too small.

        Args:
            warm_up: runs a pass of [B, S] tokens without weights.
            budget_bytes: most memory without the weights of open engines.
            encoding_bytes: memory for encoding the largest input.
            most_bytes: memory up to which a workload that does not fit the budget is run nevertheless, so that the
                budget that is named is measured.
        """
        trim_memory()
        with TouchedPages() as touched:
            warm_up(1, SMALL_LENGTH)
            touched.narrow()
            warm_up(1, SMALL_LENGTH)
            base_bytes = resident_bytes() - LEDGER.resident_bytes()
            activation_bytes = self.backend.activation_bytes(workload.num_rows, workload.length)
            fits = base_bytes + activation_bytes <= budget_bytes
            if fits or base_bytes + int(BULK_FACTOR * activation_bytes) <= most_bytes:
                grown_bytes = 0
                for _ in range(NUM_WARM_UPS):
                    warm_up(workload.num_rows, workload.length)
                    grown_bytes = max(grown_bytes, resident_bytes() - LEDGER.resident_bytes() - base_bytes)
                activation_bytes = self._taken_bytes(workload, self._most_grown(workload, grown_bytes))
            else:
                activation_bytes = int(BULK_FACTOR * activation_bytes)
            last_bytes = resident_bytes()
        base_bytes += resident_bytes() + refault_bytes() - last_bytes + RUN_CODE_BYTES
        return Footprint(base_bytes, self.sweep_bytes(workload, activation_bytes) + encoding_bytes)

    def _most_grown(self, workload: Workload, grown_bytes: int) -> int:
        """Return the most that trials of this shape have left in memory, of this plan and of those before it.

        A second trial finds code in the page cache that it does not touch again, and that passes bring back.
        """
        grown, shape = _GROWN.setdefault(self.backend, {}), (workload.num_rows, workload.length)
        grown[shape] = max(grown.get(shape, 0), grown_bytes)
        return grown[shape]

    def _taken_bytes(self, workload: Workload, grown_bytes: int) -> int:
        """Return the activations of a batch whose trial has left `grown_bytes` in memory.

        They are these bytes and those that are returned while it runs, or the most that it took, where that is known;
        at least what the backend predicts, if it is not measured. Where the library keeps buffers, a copy of the rows
        that remain of a batch may come on top.
        """
        backend, shape = self.backend, (workload.num_rows, workload.length)
        trial_bytes = backend.trial_bytes(*shape)
        if trial_bytes is not None:
            return max(grown_bytes, trial_bytes)
        taken_bytes = grown_bytes + backend.returned_bytes(*shape)
        if not backend.is_measured:
            return max(backend.activation_bytes(*shape), taken_bytes)
        copies = backend.keeps_buffers and workload.num_rows > 1
        return max(backend.value_bytes(*shape), taken_bytes) if copies else taken_bytes


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return read_memory().rss_bytes


def stream_bytes(program: Program) -> int:
    """Return the bytes besides weights that the own code of a module takes for an input as large as its example."""
    return int(STREAM_FACTOR * program.activation_bytes)


def small_shards(sizes: Iterable[int]) -> List[int]:
    """Return the sizes of those shards that are always resident."""
    return [size for size in sizes if size <= SMALL_SHARD_BYTES]


def _row_items(each: Input, length: int) -> int:
    """Return the most elements of one row of an input."""
    items = 1
    for axis, most in zip(each.axes, each.largest or [None] * len(each.axes)):
        if axis == TOKENS:
            items *= length
        elif isinstance(axis, int):
            items *= most or axis
    return items
