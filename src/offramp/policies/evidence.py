"""Evidence: the outputs of one exit for each row of a batch, as small NumPy arrays. Policies read only this.

Evidence does not include the index of the exit or whether the exit was trained, and probabilities are not calibrated.

Shapes: B rows, C outputs of the head (labels or values), A numbers per answer (1 for a single label, otherwise C).
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
