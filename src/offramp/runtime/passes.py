"""One pass: its rows, which of them are still there, what they pay, and what became of them. It reads no clock.

A row that has left may still lie in the backend's arrays, where it is carried on and not looked at.

Shapes: B rows that are still there, P rows of the backend's arrays, C labels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import List, Optional

import numpy as np

from offramp.policies import Decider


@dataclass
class Outcome:
    """What became of one row."""

    logits_C: Optional[np.ndarray] = None
    exit_stage: int = 0
    bytes_read: int = 0
    is_cut: bool = False
    """The deadline let it leave, not the policy."""


@dataclass(frozen=True)
class PassCost:
    """Seconds of one pass. What was read for it counts also where that was done before it began.

    `fill_seconds`: what nothing could hide, gathering the rows and waiting for the first shard.
    """

    seconds: float
    compute_seconds: float
    read_seconds: float
    fill_seconds: float


@dataclass
class Answer:
    """What the last exit said of the rows that are still there, and when."""

    exit_stage: int
    logits_BC: np.ndarray
    seconds: float
    """Of `time.perf_counter`."""
    compute_seconds: float
    """Of the pass until then."""


@dataclass
class Pass:
    """The pass under way: `rows_B` are the places in the batch of the rows that are still there."""

    outcomes: List[Outcome]
    rows_B: np.ndarray
    lengths_B: np.ndarray
    decider: Decider
    began: float
    length: int
    """Tokens of the longest row, which all are padded to."""
    answer: Optional[Answer] = None
    compute_seconds: float = 0.0
    read_seconds: float = 0.0
    fill_seconds: float = 0.0
    has_filled: bool = False
    """The first shard that had to be read is there."""
    places_B: np.ndarray = field(init=False)
    """Of the same rows in the backend's arrays, in order."""

    def __post_init__(self) -> None:
        self.places_B = self.rows_B

    def stay_P(self, num_places: int) -> np.ndarray:
        """Which rows of the backend's arrays are those that are still there, bool."""
        stay_P = np.zeros(num_places, bool)
        stay_P[self.places_B] = True
        return stay_P

    def gathered(self) -> None:
        """The backend's arrays hold the rows that are still there and no others."""
        self.places_B = np.arange(len(self.rows_B))

    def charge(self, num_bytes: int) -> None:
        """Share the bytes of a read equally among the rows that are still there; the first rows take the remainder."""
        share, rest = divmod(num_bytes, len(self.rows_B))
        for place, row in enumerate(self.rows_B.tolist()):
            self.outcomes[row].bytes_read += share + (place < rest)

    def time_read(self, seconds: float, waited_seconds: float) -> None:
        """A shard was read in so many seconds, of which the loop waited some; 0: it was there already."""
        self.read_seconds += seconds
        if seconds and not self.has_filled:
            self.fill_seconds += min(seconds, waited_seconds)
            self.has_filled = True

    def leave(self, logits_BC: np.ndarray, leave_B: np.ndarray, exit_stage: int) -> None:
        """Let rows go with what an exit says of them; the policy forgets them."""
        for row, logits_C in zip(self.rows_B[leave_B].tolist(), logits_BC[leave_B]):
            self.outcomes[row].logits_C = logits_C.copy()
            self.outcomes[row].exit_stage = exit_stage
        self.rows_B, self.lengths_B, self.places_B = (
            each_B[~leave_B] for each_B in (self.rows_B, self.lengths_B, self.places_B)
        )
        self.decider.keep(~leave_B)

    def cut(self) -> None:
        """Let all that are still there go with the last answer there is."""
        assert self.answer is not None
        for row in self.rows_B.tolist():
            self.outcomes[row].is_cut = True
        self.leave(self.answer.logits_BC, np.ones(len(self.rows_B), bool), self.answer.exit_stage)
