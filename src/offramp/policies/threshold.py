"""Policies that compare one number of the present exit with a threshold.

Entropy is divided by log C, so that a threshold means the same for two labels and for a hundred. Nothing is calibrated
here: a probability is what the head says, right or wrong.
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
    """What the three have in common."""

    threshold: float

    word: ClassVar[str]
    """What the grammar calls it."""

    def __str__(self) -> str:
        return f"{self.word}:{number_text(self.threshold)}"

    @abstractmethod
    def leaves(self, evidence: Evidence) -> np.ndarray:
        """Who is sure enough: bool [B]. Raises ValueError on evidence of a regression."""

    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """Refuse regression."""
        if problem == REGRESSION:
            remedy = "use patience:P@TAU, stage:K or none"
            raise UsageError(f"{self} needs probabilities, and a regression has none", None, remedy)

    def earliest_exit(self, num_exits: int) -> int:
        """The first one."""
        return 1

    def last_exit(self, num_exits: int) -> int:
        """The last one: a row may never be sure."""
        return num_exits

    def start(self, num_rows: int, num_exits: int) -> Decider:
        """A state without a memory."""
        return _Comparison(self)


@dataclass(frozen=True)
class Confidence(AbstractThreshold):
    """`confidence:T`, 0 < T <= 1: leave when the probability of the answer is at least T."""

    word: ClassVar[str] = "confidence"

    def __post_init__(self) -> None:
        _refuse_unless(0 < self.threshold <= 1, self, "0 < T <= 1")

    def leaves(self, evidence: Evidence) -> np.ndarray:
        """Who has a probability of at least T."""
        return _present(evidence.confidence_B) >= self.threshold


@dataclass(frozen=True)
class Margin(AbstractThreshold):
    """`margin:T`, 0 < T <= 1: leave when the answer is at least T more probable than the next one."""

    word: ClassVar[str] = "margin"

    def __post_init__(self) -> None:
        _refuse_unless(0 < self.threshold <= 1, self, "0 < T <= 1")

    def leaves(self, evidence: Evidence) -> np.ndarray:
        """Who has a margin of at least T."""
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
        """Who has an entropy of at most T."""
        return _present(evidence.entropy_B) <= self.threshold


class _Comparison(Memoryless):
    def __init__(self, policy: AbstractThreshold) -> None:
        self.policy = policy

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        return self.policy.leaves(evidence)


def _refuse_unless(in_range: bool, policy: AbstractThreshold, expected: str) -> None:
    if not in_range:
        raise ValueError(f"{policy}: expected {expected}")


def _present(score_B: Optional[np.ndarray]) -> np.ndarray:
    if score_B is None:
        raise ValueError("expected evidence of a classification, got that of a regression")
    return score_B
