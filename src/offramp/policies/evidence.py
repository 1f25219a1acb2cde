"""Evidence: what an exit says of each row of a batch, as small NumPy arrays. Policies read only this.

It does not know which exit spoke, nor whether the exit was trained, and it does not calibrate anything.

Shapes: B rows, C outputs of the head (labels or values), A numbers that make up an answer (single label: 1, else C).
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
    """What one exit says of each row.

    A multi-label answer is right only if every label is: its confidence, entropy and margin are those of the least sure
    label. Regression has an answer and nothing else.
    """

    problem: str
    """One of `PROBLEMS`."""
    answer_BA: np.ndarray
    """Single label: int64 [B, 1], the largest logit (the first of equals). Multi label: bool [B, C], logit > 0.
    Regression: float32 [B, C], the logits themselves."""
    confidence_B: Optional[np.ndarray]
    """float64 in (0, 1]: the probability of the answer. Single label: softmax p; multi label: sigmoid p, or 1 - p."""
    entropy_B: Optional[np.ndarray]
    """float64 in [0, 1]: entropy by its largest value, log C (multi label: log 2); 0 where there is one class."""
    margin_B: Optional[np.ndarray]
    """float64 in [0, 1]: the probability of the answer less that of the next one; 1 where there is one class."""
    lengths_B: Optional[np.ndarray] = None
    """int64: tokens of each row without padding, which tell what going on would cost; None if nobody counted."""

    @classmethod
    def from_logits(cls, logits_BC: np.ndarray, problem: str, lengths_B: Optional[np.ndarray] = None) -> Evidence:
        """Read the outputs of a head: [B, C] of any float type, C >= 1. Computed in float64.

        Raises ValueError for another shape, an unknown problem, or logits that are not finite.
        """
        if problem not in PROBLEMS:
            raise ValueError(f"expected a problem out of {', '.join(PROBLEMS)}, got {problem!r}")
        logits_BC = np.array(logits_BC, dtype=np.float64)
        if logits_BC.ndim != 2 or logits_BC.shape[1] == 0:
            raise ValueError(f"expected logits of shape [B, C] with C >= 1, got {list(logits_BC.shape)}")
        if not np.isfinite(logits_BC).all():
            raise ValueError("expected finite logits, got NaN or infinity")
        if problem == REGRESSION:
            return cls(problem, logits_BC.astype(np.float32), None, None, None, lengths_B)
        if problem == MULTI_LABEL:
            return cls(problem, logits_BC > 0, *_least_sure_label(logits_BC), lengths_B)
        return cls(problem, logits_BC.argmax(axis=1)[:, np.newaxis], *_softmax_scores(logits_BC), lengths_B)

    @property
    def num_rows(self) -> int:
        """Rows that are still in the batch."""
        return len(self.answer_BA)


def _softmax_scores(logits_BC: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence, normalised entropy, margin. Log-softmax stays finite where p underflows: 0 * log 0 never arises."""
    num_rows, num_classes = logits_BC.shape
    if num_classes == 1:
        return np.ones(num_rows), np.zeros(num_rows), np.ones(num_rows)
    shifted_BC = logits_BC - logits_BC.max(axis=1, keepdims=True)
    log_probability_BC = shifted_BC - np.log(np.exp(shifted_BC).sum(axis=1, keepdims=True))
    probability_BC = np.exp(log_probability_BC)
    entropy_B = -(probability_BC * log_probability_BC).sum(axis=1) / math.log(num_classes)
    second_B, first_B = np.partition(probability_BC, num_classes - 2, axis=1)[:, -2:].T
    # The minimum, because rounding may exceed 1 by a little.
    return first_B, np.minimum(entropy_B, 1.0), first_B - second_B


def _least_sure_label(logits_BC: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence, normalised entropy, margin of the label with the logit nearest to 0; each is monotone in its size."""
    size_B = np.abs(logits_BC).min(axis=1)
    odds_against_B = np.exp(-size_B)
    entropy_B = np.log1p(odds_against_B) + size_B * odds_against_B / (1 + odds_against_B)
    return 1 / (1 + odds_against_B), np.minimum(entropy_B / math.log(2), 1.0), np.tanh(size_B / 2)
