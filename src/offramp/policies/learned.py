"""Policies that were fitted on a transcript: thresholds for each exit, a halting score, and the cost function.

They are kept in policy files (`policies.codec`), not in the grammar: `str` of one names it and does not read back.
`policies.fitting` makes them.

Shapes: B rows, F features, K exits.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Dict, Optional, Tuple

import numpy as np

from offramp.errors import UsageError
from offramp.policies.costs import Costs
from offramp.policies.evidence import REGRESSION, Evidence
from offramp.policies.features import FEATURES, FeatureMemory
from offramp.policies.policy import Decider, Memoryless, Policy

Weights = Tuple[float, ...]
"""One number a feature."""


@dataclass(frozen=True)
class LearnedPolicy(Policy):
    """What they have in common: one entry for each exit but the last, and evidence of every exit from the first on."""

    word: ClassVar[str]
    """The `kind` in a policy file."""

    @property
    @abstractmethod
    def num_early_exits(self) -> int:
        """Exits of the model that this was fitted for, but the last."""

    def __str__(self) -> str:
        text = json.dumps(self.to_json(), sort_keys=True)
        return f"{self.word}:{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def to_json(self) -> Dict[str, Any]:
        """What a policy file keeps of it."""
        tree: Dict[str, Any] = {"kind": self.word}
        for field in fields(self):
            value = getattr(self, field.name)
            is_costs = isinstance(value, Costs)
            tree[field.name] = {"lengths": value.lengths, "seconds": value.seconds} if is_costs else value
        return tree

    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """Refuse a model of another depth."""
        if num_exits != self.num_early_exits + 1:
            what = f"{self} is for {self.num_early_exits + 1} exits, and the model has {num_exits}"
            raise UsageError(what, None, "offramp tune makes one for this model")

    @property
    def lookback(self) -> int:
        """All exits before."""
        return self.num_early_exits

    def earliest_exit(self, num_exits: int) -> int:
        """The first one."""
        return 1

    def last_exit(self, num_exits: int) -> int:
        """The last one."""
        return num_exits


@dataclass(frozen=True)
class Thresholds(LearnedPolicy):
    """Leave exit k when the probability of the answer is at least `levels[k - 1]`; above 1, nobody leaves there.

    What MSDNet's geometric budget gives (Huang et al., "Multi-Scale Dense Networks", ICLR 2018).
    """

    levels: Tuple[float, ...]

    word: ClassVar[str] = "thresholds"

    def __post_init__(self) -> None:
        _require_finite(self, self.levels)

    @property
    def num_early_exits(self) -> int:
        """One a level."""
        return len(self.levels)

    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """Refuse another depth, and a regression."""
        super().check(num_exits, problem)
        if problem == REGRESSION:
            raise UsageError(f"{self} needs probabilities, and a regression has none", None, "tune another policy")

    def start(self, num_rows: int, num_exits: int) -> Decider:
        """A state without a memory."""
        return _Levels(self.levels)


@dataclass(frozen=True)
class ScoredPolicy(LearnedPolicy):
    """A policy that weighs features."""

    risks: Tuple[Any, ...]
    """One entry for each exit but the last."""

    def to_json(self) -> Dict[str, Any]:
        """What a policy file keeps of it, the names of features as well."""
        return {**super().to_json(), "features": list(FEATURES)}

    @property
    def num_early_exits(self) -> int:
        """One a risk."""
        return len(self.risks)

    def start(self, num_rows: int, num_exits: int) -> Decider:
        """Nothing seen yet."""
        return _Scored(self, num_rows)

    def seconds(self, lengths_B: np.ndarray) -> np.ndarray:
        """What `leaves` needs of the lengths: seconds to each exit [B, K], if it weighs costs."""
        return np.empty((len(lengths_B), 0))

    @abstractmethod
    def leaves(self, exit_index: int, features_BF: np.ndarray, seconds_BK: np.ndarray) -> np.ndarray:
        """Who may go at an exit, [B], by the features there and by what `seconds` gave."""


class CostAwarePolicy(ScoredPolicy):
    """A policy that weighs seconds as well."""

    costs: Costs

    def seconds(self, lengths_B: np.ndarray) -> np.ndarray:
        """Seconds to each exit, [B, K]."""
        return self.costs.at(lengths_B)


@dataclass(frozen=True)
class Halting(ScoredPolicy):
    """Leave when the risk that the answer is wrong, as fitted for this exit, is at most `level`.

    A learned halting score (as in BERxiT, Xin et al., EACL 2021), fitted to errors and not to agreement. In a
    regression the risk is the square of the error, divided by the variance of the truth.
    """

    risks: Tuple[Weights, ...]
    """Of each exit but the last."""
    level: float
    is_logistic: bool = True
    """The risk is a probability; else linear in the features."""

    word: ClassVar[str] = "halting"

    def __post_init__(self) -> None:
        _require_weights(self, self.risks)
        _require_finite(self, [self.level])

    def leaves(self, exit_index: int, features_BF: np.ndarray, seconds_BK: np.ndarray) -> np.ndarray:
        """Who may go, [B]."""
        return predicted(self.risks[exit_index - 1], features_BF, self.is_logistic) <= self.level


@dataclass(frozen=True)
class Stopping(CostAwarePolicy):
    """The cost function as optimal stopping: leave exit k when going on, and then stopping best, takes off less risk
    than it costs, c_k - E[c_stop] <= price x (seconds to k + 1 + E[seconds from there to the stop]).

    Fitted backwards by regression (Longstaff and Schwartz, "Valuing American options by simulation", RFS 14, 2001), the
    two parts of the value of going on apart: each is a share, and errors of like models cancel in the difference.
    """

    risks: Tuple[Weights, ...]
    """c of each exit k but the last."""
    futures: Tuple[Weights, ...]
    """E[c_stop], as seen from k, for who goes on."""
    waits: Tuple[Weights, ...]
    """E[seconds from k + 1 to the stop], as a share of the seconds from k + 1 to the last exit: a logistic function."""
    costs: Costs
    price: float
    """Of a second, in units of risk; below 0 it goes on even where it expects to lose a little by it."""
    is_logistic: bool = True
    """Risks are probabilities; else linear in the features."""

    word: ClassVar[str] = "stopping"

    def __post_init__(self) -> None:
        for rows in (self.risks, self.futures, self.waits):
            _require_weights(self, rows)
            _require_cost_aware(self, len(rows))

    def leaves(self, exit_index: int, features_BF: np.ndarray, seconds_BK: np.ndarray) -> np.ndarray:
        """Who may go, [B]."""
        told_B3 = _logistic(features_BF @ self._weights[exit_index - 1])
        if not self.is_logistic:
            told_B3[:, :2] = features_BF @ self._weights[exit_index - 1, :, :2]
        next_B = seconds_BK[:, exit_index]
        wait_B = told_B3[:, 2] * (seconds_BK[:, -1] - next_B)
        return told_B3[:, 0] - told_B3[:, 1] <= self.price * (next_B - seconds_BK[:, exit_index - 1] + wait_B)

    @cached_property
    def _weights(self) -> np.ndarray:
        """[K - 1, F, 3]: one product an exit."""
        return np.stack([np.array(rows) for rows in (self.risks, self.futures, self.waits)], axis=2)


@dataclass(frozen=True)
class Index(CostAwarePolicy):
    """The cost function in a form that needs no fit when costs or the price change: leave exit k unless some later exit
    m takes off more risk a second than the price, max over m of (c_k - E[c_m]) / (T_m - T_k) <= price.
    """

    risks: Tuple[Tuple[Weights, ...], ...]
    """`risks[k - 1][m - k]`: what exit m > k, or k itself, would risk, as seen from exit k."""
    costs: Costs
    price: float
    is_logistic: bool = True

    word: ClassVar[str] = "index"

    def __post_init__(self) -> None:
        for row in self.risks:
            _require_weights(self, row)
        _require_cost_aware(self, len(self.risks))
        if [len(row) for row in self.risks] != list(range(self.costs.num_exits, 1, -1)):
            raise ValueError(f"{self.word}: expected risks of each exit from each exit before it")

    def leaves(self, exit_index: int, features_BF: np.ndarray, seconds_BK: np.ndarray) -> np.ndarray:
        """Who may go, [B]."""
        told_BM = features_BF @ self._weights[exit_index - 1]
        if self.is_logistic:
            told_BM = _logistic(told_BM)
        steps_BM = seconds_BK[:, exit_index:] - seconds_BK[:, exit_index - 1 : exit_index]
        return ((told_BM[:, :1] - told_BM[:, 1:]) / steps_BM).max(axis=1) <= self.price

    @cached_property
    def _weights(self) -> Tuple[np.ndarray, ...]:
        """[F, M] of each exit: one product an exit."""
        return tuple(np.array(row).T for row in self.risks)


@dataclass(frozen=True)
class Starting(Policy):
    """A learned policy for the exits from `first` on, made as if there were no others: heads before it never run."""

    first: int
    policy: LearnedPolicy

    word: ClassVar[str] = "starting"

    def __post_init__(self) -> None:
        if isinstance(self.first, bool) or not isinstance(self.first, int) or self.first < 2:
            raise ValueError(f"{self.word}: expected an exit of at least 2, got {self.first!r}")

    def __str__(self) -> str:
        return f"{self.policy}@{self.first}"

    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """What the inner policy refuses of the exits that are left."""
        self.policy.check(num_exits - self.first + 1, problem)

    @property
    def lookback(self) -> int:
        """That of the inner policy: joined with others it must not miss an exit either."""
        return self.policy.lookback

    def first_evidence(self, num_exits: int) -> int:
        """`first`: what comes before does not exist for it."""
        return self.first

    def earliest_exit(self, num_exits: int) -> int:
        """`first`."""
        return self.first

    def last_exit(self, num_exits: int) -> int:
        """The last one."""
        return num_exits

    def start(self, num_rows: int, num_exits: int) -> Decider:
        """The inner state, its exits renumbered."""
        return _Renumbered(self.first, self.policy.start(num_rows, num_exits - self.first + 1))


def predicted(weights: Weights, features_BF: np.ndarray, is_logistic: bool) -> np.ndarray:
    """The risk [B] that these weights tell."""
    linear_B = features_BF @ np.array(weights)
    return _logistic(linear_B) if is_logistic else linear_B


def _logistic(linear: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(np.minimum(-linear, 500.0)))


class _Levels(Memoryless):
    def __init__(self, levels: Tuple[float, ...]) -> None:
        self.levels = levels

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        if evidence.confidence_B is None:
            raise ValueError("expected evidence of a classification, got that of a regression")
        if exit_index > len(self.levels):
            return np.ones(evidence.num_rows, bool)
        return evidence.confidence_B >= self.levels[exit_index - 1]


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
        self.first, self.decider = first, decider

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        if exit_index < self.first:
            return np.zeros(evidence.num_rows, bool)
        return self.decider.update(exit_index - self.first + 1, evidence)

    def keep(self, mask_B: np.ndarray) -> None:
        self.decider.keep(mask_B)


def _require_finite(policy: LearnedPolicy, numbers: Any) -> None:
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise ValueError(f"{policy.word}: expected finite numbers, got {number!r}")


def _require_weights(policy: LearnedPolicy, rows: Tuple[Weights, ...]) -> None:
    for row in rows:
        if len(row) != len(FEATURES):
            raise ValueError(f"{policy.word}: expected {len(FEATURES)} weights a row, got {len(row)}")
        _require_finite(policy, row)


def _require_cost_aware(policy: Any, num_rows: int) -> None:
    if not policy.num_early_exits == num_rows == policy.costs.num_exits - 1:
        raise ValueError(f"{policy.word}: expected weights and costs of the same exits")
    _require_finite(policy, [policy.price])
