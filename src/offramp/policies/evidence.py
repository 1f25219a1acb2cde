"""Evidence: the outputs of one exit for each row of a batch, as small NumPy arrays. Policies read only this.

Learned policies read features, which are computed from the evidence of consecutive exits.

Evidence does not include the index of the exit or whether the exit was trained, and probabilities are not calibrated.

Shapes: B rows, F features, C outputs of the head (labels or values), A numbers per answer (1 for a single label,
otherwise C).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional, Tuple

import numpy as np

SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
PROBLEMS = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)
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


@dataclass(frozen=True, eq=False)
class Evidence:
    """Answer of one exit for each row, with the scores that policies compare.

    A multi-label answer is right only if every label is right, so its confidence, entropy and margin are those of the
    least confident label. A regression has only an answer.
    """

    problem: str
    """One of `PROBLEMS`."""
    answer_BA: np.ndarray
    """Answer of each row. Single label: int64 [B, 1], the index of the largest logit (the first on ties). Multi label:
    bool [B, C], logit > 0. Regression: float32 [B, C], the outputs themselves."""
    confidence_B: Optional[np.ndarray]
    """Probability of the answer, float64 in (0, 1]. Single label: softmax p; multi label: sigmoid p, or 1 - p."""
    entropy_B: Optional[np.ndarray]
    """Entropy divided by its maximum, log C (multi label: log 2), float64 in [0, 1]; 0 with a single class."""
    margin_B: Optional[np.ndarray]
    """Probability of the answer minus that of the runner-up, float64 in [0, 1]; 1 with a single class."""
    lengths_B: Optional[np.ndarray] = None
    """Number of tokens of each row without padding, int64; None if lengths are unknown. Determines the cost of later
    exits."""

    @classmethod
    def from_logits(cls, logits_BC: np.ndarray, problem: str, lengths_B: Optional[np.ndarray] = None) -> Evidence:
        """Compute evidence from the outputs of a head, [B, C] of any float type, C >= 1. Computes in float64.

        Raises ValueError for another shape, an unknown problem, or logits that are not finite.
        """
        if problem not in PROBLEMS:
            raise ValueError(f"problem must be one of {', '.join(PROBLEMS)}, got {problem!r}")
        logits_BC = np.array(logits_BC, dtype=np.float64)
        if logits_BC.ndim != 2 or logits_BC.shape[1] == 0:
            raise ValueError(f"logits must have shape [B, C] with C >= 1, got {list(logits_BC.shape)}")
        if not np.isfinite(logits_BC).all():
            raise ValueError("logits must be finite, got NaN or infinity")
        if problem == REGRESSION:
            return cls(problem, logits_BC.astype(np.float32), None, None, None, lengths_B)
        if problem == MULTI_LABEL:
            return cls(problem, logits_BC > 0, *_least_confident_label(logits_BC), lengths_B)
        return cls(problem, logits_BC.argmax(axis=1)[:, np.newaxis], *_softmax_scores(logits_BC), lengths_B)

    def score(self, name: str) -> np.ndarray:
        """Return `confidence`, `entropy` or `margin`. Raises ValueError for a regression, which has none."""
        score_B = getattr(self, f"{name}_B")
        if score_B is None:
            raise ValueError("evidence must be of a classification, got a regression")
        return score_B

    @property
    def num_rows(self) -> int:
        """Number of rows that remain in the batch."""
        return len(self.answer_BA)


def _softmax_scores(logits_BC: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return confidence, normalised entropy and margin, each [B].

    Log-softmax stays finite where a probability underflows, so 0 * log 0 cannot occur.
    """
    num_rows, num_classes = logits_BC.shape
    if num_classes == 1:
        return np.ones(num_rows), np.zeros(num_rows), np.ones(num_rows)
    shifted_BC = logits_BC - logits_BC.max(axis=1, keepdims=True)
    log_probability_BC = shifted_BC - np.log(np.exp(shifted_BC).sum(axis=1, keepdims=True))
    probability_BC = np.exp(log_probability_BC)
    entropy_B = -(probability_BC * log_probability_BC).sum(axis=1) / math.log(num_classes)
    second_B, first_B = np.partition(probability_BC, num_classes - 2, axis=1)[:, -2:].T
    # Rounding can make the entropy slightly larger than 1.
    return first_B, np.minimum(entropy_B, 1.0), first_B - second_B


def _least_confident_label(logits_BC: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return confidence, normalised entropy and margin of the label whose logit is nearest to 0, each [B].

    Each score is monotone in the absolute value of the logit.
    """
    size_B = np.abs(logits_BC).min(axis=1)
    odds_against_B = np.exp(-size_B)
    entropy_B = np.log1p(odds_against_B) + size_B * odds_against_B / (1 + odds_against_B)
    return 1 / (1 + odds_against_B), np.minimum(entropy_B / math.log(2), 1.0), np.tanh(size_B / 2)


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
