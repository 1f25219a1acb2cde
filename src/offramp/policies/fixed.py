"""Policies that ignore the evidence: full depth, or the same exit for every row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import numpy as np

from offramp.errors import UsageError
from offramp.policies.evidence import Evidence
from offramp.policies.policy import Decider, Memoryless, Policy, exits_text


@dataclass(frozen=True)
class FullDepth(Policy):
    """`none`: no row leaves early."""

    def __str__(self) -> str:
        return "none"

    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """Accept every model."""

    def earliest_exit(self, num_exits: int) -> int:
        """Return the last exit."""
        return num_exits

    def last_exit(self, num_exits: int) -> int:
        """Return the last exit."""
        return num_exits

    def start(self, num_rows: int, num_exits: int) -> Decider:
        """Return a state that lets no row leave."""
        return _LeaveFrom(num_exits + 1)


@dataclass(frozen=True)
class StopAt(Policy):
    """`stage:K`: every row leaves at exit K. In a combination with `&`, the condition holds from K on."""

    exit_index: int

    def __post_init__(self) -> None:
        refuse_no_exit(self, self.exit_index)

    def __str__(self) -> str:
        return f"stage:{self.exit_index}"

    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """Raise UsageError if the model has no exit K."""
        refuse_missing_exit(self, self.exit_index, num_exits)

    def earliest_exit(self, num_exits: int) -> int:
        """Return K."""
        return self.exit_index

    def last_exit(self, num_exits: int) -> int:
        """Return K."""
        return self.exit_index

    def start(self, num_rows: int, num_exits: int) -> Decider:
        """Return a state that lets every row leave at exit K."""
        return _LeaveFrom(self.exit_index)


class _LeaveFrom(Memoryless):
    def __init__(self, exit_index: int) -> None:
        self.exit_index = exit_index

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        return np.full(evidence.num_rows, exit_index >= self.exit_index)


def refuse_no_exit(policy: Policy, exit_index: int) -> None:
    """Raise ValueError unless `exit_index` is an integer >= 1."""
    if not isinstance(exit_index, int) or exit_index < 1:
        raise ValueError(f"{policy}: K must be an integer >= 1 (exits count from 1), got {exit_index!r}")


def refuse_missing_exit(policy: Policy, exit_index: int, num_exits: int) -> None:
    """Raise UsageError if the model has fewer than `exit_index` exits."""
    if exit_index > num_exits:
        raise UsageError(f"{policy} can never fire with {exits_text(num_exits)}", None, f"use at most {num_exits}")
