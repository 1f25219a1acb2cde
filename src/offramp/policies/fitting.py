"""Fitting of learned policies to the recorded outputs of the exits on a split. No model runs.

Shapes: K exits, N samples, C outputs of a head, F features.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Dict, Optional, Tuple

import numpy as np

from offramp.policies.costs import Costs
from offramp.policies.evidence import FEATURES, REGRESSION, Evidence, FeatureMemory
from offramp.policies.learned import Stopping, Thresholds, Weights

RIDGE = 1.0
"""L2 penalty on every weight except the constant's, in units of samples. It keeps fits finite for constant features."""


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """Features, losses and lengths of the samples that policies are fitted to."""

    features_KNF: np.ndarray
    """Features at each exit except the last, [K - 1, N, F]."""
    confidence_KN: Optional[np.ndarray]
    """Confidence at each exit except the last, [K - 1, N]; None in a regression."""
    loss_KN: np.ndarray
    """1 where an exit is wrong, otherwise 0; in a regression, the squared error divided by the variance of the truth.
    """
    lengths_N: np.ndarray
    """Number of tokens of each sample."""
    is_logistic: bool
    """True if losses are probabilities, fitted by logistic regression; otherwise ridge regression is used."""
    _fits: Dict[Tuple[int, bool, Tuple[int, ...], bytes], Weights] = field(default_factory=dict, repr=False)
    """Fits so far. Policies of one family for several prices have many of them in common."""

    @classmethod
    def from_logits(
        cls, logits_KNC: np.ndarray, truth_N: np.ndarray, lengths_N: np.ndarray, problem: str
    ) -> TrainingSet:
        """Build the set from recorded logits and the truth (label ids or values). Raises ValueError for NaN."""
        memory, shape = FeatureMemory(len(truth_N)), (len(logits_KNC) - 1, len(truth_N))
        evidence = [Evidence.from_logits(logits_NC, problem, lengths_N) for logits_NC in logits_KNC]
        features_KNF = np.array([memory.update(each) for each in evidence[:-1]]).reshape(*shape, len(FEATURES))
        if problem == REGRESSION:
            variance = max(float(np.var(truth_N)), 1e-12)
            loss_KN = (logits_KNC[:, :, 0].astype(np.float64) - truth_N) ** 2 / variance
            return cls(features_KNF, None, loss_KN, lengths_N, False)
        loss_KN = np.stack([each.answer_BA[:, 0] != truth_N for each in evidence]).astype(np.float64)
        confidence_KN = np.array([each.score("confidence") for each in evidence[:-1]]).reshape(shape)
        return cls(features_KNF, confidence_KN, loss_KN, lengths_N, True)

    def rows(self, chosen_N: np.ndarray) -> TrainingSet:
        """Return a subset of the samples, selected by a mask or by indices."""
        features_KNF, loss_KN = self.features_KNF[:, chosen_N], self.loss_KN[:, chosen_N]
        confidence_KN = None if self.confidence_KN is None else self.confidence_KN[:, chosen_N]
        return TrainingSet(features_KNF, confidence_KN, loss_KN, self.lengths_N[chosen_N], self.is_logistic)

    def fit(self, here: int, target_N: np.ndarray, is_logistic: bool) -> Weights:
        """Fit targets to the features at an exit, given by its index, by a logistic or a ridge regression; once."""
        # the last bits of a sum depend on where its terms lie
        key = (here, is_logistic, target_N.strides, hashlib.sha256(target_N.tobytes()).digest())
        if key not in self._fits:
            self._fits[key] = (_logistic if is_logistic else _ridge)(self.features_KNF[here], target_N)
        return self._fits[key]


def fit_risks(training_set: TrainingSet) -> Tuple[Weights, ...]:
    """Fit the risk of each exit except the last from the features at that exit."""
    fit, is_logistic = training_set.fit, training_set.is_logistic
    return tuple(fit(here, loss_N, is_logistic) for here, loss_N in enumerate(training_set.loss_KN[:-1]))


