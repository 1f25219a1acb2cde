"""Features of a row at an exit, the inputs of learned policies, computed from the evidence so far.

Shapes: B rows, F features.
"""

from __future__ import annotations

from typing import Optional

import numpy as np

from offramp.policies.evidence import REGRESSION, Evidence

FEATURES = ("one", "log_odds", "entropy", "change", "streak", "log_length")
"""Names of the features, in order.

- `one`: the constant 1.
- `log_odds`: log odds of the answer, divided by 4; in a regression, the predicted value.
- `entropy`: the normalised entropy; in a regression, the square of the value.
- `change`: difference of `log_odds` to the previous exit, 0 at the first exit; in a regression, its absolute value.
- `streak`: number of consecutive earlier exits with the same answer, divided by 4; in a regression, 0.
- `log_length`: logarithm of the number of tokens, divided by 4; 0 if the length is unknown."""
_MAX_LOG_ODDS = 16.0
"""Bound on the magnitude of negative log odds, so that a single row cannot dominate a fit."""
_MIN_ERROR_PROBABILITY = 1e-7
"""Lower bound on 1 - confidence, which keeps the log odds finite where the confidence rounds to 1."""


class FeatureMemory:
    """Computes the features of consecutive exits and stores the values of earlier exits that they depend on."""

    def __init__(self, num_rows: int) -> None:
        self._log_odds_B: Optional[np.ndarray] = None
        self._answer_BA: Optional[np.ndarray] = None
        self._streak_B = np.zeros(num_rows)

    def update(self, evidence: Evidence) -> np.ndarray:
        """Return the features [B, F] of the next exit, float64, in the order of FEATURES.

        Must be called once for each exit, starting with the first.
        """
        num_rows = evidence.num_rows
        log_odds_B = _log_odds(evidence)
        is_regression = evidence.problem == REGRESSION
        change_B = np.zeros(num_rows) if self._log_odds_B is None else log_odds_B - self._log_odds_B
        if self._answer_BA is not None and not is_regression:
            agrees_B = (evidence.answer_BA == self._answer_BA).all(axis=1)
            self._streak_B = np.where(agrees_B, self._streak_B + 1, 0)
        self._log_odds_B, self._answer_BA = log_odds_B, evidence.answer_BA
        lengths_B = np.ones(num_rows) if evidence.lengths_B is None else np.maximum(evidence.lengths_B, 1)
        features_BF = np.empty((num_rows, len(FEATURES)))
        features_BF[:, 0] = 1
        features_BF[:, 1] = log_odds_B
        features_BF[:, 2] = log_odds_B**2 if evidence.entropy_B is None else evidence.entropy_B
        features_BF[:, 3] = np.abs(change_B) if is_regression else change_B
        features_BF[:, 4] = self._streak_B / 4
        features_BF[:, 5] = np.log(lengths_B) / 4
        return features_BF

    def keep(self, mask_B: np.ndarray) -> None:
        """Drop the rows where the mask, bool [B], is false."""
        self._streak_B = self._streak_B[mask_B]
        if self._log_odds_B is not None and self._answer_BA is not None:
            self._log_odds_B, self._answer_BA = self._log_odds_B[mask_B], self._answer_BA[mask_B]


def _log_odds(evidence: Evidence) -> np.ndarray:
    if evidence.confidence_B is None:
        return evidence.answer_BA[:, 0].astype(np.float64)
    error_B = np.maximum(1 - evidence.confidence_B, _MIN_ERROR_PROBABILITY)
    log_odds_B = np.log(evidence.confidence_B) - np.log(error_B)
    return np.maximum(log_odds_B, -_MAX_LOG_ODDS) / 4
