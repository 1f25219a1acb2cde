"""Votes: leave when enough exits so far, consecutive or not, gave the answer of the current exit.

An unweighted ensemble of exits, as in BEEM (Bajpai and Hanawal, ICLR 2025) with equal weights.

Shapes: B rows, A numbers per answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional

import numpy as np

from offramp.errors import UsageError
from offramp.policies.evidence import REGRESSION, Evidence
from offramp.policies.policy import Decider, Policy, exits_text

_UNBOUNDED = 1 << 30
"""Lookback that exceeds the number of exits of any model."""


@dataclass(frozen=True)
class Votes(Policy):
    """`votes:V`: leave when V exits, including the current one, gave the current answer, so at exit V or later."""

    votes: int
    """Number of equal answers, V >= 2."""

    def __post_init__(self) -> None:
        if not isinstance(self.votes, int) or self.votes < 2:
            raise ValueError(f"{self}: V must be an integer >= 2")

    def __str__(self) -> str:
        return f"votes:{self.votes}"

    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """Raise UsageError if V exceeds the number of exits, or for a regression."""
        if self.votes > num_exits:
            remedy = f"use at most {num_exits}" if num_exits > 1 else "use none"
            raise UsageError(f"{self} can never fire with {exits_text(num_exits)}", None, remedy)
        if problem == REGRESSION:
            raise UsageError(f"{self} needs labels, which a regression does not have", None, "use patience:P@TAU")

    @property
    def lookback(self) -> int:
        """All earlier exits."""
        return _UNBOUNDED

    def earliest_exit(self, num_exits: int) -> int:
        """Return V: each exit has one vote."""
        return self.votes

    def last_exit(self, num_exits: int) -> int:
        """Return the last exit: a row may never collect V votes."""
        return num_exits

    def start(self, num_rows: int, num_exits: int) -> Decider:
        """Return a decider without votes."""
        return _Votes(self.votes)


class _Votes(Decider):
    def __init__(self, votes: int) -> None:
        self.votes = votes
        self.before: List[np.ndarray] = []

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        if evidence.problem == REGRESSION:
            raise ValueError("evidence must be of a classification, got a regression")
        count_B = np.ones(evidence.num_rows, np.int64)
        for answer_BA in self.before:
            count_B += np.all(answer_BA == evidence.answer_BA, axis=1)
        self.before.append(evidence.answer_BA)
        return count_B >= self.votes

    def keep(self, mask_B: np.ndarray) -> None:
        self.before = [answer_BA[mask_B] for answer_BA in self.before]
