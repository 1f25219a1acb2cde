"""Policy protocol: an immutable configuration, and a state object for each batch.

A policy reads only evidence: no clock, layers or weights. Exits count from 1. The engine, not the policy, makes every
remaining row leave at the last exit.

Shapes: B rows that remain, K exits, N samples, C outputs of the head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Optional, Sequence

import numpy as np

from offramp.policies.evidence import Evidence


class Decider(ABC):
    """State of a policy for one batch."""

    parts: Sequence[Decider] = ()
    """Deciders that this one consults."""

    @abstractmethod
    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        """Return the mask of rows that leave at this exit, bool [B], for the B rows that remain in the batch.

        Must be called once for each exit, in order, starting with `Policy.first_evidence`.
        """

    def keep(self, mask_B: np.ndarray) -> None:
        """Drop the rows where the mask, bool [B], is false: they have left the batch."""
        for part in self.parts:
            part.keep(mask_B)


class Policy(ABC):
    """Abstract exit policy. Concrete policies are frozen dataclasses; for rules, `parse(str(policy)) == policy`."""

    def check(self, num_exits: int, problem: Optional[str]) -> None:  # noqa: B027  # a policy may fit every model
        """Raise UsageError if the policy can never fire, or makes no sense, for this number of exits and this problem.

        `problem` is one of `PROBLEMS`, or None if unknown. The other methods assume that this check passed.
        """

    @property
    def lookback(self) -> int:
        """Number of exits before the current one that a decision depends on."""
        return 0

    def earliest_exit(self, num_exits: int) -> int:
        """Return the first exit at which a row may leave; `num_exits` if rows never leave early."""
        return 1

    def last_exit(self, num_exits: int) -> int:
        """Return the last exit that a row can reach: later layers need not be read."""
        return num_exits

    @abstractmethod
    def start(self, num_rows: int, num_exits: int) -> Decider:
        """Return a new state for a batch of `num_rows` rows."""

    def first_evidence(self, num_exits: int) -> int:
        """Return the first exit whose evidence is needed: earlier heads need not run."""
        return max(1, self.earliest_exit(num_exits) - self.lookback)


class MemorylessPolicy(Policy, Decider):
    """Abstract policy that uses only the evidence of the current exit: without state, it is its own decider."""

    def start(self, num_rows: int, num_exits: int) -> Decider:
        """Return the policy itself."""
        return self


def replay(policy: Policy, logits_KNC: np.ndarray, problem: str, lengths_N: Optional[np.ndarray] = None) -> np.ndarray:
    """Return the exit, from 1, at which each sample leaves: int64 [N]. Remaining samples leave at the last exit.

    No model runs, so one forward pass serves any number of policies. The engine chooses the same exits if it computes
    the same logits.

    Args:
        policy: the policy.
        logits_KNC: recorded logits of each exit; the last exit is the model's own head.
        problem: one of `PROBLEMS`.
        lengths_N: number of tokens of each sample, for policies that use costs.
    """
    num_exits, num_samples = logits_KNC.shape[:2]
    decider = policy.start(num_samples, num_exits)
    remaining_N, exit_N = np.arange(num_samples), np.full(num_samples, num_exits)
    for exit_index in range(policy.first_evidence(num_exits), num_exits):
        lengths_B = None if lengths_N is None else lengths_N[remaining_N]
        evidence = Evidence.from_logits(logits_KNC[exit_index - 1, remaining_N], problem, lengths_B)
        leaves_B = decider.update(exit_index, evidence)
        exit_N[remaining_N[leaves_B]] = exit_index
        decider.keep(~leaves_B)
        remaining_N = remaining_N[~leaves_B]
    return exit_N
