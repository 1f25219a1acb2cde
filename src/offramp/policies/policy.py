"""Policy protocol: an immutable configuration, and a state object for each batch.

A policy reads only evidence: no clock, layers or weights. Exits count from 1. The engine, not the policy, makes every
remaining row leave at the last exit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Optional

import numpy as np

from offramp.policies.evidence import Evidence


class Decider(ABC):
    """State of a policy for one batch."""

    @abstractmethod
    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        """Return the mask of rows that leave at this exit, bool [B], for the B rows that remain in the batch.

        Must be called once for each exit, in order, starting with `Policy.first_evidence`.
        """

    @abstractmethod
    def keep(self, mask_B: np.ndarray) -> None:
        """Drop the rows where the mask, bool [B], is false: they have left the batch."""


class Memoryless(Decider):
    """A decider that uses only the current exit."""

    def keep(self, mask_B: np.ndarray) -> None:
        """Do nothing: no state depends on rows."""


class Policy(ABC):
    """Abstract exit policy. Concrete policies are frozen dataclasses; for rules, `parse(str(policy)) == policy`."""

    @abstractmethod
    def __str__(self) -> str: ...

    @abstractmethod
    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """Raise UsageError if the policy can never fire, or makes no sense, for this number of exits and this problem.

        `problem` is one of `PROBLEMS`, or None if unknown. The other methods assume that this check passed.
        """

    @property
    def lookback(self) -> int:
        """Number of exits before the current one that a decision depends on."""
        return 0

    @abstractmethod
    def earliest_exit(self, num_exits: int) -> int:
        """Return the first exit at which a row may leave; `num_exits` if rows never leave early."""

    @abstractmethod
    def last_exit(self, num_exits: int) -> int:
        """Return the last exit that a row can reach: later layers need not be read."""

    @abstractmethod
    def start(self, num_rows: int, num_exits: int) -> Decider:
        """Return a new state for a batch of `num_rows` rows."""

    def first_evidence(self, num_exits: int) -> int:
        """Return the first exit whose evidence is needed: earlier heads need not run."""
        return max(1, self.earliest_exit(num_exits) - self.lookback)


def number_text(number: float) -> str:
    """Return the shortest text that parses to the same float: 0.9, 1, 1e-05."""
    text = repr(float(number))
    return text[:-2] if text.endswith(".0") else text


def exits_text(num_exits: int) -> str:
    """Return `1 exit`, `6 exits`, and so on."""
    return "1 exit" if num_exits == 1 else f"{num_exits} exits"
