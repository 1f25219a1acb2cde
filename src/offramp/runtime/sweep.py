"""One request: its batches, the rows that remain in each, what they cost, and their answers.

A row that has exited may still lie in the backend's arrays, where it is computed and ignored.

Shapes: B remaining rows, P rows of the backend's arrays, C labels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Callable, List, NamedTuple, Optional

import numpy as np

from offramp.measure import Span, Trace
from offramp.policies import Decider
from offramp.program.inputs import Batch
from offramp.runtime.backend import State
from offramp.runtime.ring import Loaded


@dataclass
class Outcome:
    """The answer of one row and what it cost."""

    logits_C: Optional[np.ndarray] = None
    exit_stage: int = 0
    bytes_read: int = 0
    is_cut: bool = False
    """The deadline ended the row, not the policy."""


class PassCost(NamedTuple):
    """Seconds of one sweep. Reads count even if they ended before it began."""

    seconds: float
    compute_seconds: float
    read_seconds: float
    fill_seconds: float
    """Reading that cannot overlap with computing: gathering rows, and waiting for the first shard."""


class Answer(NamedTuple):
    """Logits of the remaining rows at the last exit that was evaluated."""

    exit_stage: int
    logits_BC: np.ndarray
    seconds: float
    """Time of `time.perf_counter`."""
    compute_seconds: float
    """Compute time of the batch until then."""


class BatchRun:
    """One batch of a sweep. `rows_B` are the places in the batch of the rows that remain.

    `began` is the start of the request, a time of `time.perf_counter`.
    """

    def __init__(self, batch: Batch, decider: Decider, began: float, trace: Trace, pass_index: int) -> None:
        self.batch, self.decider, self.began, self.trace, self.pass_index = batch, decider, began, trace, pass_index
        self.length = batch.length
        """Tokens that all rows are padded to, S."""
        self.state: Optional[State] = None
        """None until the inputs of the batch have been read."""
        self.answer = Answer(0, np.empty(0), began, 0.0)
        """The last one; that of exit 0 is none, given when the request began."""
        self.compute_seconds = self.layer_seconds = 0.0
        """Compute time of the batch, and that of its current layer, the exit excluded."""
        self.outcomes = [Outcome() for _ in range(batch.num_rows)]
        self.rows_B = self.places_B = np.arange(batch.num_rows)
        """Rows that remain, in order: their places in the batch, and in the backend's arrays."""
        self.lengths_B = batch.lengths_B

    def timed(self, name: str, stage: int, kind: str, act: Callable[..., Any], *arguments: Any) -> Any:
        """Return `act(*arguments)`; record the call in the trace and count it as compute time."""
        started = time.perf_counter()
        result = act(*arguments)
        ended = time.perf_counter()
        self.trace.add(Span(name, stage, kind, started, ended, 0, "loop", self.pass_index))
        self.compute_seconds += ended - started
        return result

    def charge(self, num_bytes: int) -> None:
        """Share the bytes of a read equally among the remaining rows; the first rows take the remainder."""
        share, rest = divmod(num_bytes, len(self.rows_B))
        for place, row in enumerate(self.rows_B.tolist()):
            self.outcomes[row].bytes_read += share + (place < rest)

    def leave(self, logits_BC: np.ndarray, leave_B: np.ndarray, exit_stage: int) -> None:
        """End rows with their logits at an exit; the policy forgets them."""
        for row, logits_C in zip(self.rows_B[leave_B].tolist(), logits_BC[leave_B]):
            self.outcomes[row].logits_C = logits_C.copy()
            self.outcomes[row].exit_stage = exit_stage
        self.rows_B, self.lengths_B, self.places_B = (
            each_B[~leave_B] for each_B in (self.rows_B, self.lengths_B, self.places_B)
        )
        self.decider.keep(~leave_B)

    def cut(self) -> None:
        """End all remaining rows with the answer of the last exit that was evaluated."""
        assert self.answer.exit_stage, "an exit was evaluated"
        for row in self.rows_B.tolist():
            self.outcomes[row].is_cut = True
        self.leave(self.answer.logits_BC, np.ones(len(self.rows_B), bool), self.answer.exit_stage)


@dataclass
class Sweep:
    """The batches that share one sweep over the weights."""

    runs: List[BatchRun]
    read_seconds: float = 0.0
    fill_seconds: float = 0.0
    has_filled: bool = False
    """The first shard that had to be read is in memory."""

    @property
    def live(self) -> List[BatchRun]:
        """Batches some of whose rows remain."""
        return [run for run in self.runs if len(run.rows_B)]

    @property
    def num_rows(self) -> int:
        """Rows of all batches."""
        return sum(run.batch.num_rows for run in self.runs)

    @property
    def outcomes(self) -> List[Outcome]:
        """One outcome a row, batch after batch."""
        return [outcome for run in self.runs for outcome in run.outcomes]

    def charge(self, loaded: Loaded) -> None:
        """Share the bytes of a shard equally among all remaining rows, and count the seconds of its read."""
        self.read_seconds += loaded.read_seconds
        if loaded.read_seconds and not self.has_filled:
            self.fill_seconds += min(loaded.read_seconds, loaded.waited_seconds)
            self.has_filled = True
        num_bytes, num_rows = loaded.num_bytes, sum(len(run.rows_B) for run in self.live)
        for run in self.live:
            share = num_bytes * len(run.rows_B) // num_rows
            run.charge(share)
            num_bytes, num_rows = num_bytes - share, num_rows - len(run.rows_B)
