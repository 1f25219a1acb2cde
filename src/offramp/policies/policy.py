"""The protocol of policies: a frozen configuration, and a state object for each batch that it decides about.

A policy reads evidence and nothing else: no clock, no layer, no weights. Exits count from 1. That every row leaves at
the last exit is the loop's rule, not a policy's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Optional

import numpy as np

from offramp.policies.evidence import Evidence


class Decider(ABC):
    """What a policy remembers of one batch."""

    @abstractmethod
    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        """Who leaves at this exit: bool [B], for the B rows that are still in the batch.

        To be called once for each exit, in order, from `Policy.first_evidence` on.
        """

    @abstractmethod
    def keep(self, mask_B: np.ndarray) -> None:
        """Drop the rows where the mask, bool [B], is false: they left the batch."""


class Memoryless(Decider):
    """A decider that only looks at the present exit."""

    def keep(self, mask_B: np.ndarray) -> None:
        """Nothing to drop."""


class Policy(ABC):
    """When to leave. Concrete policies are frozen dataclasses, and `parse(str(policy)) == policy`."""

    @abstractmethod
    def __str__(self) -> str: ...

    @abstractmethod
    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """Raise UsageError if this can never fire, or makes no sense, with so many exits and this problem.

        `problem` is one of `PROBLEMS`, or None if it is not known. The other methods expect a policy that passed.
        """

    @property
    def lookback(self) -> int:
        """How many exits before the present one a decision depends on."""
        return 0

    @abstractmethod
    def earliest_exit(self, num_exits: int) -> int:
        """The first exit at which a row may leave; `num_exits` if none leaves early."""

    @abstractmethod
    def last_exit(self, num_exits: int) -> int:
        """The deepest exit that a row can reach: what comes after it need not be read."""

    @abstractmethod
    def start(self, num_rows: int, num_exits: int) -> Decider:
        """A fresh state for a batch of `num_rows` rows."""

    def first_evidence(self, num_exits: int) -> int:
        """The first exit whose evidence can matter: heads before it need not run."""
        return max(1, self.earliest_exit(num_exits) - self.lookback)


def number_text(number: float) -> str:
    """The shortest text that reads back as the same float: 0.9, 1, 1e-05."""
    text = repr(float(number))
    return text[:-2] if text.endswith(".0") else text


def exits_text(num_exits: int) -> str:
    """`1 exit`, `6 exits`."""
    return "1 exit" if num_exits == 1 else f"{num_exits} exits"
