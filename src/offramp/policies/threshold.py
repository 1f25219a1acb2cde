"""Policies that compare one score of the current exit with a threshold.

Entropy is divided by log C, so that a threshold has the same meaning for any number of labels. Probabilities are those
of the head; they are not calibrated.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Optional

import numpy as np

from offramp.errors import UsageError
from offramp.policies.evidence import REGRESSION, Evidence
from offramp.policies.policy import Decider, Memoryless, Policy, number_text


@dataclass(frozen=True)
class AbstractThreshold(Policy):
    """Common base of the threshold policies."""

    threshold: float
    """Threshold T; its range depends on the score."""

    word: ClassVar[str]
    """Name of the rule in the grammar."""

    def __str__(self) -> str:
        return f"{self.word}:{number_text(self.threshold)}"

    @abstractmethod
    def leaves(self, evidence: Evidence) -> np.ndarray:
        """Return the mask of rows that leave, bool [B]. Raises ValueError for evidence of a regression."""

    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """Raise UsageError for a regression."""
        if problem == REGRESSION:
            remedy = "use patience:P@TAU, stage:K or none"
            raise UsageError(f"{self} needs probabilities, which a regression does not have", None, remedy)

    def earliest_exit(self, num_exits: int) -> int:
        """Return the first exit."""
        return 1

    def last_exit(self, num_exits: int) -> int:
        """Return the last exit: a row may never reach the threshold."""
        return num_exits

    def start(self, num_rows: int, num_exits: int) -> Decider:
        """Return a stateless decider."""
        return _Comparison(self)


@dataclass(frozen=True)
class Confidence(AbstractThreshold):
    """`confidence:T`, 0 < T <= 1: leave when the probability of the answer is at least T."""

    word: ClassVar[str] = "confidence"

    def __post_init__(self) -> None:
        _refuse_unless(0 < self.threshold <= 1, self, "0 < T <= 1")

    def leaves(self, evidence: Evidence) -> np.ndarray:
        """Return the mask of rows whose answer has a probability of at least T."""
        return _present(evidence.confidence_B) >= self.threshold


@dataclass(frozen=True)
class Margin(AbstractThreshold):
    """`margin:T`, 0 < T <= 1: leave when the probability of the answer exceeds that of the runner-up by at least T."""

    word: ClassVar[str] = "margin"

    def __post_init__(self) -> None:
        _refuse_unless(0 < self.threshold <= 1, self, "0 < T <= 1")

    def leaves(self, evidence: Evidence) -> np.ndarray:
        """Return the mask of rows with a margin of at least T."""
        return _present(evidence.margin_B) >= self.threshold


@dataclass(frozen=True)
class Entropy(AbstractThreshold):
    """`entropy:T`, 0 <= T < 1: leave when the entropy, divided by log C, is at most T.

    The rule of DeeBERT (Xin et al., ACL 2020), normalised as in FastBERT (Liu et al., ACL 2020).
    """

    word: ClassVar[str] = "entropy"

    def __post_init__(self) -> None:
        _refuse_unless(0 <= self.threshold < 1, self, "0 <= T < 1")

    def leaves(self, evidence: Evidence) -> np.ndarray:
        """Return the mask of rows with an entropy of at most T."""
        return _present(evidence.entropy_B) <= self.threshold


class _Comparison(Memoryless):
    def __init__(self, policy: AbstractThreshold) -> None:
        self.policy = policy

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        return self.policy.leaves(evidence)


def _refuse_unless(in_range: bool, policy: AbstractThreshold, expected: str) -> None:
    if not in_range:
        raise ValueError(f"{policy}: threshold out of range, expected {expected}")


def _present(score_B: Optional[np.ndarray]) -> np.ndarray:
    if score_B is None:
        raise ValueError("evidence must be of a classification, got a regression")
    return score_B
