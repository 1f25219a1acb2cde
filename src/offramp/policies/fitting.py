"""Fitting of learned policies to what the exits said of a split: no model runs.

Shapes: K exits, N samples, C outputs of a head, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import numpy as np

from offramp.policies.costs import Costs
from offramp.policies.evidence import REGRESSION, Evidence
from offramp.policies.features import FEATURES, FeatureMemory
from offramp.policies.learned import Stopping, Thresholds, Weights

RIDGE = 1.0
"""Penalty on every weight but the constant's, in samples: a constant feature has weight 0, and nothing diverges."""


@dataclass(frozen=True, eq=False)
class Lessons:
    """What there is to learn from."""

    features_KNF: np.ndarray
    """Of each exit but the last."""
    confidence_KN: Optional[np.ndarray]
    """Of each exit but the last; None in a regression."""
    loss_KN: np.ndarray
    """1 where an exit is wrong, else 0; in a regression the square of its error by the variance of the truth."""
    lengths_N: np.ndarray
    is_logistic: bool

    @classmethod
    def from_logits(cls, logits_KNC: np.ndarray, truth_N: np.ndarray, lengths_N: np.ndarray, problem: str) -> Lessons:
        """From a transcript's arrays; the truth is label ids, or values. Raises ValueError for NaN."""
        memory = FeatureMemory(len(truth_N))
        evidence = [Evidence.from_logits(logits_NC, problem, lengths_N) for logits_NC in logits_KNC]
        features = [memory.update(each) for each in evidence[:-1]]
        if problem == REGRESSION:
            variance = max(float(np.var(truth_N)), 1e-12)
            loss_KN = (logits_KNC[:, :, 0].astype(np.float64) - truth_N) ** 2 / variance
            return cls(_stacked(features, len(truth_N)), None, loss_KN, lengths_N, False)
        loss_KN = np.stack([(each.answer_BA[:, 0] != truth_N) for each in evidence]).astype(np.float64)
        sure = [each.confidence_B for each in evidence[:-1] if each.confidence_B is not None]
        return cls(
            _stacked(features, len(truth_N)), np.array(sure).reshape(len(sure), len(truth_N)), loss_KN, lengths_N, True
        )

    def rows(self, chosen_N: np.ndarray) -> Lessons:
        """Some of the samples: a mask, or indices."""
        confidence_KN = None if self.confidence_KN is None else self.confidence_KN[:, chosen_N]
        return Lessons(
            self.features_KNF[:, chosen_N],
            confidence_KN,
            self.loss_KN[:, chosen_N],
            self.lengths_N[chosen_N],
            self.is_logistic,
        )


def fit_risks(lessons: Lessons) -> Tuple[Weights, ...]:
    """The risk of each exit but the last, as it sees itself."""
    return tuple(
        _fit_risk(features_NF, loss_N, lessons.is_logistic)
        for features_NF, loss_N in zip(lessons.features_KNF, lessons.loss_KN)
    )


def fit_stopping(lessons: Lessons, risks: Tuple[Weights, ...], costs: Costs, price: float) -> Stopping:
    """Backward induction from the last exit; what is realised from exit k + 1 on is what exit k learns to foresee."""
    seconds_NK = costs.at(lessons.lengths_N)
    stop_N, loss_N = seconds_NK[:, -1], lessons.loss_KN[-1]
    futures: List[Weights] = []
    waits: List[Weights] = []
    for exit_index in range(len(risks), 0, -1):
        features_NF, next_N = lessons.features_KNF[exit_index - 1], seconds_NK[:, exit_index]
        left_N = seconds_NK[:, -1] - next_N
        futures.insert(0, _fit_risk(features_NF, loss_N, lessons.is_logistic))
        waits.insert(0, _logistic(features_NF, (stop_N - next_N) / np.where(left_N > 0, left_N, 1)))
        num_later = len(futures)
        policy = Stopping(  # of the exits from here on
            risks[-num_later:], tuple(futures), tuple(waits), _last_costs(costs, num_later + 1), price,
            lessons.is_logistic,
        )  # fmt: skip
        leaves_N = policy.leaves(1, features_NF, seconds_NK[:, exit_index - 1 :])
        stop_N = np.where(leaves_N, seconds_NK[:, exit_index - 1], stop_N)
        loss_N = np.where(leaves_N, lessons.loss_KN[exit_index - 1], loss_N)
    return Stopping(risks, tuple(futures), tuple(waits), costs, price, lessons.is_logistic)