def fit_stopping(training_set: TrainingSet, risks: Tuple[Weights, ...], costs: Costs, price: float) -> Stopping:
    """Fit a `Stopping` policy by backward induction from the last exit.

    At each exit, the regression targets are the loss and the stopping time realised by the policy of the later exits.

    Args:
        training_set: the samples to fit to.
        risks: risks of each exit except the last, from `fit_risks`.
        costs: latency of each exit.
        price: risk that one second is worth.
    """
    seconds_NK, is_logistic = costs.at(training_set.lengths_N), training_set.is_logistic
    stop_N, loss_N = seconds_NK[:, -1], training_set.loss_KN[-1]
    policy = Stopping((), (), (), _costs_from(costs, len(risks)), price, is_logistic)
    for here in range(len(risks) - 1, -1, -1):
        features_NF, next_N = training_set.features_KNF[here], seconds_NK[:, here + 1]
        left_N = seconds_NK[:, -1] - next_N
        share_N = (stop_N - next_N) / np.where(left_N > 0, left_N, 1)
        futures = (training_set.fit(here, loss_N, is_logistic), *policy.futures)
        waits = (training_set.fit(here, share_N, True), *policy.waits)
        policy = Stopping(risks[here:], futures, waits, _costs_from(costs, here), price, is_logistic)
        leaves_N = policy.leaves(1, features_NF, seconds_NK[:, here:])
        stop_N = np.where(leaves_N, seconds_NK[:, here], stop_N)
        loss_N = np.where(leaves_N, training_set.loss_KN[here], loss_N)
    return policy


def _costs_from(costs: Costs, first: int) -> Costs:
    """Return the costs of the exits from index `first`, counted from 0, on."""
    return Costs(costs.lengths, tuple(row[first:] for row in costs.seconds))


def fit_index_risks(training_set: TrainingSet) -> Tuple[Tuple[Weights, ...], ...]:
    """Fit the risk of each exit m from the features at each exit k <= m, k except the last."""
    return tuple(
        tuple(training_set.fit(here, loss_N, training_set.is_logistic) for loss_N in training_set.loss_KN[here:])
        for here in range(len(training_set.features_KNF))
    )


def fit_thresholds(training_set: TrainingSet, ratio: float) -> Thresholds:
    """Return thresholds at which the shares of samples that leave at the K exits are proportional to 1, z, z^2, ...

    The samples with the highest confidence leave first. `ratio` is z.
    """
    assert training_set.confidence_KN is not None, "a regression has no probabilities"
    num_early, num_samples = training_set.confidence_KN.shape
    shares = ratio ** np.arange(num_early + 1)
    shares = shares / shares.sum()
    left_N, levels = np.ones(num_samples, bool), []
    for confidence_N, share in zip(training_set.confidence_KN, shares):
        wanted = min(int(round(share * num_samples)), int(left_N.sum()))
        level = float(np.sort(confidence_N[left_N])[-wanted]) if wanted else 2.0
        levels.append(level)
        left_N &= confidence_N < level
    return Thresholds(tuple(levels))


def _ridge(features_NF: np.ndarray, target_N: np.ndarray) -> Weights:
    """Fit a ridge regression."""
    matrix = features_NF.T @ features_NF + _penalty(features_NF.shape[1])
    return tuple(np.linalg.solve(matrix, features_NF.T @ target_N).tolist())


def _logistic(features_NF: np.ndarray, target_N: np.ndarray) -> Weights:
    """Fit a logistic regression by Newton's method with step halving. The penalty makes it strictly convex."""
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
        found = objective(weights - step)
        while found > best and size > 1e-6:
            size /= 2
            found = objective(weights - size * step)
        weights = weights - size * step
        previous, best = best, found
        if previous - best <= 1e-9 * (1 + abs(best)):
            break
    return tuple(weights.tolist())


def _penalty(size: int) -> np.ndarray:
    diagonal = np.full(size, RIDGE)
    diagonal[0] = 1e-6  # the constant is not penalised; a tiny value keeps the matrix regular
    return np.diag(diagonal)
