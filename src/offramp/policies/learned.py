"""Learned policies: per-exit thresholds, a halting score, and two forms of a cost function.

Learned policies are stored in policy files (`policies.codec`) and made by `policies.fitting`. They are not part of the
grammar: `str` returns a short name with a hash, which cannot be parsed.

Shapes: B rows, F features, K exits.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Callable, ClassVar, Dict, Optional, Tuple

import numpy as np

from offramp.errors import UsageError
from offramp.policies.combine import AbstractJoin, From
from offramp.policies.costs import Costs
from offramp.policies.evidence import FEATURES, Evidence, FeatureMemory
from offramp.policies.policy import Decider, MemorylessPolicy, Policy
from offramp.policies.rules import refuse_regression

Weights = Tuple[float, ...]
"""Linear weights, one number per feature."""


@dataclass(frozen=True)
class LearnedPolicy(Policy):
    """Common base of learned policies: one entry per exit except the last. Evidence of every exit is needed."""

    word: ClassVar[str]
    """Value of `kind` in a policy file."""

    @property
    @abstractmethod
    def num_early_exits(self) -> int:
        """Number of exits of the model that the policy was fitted for, without the last."""

    def __str__(self) -> str:
        text = json.dumps(self.to_json(), sort_keys=True)
        return f"{self.word}:{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def to_json(self) -> Dict[str, Any]:
        """Return the JSON object that represents the policy in a policy file."""
        return {"kind": self.word, **asdict(self)}

    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """Raise UsageError if the model has a different number of exits."""
        if num_exits != self.num_early_exits + 1:
            what = f"{self} was fitted for {self.num_early_exits + 1} exits, but the model has {num_exits}"
            raise UsageError(what, None, "create a policy for this model with offramp tune")

    @property
    def lookback(self) -> int:
        """All earlier exits."""
        return self.num_early_exits


@dataclass(frozen=True)
class Thresholds(LearnedPolicy, MemorylessPolicy):
    """Leave exit k when the probability of the answer is at least `levels[k - 1]`. A level above 1 disables the exit.

    Generalises the geometric budget of MSDNet (Huang et al., "Multi-Scale Dense Networks", ICLR 2018).
    """

    levels: Tuple[float, ...]
    """Smallest confidence at which a row leaves, one per exit except the last."""

    word: ClassVar[str] = "thresholds"

    def __post_init__(self) -> None:
        _require_finite(self, self.levels)

    @property
    def num_early_exits(self) -> int:
        """Number of levels."""
        return len(self.levels)

    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """Raise UsageError for a different number of exits or a regression."""
        super().check(num_exits, problem)
        refuse_regression(self, problem, "probabilities", "tune another policy")

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        """Return the mask of rows with a confidence of at least the level, bool [B]; all rows at the last exit."""
        confidence_B = evidence.score("confidence")
        if exit_index > len(self.levels):
            return np.ones(evidence.num_rows, bool)
        return confidence_B >= self.levels[exit_index - 1]


@dataclass(frozen=True)
class ScoredPolicy(LearnedPolicy):
    """A learned policy that decides by linear functions of the features."""

    risks: Tuple[Any, ...]
    """Risk weights, one entry per exit except the last."""

    def to_json(self) -> Dict[str, Any]:
        """Return the JSON object of the policy, including the names of the features."""
        return {**super().to_json(), "features": list(FEATURES)}

    @property
    def num_early_exits(self) -> int:
        """Number of entries in `risks`."""
        return len(self.risks)

    def start(self, num_rows: int, num_exits: int) -> Decider:
        """Return a decider with empty feature memory."""
        return _Scored(self, num_rows)

    def seconds(self, lengths_B: np.ndarray) -> np.ndarray:
        """Return the latency of each exit in seconds [B, K], or an empty array if the policy does not use costs."""
        return np.empty((len(lengths_B), 0))

    @abstractmethod
    def leaves(self, exit_index: int, features_BF: np.ndarray, seconds_BK: np.ndarray) -> np.ndarray:
        """Return the mask of rows that leave at an exit, bool [B].

        Args:
            exit_index: the exit, from 1.
            features_BF: features at this exit.
            seconds_BK: the result of `seconds` for these rows.
        """


class CostAwarePolicy(ScoredPolicy):
    """A scored policy that also uses the latency of each exit."""

    costs: Costs

    def seconds(self, lengths_B: np.ndarray) -> np.ndarray:
        """Return the latency of each exit in seconds, [B, K]."""
        return self.costs.at(lengths_B)


@dataclass(frozen=True)
class Halting(ScoredPolicy):
    """Leave when the estimated risk of this exit is at most `level`.

    The risk is the probability that the answer is wrong.

    A learned halting score as in BERxiT (Xin et al., EACL 2021), fitted to errors instead of agreement. In a regression
    the risk is the squared error divided by the variance of the truth.
    """

    risks: Tuple[Weights, ...]
    """Risk weights of each exit except the last."""
    level: float
    """Largest risk at which a row leaves."""
    is_logistic: bool = True
    """True if risks are probabilities (logistic in the features); otherwise they are linear in the features."""

    word: ClassVar[str] = "halting"

    def __post_init__(self) -> None:
        _require_weights(self, self.risks)
        _require_finite(self, [self.level])

    def leaves(self, exit_index: int, features_BF: np.ndarray, seconds_BK: np.ndarray) -> np.ndarray:
        """Return the mask of rows that leave, bool [B]."""
        return predict_risk(self.risks[exit_index - 1], features_BF, self.is_logistic) <= self.level


@dataclass(frozen=True)
class Stopping(CostAwarePolicy):
    """Cost function as an optimal stopping problem.

    A row leaves exit k when continuing reduces the risk by less than it costs:

        c_k - E[c_stop] <= price x (seconds to k + 1 + E[seconds from k + 1 to the stop])

    The expectations are fitted backwards by regression (Longstaff and Schwartz, "Valuing American options by
    simulation", RFS 14, 2001). Risk and waiting time are fitted separately: errors of similar models cancel in the
    difference of risks, and the waiting time is fitted as a fraction.
    """

    risks: Tuple[Weights, ...]
    """Weights of the risk c_k of each exit k except the last."""
    futures: Tuple[Weights, ...]
    """Weights of E[c_stop] as seen from each exit k, for rows that continue."""
    waits: Tuple[Weights, ...]
    """Weights of E[seconds from k + 1 to the stop] as a fraction of the seconds from k + 1 to the last exit (logistic).
    """
    costs: Costs
    """Latency of each exit."""
    price: float
    """Risk that one second is worth. Negative values continue even when the expected risk grows slightly."""
    is_logistic: bool = True
    """True if risks are probabilities (logistic in the features); otherwise they are linear in the features."""

    word: ClassVar[str] = "stopping"

    def __post_init__(self) -> None:
        for rows in (self.risks, self.futures, self.waits):
            _require_weights(self, rows)
            _require_cost_aware(self, len(rows))

    def leaves(self, exit_index: int, features_BF: np.ndarray, seconds_BK: np.ndarray) -> np.ndarray:
        """Return the mask of rows that leave, bool [B]."""
        predicted_B3 = _logistic(features_BF @ self._weights[exit_index - 1])
        if not self.is_logistic:
            predicted_B3[:, :2] = features_BF @ self._weights[exit_index - 1, :, :2]
        next_B = seconds_BK[:, exit_index]
        wait_B = predicted_B3[:, 2] * (seconds_BK[:, -1] - next_B)
        return predicted_B3[:, 0] - predicted_B3[:, 1] <= self.price * (next_B - seconds_BK[:, exit_index - 1] + wait_B)

    @cached_property
    def _weights(self) -> np.ndarray:
        """Weights as an array [K - 1, F, 3], so that each exit needs one matrix product."""
        return np.stack([np.array(rows) for rows in (self.risks, self.futures, self.waits)], axis=2)


@dataclass(frozen=True)
class Index(CostAwarePolicy):
    """Cost function that needs no new fit when costs or price change.

    A row leaves exit k unless some later exit m reduces the risk per second by more than the price: max over m of (c_k
    - E[c_m]) / (T_m - T_k) <= price.
    """

    risks: Tuple[Tuple[Weights, ...], ...]
    """Weights of the risk of exit m >= k as seen from exit k, at `risks[k - 1][m - k]`."""
    costs: Costs
    """Latency of each exit."""
    price: float
    """Risk that one second is worth."""
    is_logistic: bool = True
    """True if risks are probabilities (logistic in the features); otherwise they are linear in the features."""

    word: ClassVar[str] = "index"

    def __post_init__(self) -> None:
        for row in self.risks:
            _require_weights(self, row)
        _require_cost_aware(self, len(self.risks))
        if [len(row) for row in self.risks] != list(range(self.costs.num_exits, 1, -1)):
            raise ValueError(f"{self.word}: risks must hold one entry for each pair of an exit and a later exit")

    def leaves(self, exit_index: int, features_BF: np.ndarray, seconds_BK: np.ndarray) -> np.ndarray:
        """Return the mask of rows that leave, bool [B]."""
        risk_BM = features_BF @ self._weights[exit_index - 1]
        if self.is_logistic:
            risk_BM = _logistic(risk_BM)
        steps_BM = seconds_BK[:, exit_index:] - seconds_BK[:, exit_index - 1 : exit_index]
        return ((risk_BM[:, :1] - risk_BM[:, 1:]) / steps_BM).max(axis=1) <= self.price

    @cached_property
    def _weights(self) -> Tuple[np.ndarray, ...]:
        """Weights of each exit as an array [F, M], so that each exit needs one matrix product."""
        return tuple(np.array(row, np.float64).T for row in self.risks)


@dataclass(frozen=True)
class Starting(Policy):
    """A learned policy for the exits from `first` on, fitted as if earlier exits did not exist.

    Earlier heads never run.
    """

    first: int
    """Index of the first exit that the policy uses, at least 2."""
    policy: LearnedPolicy

    word: ClassVar[str] = "starting"

    def __post_init__(self) -> None:
        if type(self.first) is not int or self.first < 2:
            raise ValueError(f"{self.word}: first must be an integer >= 2, got {self.first!r}")
        if not isinstance(self.policy, LearnedPolicy):
            raise ValueError(f"{self.word}: expected a learned policy inside, got {self.policy}")

    def __str__(self) -> str:
        return f"{self.policy}@{self.first}"

    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """Raise UsageError if the inner policy does not fit the exits from `first` on."""
        self.policy.check(num_exits - self.first + 1, problem)

    @property
    def lookback(self) -> int:
        """The lookback of the inner policy: in a combination it must not miss an exit either."""
        return self.policy.lookback

    def first_evidence(self, num_exits: int) -> int:
        """Return `first`: earlier exits are not evaluated."""
        return self.first

    def earliest_exit(self, num_exits: int) -> int:
        """Return `first`."""
        return self.first

    def start(self, num_rows: int, num_exits: int) -> Decider:
        """Return the state of the inner policy, with renumbered exits."""
        return _Renumbered(self.first, self.policy.start(num_rows, num_exits - self.first + 1))


def predict_risk(weights: Weights, features_BF: np.ndarray, is_logistic: bool) -> np.ndarray:
    """Return the risk [B] that the weights predict."""
    linear_B = features_BF @ np.array(weights, np.float64)
    return _logistic(linear_B) if is_logistic else linear_B


def _logistic(linear: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(np.minimum(-linear, 500.0)))


class _Scored(Decider):
    def __init__(self, policy: ScoredPolicy, num_rows: int) -> None:
        self.policy, self.memory = policy, FeatureMemory(num_rows)
        self.seconds_BK: Optional[np.ndarray] = None

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        features_BF = self.memory.update(evidence)
        if exit_index > self.policy.num_early_exits:
            return np.ones(evidence.num_rows, bool)
        if self.seconds_BK is None:
            lengths_B = np.ones(evidence.num_rows) if evidence.lengths_B is None else evidence.lengths_B
            self.seconds_BK = self.policy.seconds(lengths_B)
        return self.policy.leaves(exit_index, features_BF, self.seconds_BK)

    def keep(self, mask_B: np.ndarray) -> None:
        self.memory.keep(mask_B)
        if self.seconds_BK is not None:
            self.seconds_BK = self.seconds_BK[mask_B]


class _Renumbered(Decider):
    def __init__(self, first: int, decider: Decider) -> None:
        self.first, self.parts = first, [decider]

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        if exit_index < self.first:
            return np.zeros(evidence.num_rows, bool)
        return self.parts[0].update(exit_index - self.first + 1, evidence)


def with_costs(policy: Policy, costs_from: Callable[[int], Costs], first: int = 1) -> Policy:
    """Return the policy with the latencies of another device wherever this needs no new fit.

    This is the case for `Index` policies. Other policies are unchanged.

    Args:
        policy: the policy.
        costs_from: returns the costs of the exits from a given exit on, for a policy whose first head is that exit.
        first: index of the first exit of `policy`.
    """
    if isinstance(policy, Index):
        return replace(policy, costs=costs_from(first))
    if isinstance(policy, (Starting, From)):
        first = policy.first if isinstance(policy, Starting) else 1
        return replace(policy, policy=with_costs(policy.policy, costs_from, first))
    if isinstance(policy, AbstractJoin):
        return replace(policy, parts=tuple(with_costs(part, costs_from) for part in policy.parts))
    return policy


def _require_finite(policy: LearnedPolicy, numbers: Any) -> None:
    """Raise ValueError unless all numbers are finite."""
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise ValueError(f"{policy.word}: numbers must be finite, got {number!r}")


def _require_weights(policy: LearnedPolicy, rows: Tuple[Weights, ...]) -> None:
    for row in rows:
        if len(row) != len(FEATURES):
            raise ValueError(f"{policy.word}: each row must have {len(FEATURES)} weights, got {len(row)}")
        _require_finite(policy, row)


def _require_cost_aware(policy: Any, num_rows: int) -> None:
    if not policy.num_early_exits == num_rows == policy.costs.num_exits - 1:
        raise ValueError(f"{policy.word}: weights and costs must have the same exits")
    _require_finite(policy, [policy.price])