def _last_costs(costs: Costs, num_exits: int) -> Costs:
    return Costs(costs.lengths, tuple(row[-num_exits:] for row in costs.seconds))


def fit_index_risks(lessons: Lessons) -> Tuple[Tuple[Weights, ...], ...]:
    """What each exit m would risk, as seen from each exit k <= m but the last."""
    num_early = len(lessons.features_KNF)
    return tuple(
        tuple(
            _fit_risk(lessons.features_KNF[here], lessons.loss_KN[there], lessons.is_logistic)
            for there in range(here, num_early + 1)
        )
        for here in range(num_early)
    )


def fit_thresholds(lessons: Lessons, ratio: float) -> Thresholds:
    """Levels that let shares of the samples go that are as 1, z, z^2, ... over all K exits, the surest first."""
    assert lessons.confidence_KN is not None, "a regression has no probabilities"
    num_early, num_samples = lessons.confidence_KN.shape
    shares = ratio ** np.arange(num_early + 1)
    shares = shares / shares.sum()
    left_N, levels = np.ones(num_samples, bool), []
    for confidence_N, share in zip(lessons.confidence_KN, shares):
        wanted = min(int(round(share * num_samples)), int(left_N.sum()))
        level = float(np.sort(confidence_N[left_N])[-wanted]) if wanted else 2.0
        levels.append(level)
        left_N &= confidence_N < level
    return Thresholds(tuple(levels))


def _fit_risk(features_NF: np.ndarray, loss_N: np.ndarray, is_logistic: bool) -> Weights:
    return _logistic(features_NF, loss_N) if is_logistic else _ridge(features_NF, loss_N)


def _ridge(features_NF: np.ndarray, target_N: np.ndarray) -> Weights:
    matrix = features_NF.T @ features_NF + _penalty(features_NF.shape[1])
    return _weights(np.linalg.solve(matrix, features_NF.T @ target_N))


def _logistic(features_NF: np.ndarray, target_N: np.ndarray) -> Weights:
    """Newton's method; the penalty makes it strictly convex, halving keeps it from overshooting."""
    penalty = _penalty(features_NF.shape[1])
    weights = np.zeros(features_NF.shape[1])
    share = (target_N.sum() + 0.5) / (len(target_N) + 1)
    weights[0] = np.log(share / (1 - share))

    def objective(weights: np.ndarray) -> float:
        linear_N = features_NF @ weights
        return float(np.logaddexp(0, linear_N).sum() - target_N @ linear_N + weights @ penalty @ weights / 2)

    best = objective(weights)
    for _ in range(50):
        probability_N = 1 / (1 + np.exp(-np.clip(features_NF @ weights, -500, 500)))
        slope = features_NF.T @ (probability_N - target_N) + penalty @ weights
        curve = (features_NF * (probability_N * (1 - probability_N))[:, np.newaxis]).T @ features_NF + penalty
        step, size = np.linalg.solve(curve, slope), 1.0
        while objective(weights - size * step) > best and size > 1e-6:
            size /= 2
        weights = weights - size * step
        previous, best = best, objective(weights)
        if previous - best <= 1e-9 * (1 + abs(best)):
            break
    return _weights(weights)


def _penalty(size: int) -> np.ndarray:
    diagonal = np.full(size, RIDGE)
    diagonal[0] = 1e-6  # the constant: only so that it is never singular
    return np.diag(diagonal)


def _weights(values: np.ndarray) -> Weights:
    return tuple(float(value) for value in values)


def _stacked(features: Sequence[np.ndarray], num_samples: int) -> np.ndarray:
    return np.stack(features) if features else np.empty((0, num_samples, len(FEATURES)))
