"""Patience: leave when a number of consecutive exits gave the same answer.

The rule of PABEE (Zhou et al., "BERT Loses Patience", NeurIPS 2020), with one counter per row: a row in a batch leaves
at the same exit as it would alone.

Shapes: B rows, A numbers per answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional, Union

import numpy as np

from offramp.errors import UsageError
from offramp.policies.evidence import REGRESSION, Evidence
from offramp.policies.policy import Decider, Policy, exits_text, number_text

DEFAULT_TAU = 0.1
"""Tolerance that PABEE used on STS-B, where values range from 0 to 5."""


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
            raise UsageError(f"{self} can never fire with {exits_text(num_exits)}", None, f"use {most}")
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

    def last_exit(self, num_exits: int) -> int:
        """Return the last exit: a row may never agree often enough."""
        return num_exits

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
