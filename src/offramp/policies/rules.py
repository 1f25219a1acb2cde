"""The rules of the grammar: full depth, one exit for every row, thresholds on a score, patience and votes.

Thresholds compare one score of the current exit. Entropy is divided by log C, so that a threshold has the same meaning
for any number of labels. Probabilities are those of the head; they are not calibrated.

Patience is the rule of PABEE (Zhou et al., "BERT Loses Patience", NeurIPS 2020), with one counter per row: a row in a
batch leaves at the same exit as it would alone. Votes are an unweighted ensemble of exits, as in BEEM (Bajpai and
Hanawal, ICLR 2025) with equal weights.

Shapes: B rows, A numbers per answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, List, Optional, Union

import numpy as np

from offramp.errors import UsageError
from offramp.policies.evidence import REGRESSION, Evidence
from offramp.policies.policy import Decider, MemorylessPolicy, Policy

DEFAULT_TAU = 0.1
"""Tolerance that PABEE used on STS-B, where values range from 0 to 5."""
_UNBOUNDED = 1 << 30
"""Lookback that exceeds the number of exits of any model."""


@dataclass(frozen=True)
class FullDepth(MemorylessPolicy):
    """`none`: no row leaves early."""

    def __str__(self) -> str:
        return "none"

    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """Accept every model."""

    def earliest_exit(self, num_exits: int) -> int:
        """Return the last exit."""
        return num_exits

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        """Return a mask that lets no row leave."""
        return np.zeros(evidence.num_rows, bool)


@dataclass(frozen=True)
class StopAt(MemorylessPolicy):
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

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        """Return a mask that lets every row leave, from exit K on."""
        return np.full(evidence.num_rows, exit_index >= self.exit_index)


@dataclass(frozen=True)
class AbstractThreshold(MemorylessPolicy):
    """Common base of the threshold policies, 0 < T <= 1: leave when a score is at least T."""

    threshold: float
    """Threshold T."""

    word: ClassVar[str]
    """Name of the rule in the grammar, and of the score in the evidence."""

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"{self}: threshold out of range, expected 0 < T <= 1")

    def __str__(self) -> str:
        return f"{self.word}:{number_text(self.threshold)}"

    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """Raise UsageError for a regression."""
        refuse_regression(self, problem, "probabilities", "use patience:P@TAU, stage:K or none")

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        """Return the mask of rows whose score is at least T. Raises ValueError for evidence of a regression."""
        return evidence.score(self.word) >= self.threshold


@dataclass(frozen=True)
class Confidence(AbstractThreshold):
    """`confidence:T`, 0 < T <= 1: leave when the probability of the answer is at least T."""

    word: ClassVar[str] = "confidence"


@dataclass(frozen=True)
class Margin(AbstractThreshold):
    """`margin:T`, 0 < T <= 1: leave when the probability of the answer exceeds that of the runner-up by at least T."""

    word: ClassVar[str] = "margin"


@dataclass(frozen=True)
class Entropy(AbstractThreshold):
    """`entropy:T`, 0 <= T < 1: leave when the entropy, divided by log C, is at most T.

    The rule of DeeBERT (Xin et al., ACL 2020), normalised as in FastBERT (Liu et al., ACL 2020).
    """

    word: ClassVar[str] = "entropy"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"{self}: threshold out of range, expected 0 <= T < 1")

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        """Return the mask of rows with an entropy of at most T. Raises ValueError for evidence of a regression."""
        return evidence.score(self.word) <= self.threshold


@dataclass(frozen=True)
class Patience(Policy):
    """`patience:P[@TAU]`: leave after P consecutive agreements between neighbouring exits, so at exit P + 1 or later.

    Two answers agree if they are the same label, the same set of labels, or, in a regression, differ by less than
    `tau`.
    """

    patience: Union[int, float]
    """Number of agreements, an integer >= 1, or `math.inf` for the full model."""
    tau: Optional[float] = None
    """Tolerance in the unit of the predicted value; None: `DEFAULT_TAU`. Regression only."""

    def __post_init__(self) -> None:
        if self.patience == 0:
            raise ValueError("patience:0 is not a policy: use stage:1 for the first exit, or none for the full model")
        if self.patience != math.inf and not (isinstance(self.patience, int) and self.patience > 0):
            raise ValueError(f"{self}: P must be an integer >= 1, or inf")
        if self.tau is not None and not 0 < self.tau < math.inf:
            raise ValueError(f"{self}: TAU must be finite and > 0")

    def __str__(self) -> str:
        text = f"patience:{self.patience}"
        return text if self.tau is None else f"{text}@{number_text(self.tau)}"

    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """Raise UsageError if `num_exits` exits cannot reach a finite P, or if TAU is given for a classification."""
        if num_exits <= self.patience < math.inf:
            most = f"at most {num_exits - 1}, or patience:inf" if num_exits > 1 else "patience:inf"
            raise never_fires(self, num_exits, f"use {most}")
        if self.tau is not None and problem not in (REGRESSION, None):
            remedy = f"use patience:{self.patience}"
            raise UsageError(f"{self}: @TAU applies to regression only", f"the model does {problem}", remedy)

    @property
    def lookback(self) -> int:
        """P agreements involve P earlier exits."""
        return 0 if self.patience == math.inf else int(self.patience)

    def earliest_exit(self, num_exits: int) -> int:
        """Return P + 1: the first exit has no earlier exit to agree with."""
        return num_exits if self.patience == math.inf else int(self.patience) + 1

    def start(self, num_rows: int, num_exits: int) -> Decider:
        """Return a decider with a counter of 0 for each row."""
        return _Streaks(self.patience, DEFAULT_TAU if self.tau is None else self.tau, num_rows)


class _Streaks(Decider):
    """Number of consecutive agreements and last answer of each row."""

    def __init__(self, patience: float, tau: float, num_rows: int) -> None:
        self.patience, self.tau = patience, tau
        self.streak_B = np.zeros(num_rows, dtype=np.int64)
        self.answer_BA: Optional[np.ndarray] = None

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        if evidence.num_rows != len(self.streak_B):
            raise ValueError(f"evidence must have {len(self.streak_B)} rows, got {evidence.num_rows}")
        if self.answer_BA is not None:
            self.streak_B = np.where(self._agrees(self.answer_BA, evidence), self.streak_B + 1, 0)
        self.answer_BA = evidence.answer_BA
        return self.streak_B >= self.patience

    def keep(self, mask_B: np.ndarray) -> None:
        self.streak_B = self.streak_B[mask_B]
        self.answer_BA = None if self.answer_BA is None else self.answer_BA[mask_B]

    def _agrees(self, previous_BA: np.ndarray, evidence: Evidence) -> np.ndarray:
        if evidence.problem != REGRESSION:
            return np.all(evidence.answer_BA == previous_BA, axis=1)
        return np.all(np.abs(evidence.answer_BA.astype(np.float64) - previous_BA) < self.tau, axis=1)


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
            raise never_fires(self, num_exits, f"use at most {num_exits}" if num_exits > 1 else "use none")
        refuse_regression(self, problem, "labels", "use patience:P@TAU")

    @property
    def lookback(self) -> int:
        """All earlier exits."""
        return _UNBOUNDED

    def earliest_exit(self, num_exits: int) -> int:
        """Return V: each exit has one vote."""
        return self.votes

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


def refuse_no_exit(policy: Policy, exit_index: int) -> None:
    """Raise ValueError unless `exit_index` is an integer >= 1."""
    if type(exit_index) is not int or exit_index < 1:
        raise ValueError(f"{policy}: K must be an integer >= 1 (exits count from 1), got {exit_index!r}")


def refuse_missing_exit(policy: Policy, exit_index: int, num_exits: int) -> None:
    """Raise UsageError if the model has fewer than `exit_index` exits."""
    if exit_index > num_exits:
        raise never_fires(policy, num_exits, f"use at most {num_exits}")


def refuse_regression(policy: Policy, problem: Optional[str], needs: str, remedy: str) -> None:
    """Raise UsageError if the problem is a regression."""
    if problem == REGRESSION:
        raise UsageError(f"{policy} needs {needs}, which a regression does not have", None, remedy)


def never_fires(policy: Policy, num_exits: int, remedy: str) -> UsageError:
    """Return the error for a policy that needs more than `num_exits` exits."""
    return UsageError(f"{policy} can never fire with {num_exits} exit{'s' * (num_exits != 1)}", None, remedy)


def number_text(number: float) -> str:
    """Return the shortest text that parses to the same float: 0.9, 1, 1e-05."""
    text = repr(float(number))
    return text[:-2] if text.endswith(".0") else text
