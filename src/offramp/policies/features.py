"""What learned policies see of a row at an exit: a few numbers made of the evidence so far.

Shapes: B rows, F features.
"""

from __future__ import annotations

from typing import Optional

import numpy as np

from offramp.policies.evidence import REGRESSION, Evidence

FEATURES = ("one", "sureness", "entropy", "change", "streak", "log_length")
"""`one`: 1. `sureness`: log odds of the answer, a quarter of it; in a regression the value. `entropy`: as in Evidence;
in a regression the square of the value. `change`: of `sureness` since the exit before, 0 at the first; in a regression
its size. `streak`: exits in a row that gave this answer, a quarter of it; in a regression 0. `log_length`: of the
tokens, a quarter of it; 0 where nobody counted."""
_MOST_ODDS, _LEAST_DOUBT = 16.0, 1e-7


class FeatureMemory:
    """Makes the features of each exit in turn, and remembers what they need of the exits before."""

    def __init__(self, num_rows: int) -> None:
        self._sureness_B: Optional[np.ndarray] = None
        self._answer_BA: Optional[np.ndarray] = None
        self._streak_B = np.zeros(num_rows)

    def update(self, evidence: Evidence) -> np.ndarray:
        """Features [B, F], float64, in the order of FEATURES. To be called once for each exit, from the first on."""
        num_rows = evidence.num_rows
        sureness_B = _sureness(evidence)
        is_regression = evidence.problem == REGRESSION
        change_B = np.zeros(num_rows) if self._sureness_B is None else sureness_B - self._sureness_B
        if self._answer_BA is not None and not is_regression:
            agrees_B = (evidence.answer_BA == self._answer_BA).all(axis=1)
            self._streak_B = np.where(agrees_B, self._streak_B + 1, 0)
        self._sureness_B, self._answer_BA = sureness_B, evidence.answer_BA
        lengths_B = np.ones(num_rows) if evidence.lengths_B is None else np.maximum(evidence.lengths_B, 1)
        found_BF = np.empty((num_rows, len(FEATURES)))
        found_BF[:, 0] = 1
        found_BF[:, 1] = sureness_B
        found_BF[:, 2] = sureness_B**2 if evidence.entropy_B is None else evidence.entropy_B
        found_BF[:, 3] = np.abs(change_B) if is_regression else change_B
        found_BF[:, 4] = self._streak_B / 4
        found_BF[:, 5] = np.log(lengths_B) / 4
        return found_BF

    def keep(self, mask_B: np.ndarray) -> None:
        """Drop the rows where the mask is false."""
        self._streak_B = self._streak_B[mask_B]
        if self._sureness_B is not None and self._answer_BA is not None:
            self._sureness_B, self._answer_BA = self._sureness_B[mask_B], self._answer_BA[mask_B]


def _sureness(evidence: Evidence) -> np.ndarray:
    if evidence.confidence_B is None:
        return evidence.answer_BA[:, 0].astype(np.float64)
    odds_B = np.log(evidence.confidence_B) - np.log(np.maximum(1 - evidence.confidence_B, _LEAST_DOUBT))
    return np.maximum(odds_B, -_MOST_ODDS) / 4
