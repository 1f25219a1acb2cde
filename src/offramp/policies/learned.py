"""Policies that were fitted on a transcript: thresholds for each exit, a halting score, and the cost function.

They are kept in policy files, not in the grammar: `str` of one names it and does not read back. `from_json` and
`to_json` do. `policies.fitting` makes them.

Shapes: B rows, F features, K exits.
"""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Dict, Optional, Tuple

import numpy as np

from offramp.errors import UsageError
from offramp.policies.costs import Costs
from offramp.policies.evidence import REGRESSION, Evidence
from offramp.policies.features import FEATURES, FeatureMemory
from offramp.policies.grammar import parse
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
        text = json.dumps(to_json(self), sort_keys=True)
        return f"{self.word}:{hashlib.sha256(text.encode()).hexdigest()[:8]}"

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

    def start(self, num_rows: int, num_exits: int) -> Decider:
        """Nothing seen yet."""
        return _Scored(self, num_rows)

    @abstractmethod
    def leaves(self, exit_index: int, features_BF: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        """Who may go at an exit, [B], by the features there."""


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

    @property
    def num_early_exits(self) -> int:
        """One a row of weights."""
        return len(self.risks)

    def leaves(self, exit_index: int, features_BF: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        """Who may go, [B]."""
        return predicted(self.risks[exit_index - 1], features_BF, self.is_logistic) <= self.level


@dataclass(frozen=True)
class Stopping(ScoredPolicy):
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
    """Of a second, in units of risk."""
    is_logistic: bool = True
    """Risks are probabilities; else linear in the features."""

    word: ClassVar[str] = "stopping"

    def __post_init__(self) -> None:
        for rows in (self.risks, self.futures, self.waits):
            _require_weights(self, rows)
            _require_cost_aware(self, len(rows))

    @property
    def num_early_exits(self) -> int:
        """One a row of weights."""
        return len(self.risks)

    def leaves(self, exit_index: int, features_BF: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        """Who may go, [B]."""
        risks, futures, waits = (rows[exit_index - 1] for rows in (self.risks, self.futures, self.waits))
        gain_B = predicted(risks, features_BF, self.is_logistic) - predicted(futures, features_BF, self.is_logistic)
        seconds_BK = self.costs.at(lengths_B)
        next_B = seconds_BK[:, exit_index]
        wait_B = predicted(waits, features_BF, True) * (seconds_BK[:, -1] - next_B)
        return gain_B <= self.price * (next_B - seconds_BK[:, exit_index - 1] + wait_B)


@dataclass(frozen=True)
class Index(ScoredPolicy):
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

    @property
    def num_early_exits(self) -> int:
        """One a row of risks."""
        return len(self.risks)

    def leaves(self, exit_index: int, features_BF: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
        """Who may go, [B]."""
        seconds_BK = self.costs.at(lengths_B)
        now, *later = (predicted(w, features_BF, self.is_logistic) for w in self.risks[exit_index - 1])
        steps_BM = seconds_BK[:, exit_index:] - seconds_BK[:, exit_index - 1 : exit_index]
        return ((now[:, np.newaxis] - np.stack(later, axis=1)) / steps_BM).max(axis=1) <= self.price


RULE = "rule"
"""The `kind` of a policy that the grammar can say."""
KINDS = {kind.word: kind for kind in (Thresholds, Halting, Stopping, Index)}


def to_json(policy: Policy) -> Dict[str, Any]:
    """What a policy file keeps of it."""
    if not isinstance(policy, LearnedPolicy):
        return {"kind": RULE, "text": str(policy)}
    tree: Dict[str, Any] = {"kind": policy.word}
    if not isinstance(policy, Thresholds):
        tree["features"] = list(FEATURES)
    for field in fields(policy):
        value = getattr(policy, field.name)
        is_costs = isinstance(value, Costs)
        tree[field.name] = {"lengths": value.lengths, "seconds": value.seconds} if is_costs else value
    return tree


def from_json(tree: Any) -> Policy:
    """The policy that `to_json` described. Raises ValueError for anything else, UsageError for a rule."""
    if not isinstance(tree, dict):
        raise ValueError(f"expected an object, got {tree!r}")
    found = dict(tree)
    word = found.pop("kind", None)
    if word == RULE and isinstance(found.get("text"), str) and len(found) == 1:
        return parse(found["text"])
    kind = KINDS.get(word) if isinstance(word, str) else None
    if kind is None:
        raise ValueError(f"expected a kind out of {RULE}, {', '.join(KINDS)}, got {word!r}")
    features = found.pop("features", None)
    if kind is not Thresholds and features != list(FEATURES):
        raise ValueError(f"made for other features: {features!r}")
    names = [field.name for field in fields(kind)]
    if set(found) != set(names):
        raise ValueError(f"{kind.word}: expected {', '.join(names)}, got {', '.join(sorted(found))}")
    try:
        if "costs" in found:
            costs = found["costs"]
            found["costs"] = Costs(_tuples(costs["lengths"]), _tuples(costs["seconds"]))
        return kind(**{name: _tuples(value) for name, value in found.items()})
    except (TypeError, KeyError) as error:
        raise ValueError(f"{kind.word}: not what it should be ({error})") from None


def predicted(weights: Weights, features_BF: np.ndarray, is_logistic: bool) -> np.ndarray:
    """The risk [B] that these weights tell."""
    linear_B = features_BF @ np.array(weights)
    return 1 / (1 + np.exp(-np.clip(linear_B, -500, 500))) if is_logistic else linear_B


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

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        features_BF = self.memory.update(evidence)
        if exit_index > self.policy.num_early_exits:
            return np.ones(evidence.num_rows, bool)
        lengths_B = np.ones(evidence.num_rows) if evidence.lengths_B is None else evidence.lengths_B
        return self.policy.leaves(exit_index, features_BF, lengths_B)

    def keep(self, mask_B: np.ndarray) -> None:
        self.memory.keep(mask_B)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, (list, tuple)) else value


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
    if policy.price < 0:
        raise ValueError(f"{policy.word}: expected a price of at least 0, got {policy.price}")
