"""The memory of a process besides weights: predictions, measurements, and every safety factor with its reason.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

from typing import Callable, Iterable, List, NamedTuple, Optional

import numpy as np

from offramp.measure import read_memory
from offramp.measure.mapped import refault_bytes
from offramp.program.program import TOKENS, Input, Program
from offramp.runtime.backend import Backend
from offramp.runtime.footprint import trim_memory
from offramp.runtime.inputs import InputReader
from offramp.runtime.ledger import LEDGER

HEADROOM_BYTES = 4 << 20
"""Growth of Python's heap, and error of the kernel's per-thread counters of resident pages (64 pages each)."""
HELD_FACTOR = 1.1
"""Safety factor on `Backend.state_bytes`. Measured: 25 BERT-base states took 10.3 MiB, estimate 9.6 MiB."""
BULK_FACTOR = 2.0
"""Safety factor on `Backend.activation_bytes` for batches that are estimated and not measured: an arena keeps a buffer
of every size. Measured: 11 rows of BERT-base took 68 MiB, estimate 37 MiB."""
STREAM_FACTOR = 1.25
"""Safety factor on `Program.activation_bytes` when a module's own code runs: Python and PyTorch keep more alive."""
SMALL_SHARD_BYTES = 256 << 10
"""Largest shard that is always resident: streaming it would cost more than its memory."""
TOKEN_BYTES = 4 * 8
"""Memory of one token in a batch: id, mask and type, and as much again as one of them for intermediate arrays."""
GATHER_COPIES = 4
"""Arrays of the size of the result that gathering rows of one table takes: the distinct rows, and three more."""
LEAST_CODE_BYTES, MOST_CODE_BYTES = 8 << 20, 32 << 20
"""Code and constants of libraries that a pass runs. Measured: 10 to 18 MiB with ONNX Runtime, 9 to 12 MiB with NumPy;
the first where a container leaves no more, at the same latency."""
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


class MemoryModel:
    """Predicts what sweeps over one program take besides weights."""

    def __init__(self, inputs: InputReader, backend: Backend) -> None:
        self.backend, self._program = backend, inputs.program
        self._row_bytes = inputs.row_bytes

    def input_bytes(self, num_rows: int, length: int) -> int:
        """Return the bytes of the inputs of a batch, and of looked-up rows that layers read, until they are used."""
        if self._program.texts is None:
            return self.gathering_bytes(num_rows, length)
        held = {name for stage in self._program.stages[1:] for step in stage.steps for name in step.reads.values()}
        looked_up = sum(size for name, size in self._row_bytes.items() if name in held)
        return num_rows * length * (TOKEN_BYTES + looked_up)

    def gathering_bytes(self, num_rows: int, length: int) -> int:
        """Return the bytes that reading a batch takes, besides what warm-up passes took for one row.

        Warm-up passes read texts only: of other inputs all rows count, and the inputs themselves.
        """
        inputs, lookups = self._program.inputs, self._program.lookups
        items = {name: _row_items(each, length) for name, each in inputs.items()}
        sizes = [items[lookups[name].input] * size for name, size in self._row_bytes.items()]
        gathered = max(GATHER_COPIES * max(sizes), max(sizes) + sum(sizes)) if sizes else 0
        if self._program.texts is not None:
            return (num_rows - 1) * gathered
        own = sum(items[name] * np.dtype(each.dtype).itemsize for name, each in inputs.items())
        return num_rows * (own + gathered)

    def held_bytes(self, num_rows: int, length: int) -> int:
        """Return the bytes that a batch [B, S] takes while another batch of its sweep is computed."""
        return int(HELD_FACTOR * self.backend.state_bytes(num_rows, length)) + self.input_bytes(num_rows, length)

    def sweep_bytes(self, workload: Workload, activation_bytes: int) -> int:
        """Return the bytes of a sweep if computing one of its batches takes `activation_bytes`."""
        shape = (workload.num_rows, workload.length)
        held = (workload.num_batches - 1) * self.held_bytes(*shape)
        return activation_bytes + held + self.gathering_bytes(*shape) + HEADROOM_BYTES

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

        Memory that only start-up needed is returned, and warm-up passes load what a pass needs. Activations are the
        larger of the backend's prediction and the growth in warm-up passes. A workload that cannot fit is not run: its
        plan is not feasible, and names a budget by the most that the prediction may be too small.

        Args:
            warm_up: runs a pass of [B, S] tokens without weights.
            budget_bytes: most memory without the weights of open engines.
            encoding_bytes: memory for encoding the largest input.
            most_bytes: memory up to which a workload that does not fit the budget is run nevertheless, so that the
                budget that is named is measured.
        """
        warm_up(1, SMALL_LENGTH)
        trim_memory()
        warm_up(1, SMALL_LENGTH)
        base_bytes = resident_bytes() - LEDGER.resident_bytes()
        activation_bytes = self.backend.activation_bytes(workload.num_rows, workload.length)
        fits = base_bytes + activation_bytes <= budget_bytes
        if fits or base_bytes + int(BULK_FACTOR * activation_bytes) <= most_bytes:
            for _ in range(NUM_WARM_UPS):
                warm_up(workload.num_rows, workload.length)
                grown_bytes = resident_bytes() - LEDGER.resident_bytes() - base_bytes
                activation_bytes = max(activation_bytes, grown_bytes)
        else:
            activation_bytes = int(BULK_FACTOR * activation_bytes)
        return Footprint(base_bytes, self.sweep_bytes(workload, activation_bytes) + encoding_bytes)


def resident_bytes() -> int:
    """Return the resident memory of this process, with code pages that the page cache may still add to it."""
    return read_memory().rss_bytes + refault_bytes()


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
