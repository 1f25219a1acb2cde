"""Votes: leave when enough of the exits so far gave the answer that this one gives, in a row or not.

A plain ensemble of exits, as in BEEM (Bajpai and Hanawal, ICLR 2025), every exit with one vote.

Shapes: B rows, A numbers that make up an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional

import numpy as np

from offramp.errors import UsageError
from offramp.policies.evidence import REGRESSION, Evidence
from offramp.policies.policy import Decider, Policy, exits_text

_ALL_BEFORE = 1 << 30


@dataclass(frozen=True)
class Votes(Policy):
    """`votes:V`: leave when V exits, this one included, gave the answer of this one, so at exit V or later."""

    votes: int

    def __post_init__(self) -> None:
        if not isinstance(self.votes, int) or self.votes < 2:
            raise ValueError(f"{self}: expected an integer V >= 2")

    def __str__(self) -> str:
        return f"votes:{self.votes}"

    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """Refuse more votes than there are exits, and a regression."""
        if self.votes > num_exits:
            remedy = f"use at most {num_exits}" if num_exits > 1 else "use none"
            raise UsageError(f"{self} can never fire with {exits_text(num_exits)}", None, remedy)
        if problem == REGRESSION:
            raise UsageError(f"{self} needs labels, and a regression has none", None, "use patience:P@TAU")

    @property
    def lookback(self) -> int:
        """All exits before."""
        return _ALL_BEFORE

    def earliest_exit(self, num_exits: int) -> int:
        """V: every exit has one vote."""
        return self.votes

    def last_exit(self, num_exits: int) -> int:
        """The last one: a row may never have as many."""
        return num_exits

    def start(self, num_rows: int, num_exits: int) -> Decider:
        """No votes yet."""
        return _Votes(self.votes)


class _Votes(Decider):
    def __init__(self, votes: int) -> None:
        self.votes = votes
        self.before: List[np.ndarray] = []

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        if evidence.problem == REGRESSION:
            raise ValueError("expected evidence of a classification, got that of a regression")
        count_B = np.ones(evidence.num_rows, np.int64)
        for answer_BA in self.before:
            count_B += np.all(answer_BA == evidence.answer_BA, axis=1)
        self.before.append(evidence.answer_BA)
        return count_B >= self.votes

    def keep(self, mask_B: np.ndarray) -> None:
        self.before = [answer_BA[mask_B] for answer_BA in self.before]
