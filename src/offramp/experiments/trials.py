"""Evaluation of policies on a transcript, without running the model: exits, scores and predicted latencies.

Fitted policies are scored by cross-validation. Latencies come from a device profile.

Shapes: K exits, N samples, C outputs of a head.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from offramp.errors import NonFiniteError
from offramp.experiments.batching import additional_costs, padded
from offramp.experiments.children import Log
from offramp.experiments.choosing import candidates
from offramp.experiments.evaluation import answer_at
from offramp.policies import Policy, parse, replay
from offramp.policies.costs import Costs
from offramp.policies.evidence import REGRESSION
from offramp.policies.fitting import TrainingSet, fit_index_risks, fit_risks, fit_stopping, fit_thresholds
from offramp.policies.learned import (
    Halting,
    Index,
    LearnedPolicy,
    ScoredPolicy,
    Starting,
    Stopping,
    Thresholds,
    predict_risk,
)
from offramp.runtime.profile import DeviceProfile
from offramp.store.transcript import Transcript
from offramp.tasks.examples import spread
from offramp.tasks.metrics import paired_interval, score
from offramp.units import format_duration

FOLDS = 3
MAX_TRAINING_SAMPLES = 6000
"""Number of samples that a policy is fitted to; it has six weights per exit."""
PRICES = np.concatenate([-np.geomspace(1, 1e-2, 3), np.geomspace(1e-3, 3, 12)])
"""Prices, in risk, of the latency of all layers, evaluated for the front; bisection adds some near a requested latency.

Negative prices: the minimum of two noisy risks is biased low, so a fit on few samples leaves too early even at price 0.
"""
BISECTIONS = 7
RATIOS = np.geomspace(0.1, 8, 16)
FRONT_POINTS = 40
MIN_USE = 0.985
"""Fraction of a requested latency that a policy should use, if it scores as well as a faster one."""
COMPARISON_DRAWS = 200
"""Bootstrap draws for the difference of two scores."""
MAX_FIRST = 3
"""Last exit from which learned policies are also evaluated alone: an early head where few rows leave only costs."""
DECISION_FACTORS: dict[type, float] = {Halting: 0.5, Stopping: 1.1, Index: 1.0}
"""Additional time of a decision in multiples of `DeviceProfile.decide_seconds`, by class of policy.

Constants, because a search that reads a clock finds another policy each time. Medians over batches of 1 to 32 rows and
4 to 12 exits (bench/decisions.py).
"""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A policy evaluated on the tune split."""

    policy: Policy
    family: str
    score: float
    loss: float
    """Points of the score below that of the last exit."""
    seconds: float
    """Mean predicted latency of a text."""
    mean_exit: float
    bytes_read: float
    exit_N: np.ndarray
    """Exit of each sample in the cross-validated score, uint16: a store has up to 4,096 exits."""

    def row(self) -> dict[str, Any]:
        """Return the facts for tables and files."""
        return {**{k: v for k, v in vars(self).items() if k not in ("policy", "exit_N")}, "policy": str(self.policy)}


@dataclass(frozen=True, eq=False)
class _View:
    """The samples and costs of a model that only has the exits from `first` on."""

    first: int
    training_set: TrainingSet
    costs: Costs


Fit = Callable[[TrainingSet, float], LearnedPolicy]
"""Fits a policy of one family, with a value of its parameter, to samples."""


class Trials:
    """Evaluates policies on one transcript, with the latencies of a profile."""

    def __init__(self, transcript: Transcript, profile: DeviceProfile, deadline_seconds: float | None = None) -> None:
        about = transcript.about
        self.problem, self.metrics, self.profile = about.problem, about.metrics, profile
        self.logits_KNC = np.ascontiguousarray(transcript.logits_NKC.swapaxes(0, 1))
        self.truth_N, self.lengths_N = transcript.labels_N, transcript.lengths_N.astype(np.int64)
        self.num_exits = len(self.logits_KNC)
        self.padded_N = padded(self.lengths_N, profile.batch)
        self.has_deadline = deadline_seconds is not None
        self.cap_N = np.maximum(reachable(profile, self.padded_N, deadline_seconds), 1)
        firsts = (1,) if self.has_deadline else range(1, 1 + min(MAX_FIRST, self.num_exits - 1))
        self.views = [self._view(first, transcript.path) for first in firsts]
        full_N = answer_at(self.logits_KNC, np.full(len(self.truth_N), self.num_exits))
        self.full = score(self.metrics, self.truth_N, full_N)["score"]
        order_N = np.random.default_rng(0).permutation(len(self.truth_N))
        self.fold_N = np.empty(len(order_N), np.int64)
        self.fold_N[order_N] = np.arange(len(order_N)) % FOLDS
        self._training_sets: dict[tuple[int, int | None], TrainingSet] = {}

    def all(self, log: Log, near_seconds: float | None) -> Iterator[Candidate]:
        """Evaluate every family; for families with a parameter, also policies near the latency `near_seconds`."""
        log(f"trying policies on {len(self.truth_N)} samples")
        yield from self._rules(near_seconds)
        for view in self.views:
            self._training_sets.clear()  # each remembers its fits
            for family, fit, parameters in self._families(view, log):
                fitted = partial(self.fitted, family, view, fit)
                evaluated = [(value, fitted(value)) for value in map(float, parameters)]
                yield from (each for _, each in evaluated)
                yield from _nearer(evaluated, fitted, near_seconds)

    def _families(self, view: _View, log: Log) -> Iterator[tuple[str, Fit, np.ndarray]]:
        """Yield the name of each learned family, its fit, and the values of its parameter."""
        costs = view.costs
        is_logistic, features_KNF = view.training_set.is_logistic, view.training_set.features_KNF
        if self.problem != REGRESSION:
            yield "thresholds", fit_thresholds, RATIOS
        weights = fit_risks(self._training_set(view, None))
        predicted = [predict_risk(w, x, is_logistic) for w, x in zip(weights, features_KNF, strict=True)]
        levels = np.quantile(np.concatenate(predicted), np.linspace(0.05, 0.97, 16))
        yield "halting", lambda samples, level: Halting(fit_risks(samples), level, is_logistic), levels
        log(f"fitting the cost function from exit {view.first} on")
        unit = 1 / float(np.mean([row[-1] - row[0] for row in costs.seconds]))  # a second's worth in risk
        prices = unit * PRICES
        yield "stopping", lambda samples, price: fit_stopping(samples, fit_risks(samples), costs, price), prices
        yield "index", lambda samples, price: Index(fit_index_risks(samples), costs, price, is_logistic), prices

    def _rules(self, near_seconds: float | None) -> Iterator[Candidate]:
        """Evaluate the rules, which are not fitted."""
        by_level: dict[str, list[tuple[float, Candidate]]] = {}
        for text in ("none", *candidates(self.num_exits, self.problem)):
            each = self.rule(parse(text))
            yield each
            rule, _, level = text.rpartition(":")
            if rule.endswith(("confidence", "entropy")):
                by_level.setdefault(rule, []).append((float(level), each))
        for rule, evaluated in by_level.items():
            yield from _nearer(evaluated, lambda level, rule=rule: self.rule(parse(f"{rule}:{level}")), near_seconds)

    def rule(self, policy: Policy) -> Candidate:
        """Evaluate a policy that is not fitted."""
        exit_N = replay(policy, self.logits_KNC, self.problem, self.lengths_N)
        return self._evaluated(policy, str(policy).partition(":")[0], exit_N, exit_N)

    def fitted(self, family: str, view: _View, fit: Fit, parameter: float) -> Candidate:
        """Evaluate a policy fitted to all samples. Its score is cross-validated; its latency is that of the policy."""
        exit_N = np.empty(len(self.truth_N), np.int64)
        for fold in range(FOLDS):
            here_N = self.fold_N == fold
            policy = fit(self._training_set(view, fold), parameter)
            exit_N[here_N] = exits_of(policy, view.training_set.rows(here_N)) + view.first - 1
        policy = fit(self._training_set(view, None), parameter)
        own_N = exits_of(policy, view.training_set) + view.first - 1
        whole = policy if view.first == 1 else Starting(view.first, policy)
        return self._evaluated(whole, family, own_N, exit_N)

    def _view(self, first: int, where: object) -> _View:
        logits_KNC = self.logits_KNC[first - 1 :]
        try:
            training_set = TrainingSet.from_logits(logits_KNC, self.truth_N, self.lengths_N, self.problem)
        except ValueError as error:
            raise NonFiniteError(str(error), where, "train the exits again") from None
        return _View(first, training_set, self.profile.costs_from(first))

    def _training_set(self, view: _View, fold: int | None) -> TrainingSet:
        key = (view.first, fold)
        if key not in self._training_sets:
            indices = np.flatnonzero(self.fold_N != (-1 if fold is None else fold))
            chosen_N = np.array(spread(indices.tolist(), MAX_TRAINING_SAMPLES))
            self._training_sets[key] = view.training_set.rows(chosen_N)
        return self._training_sets[key]

    def _evaluated(self, policy: Policy, family: str, exit_N: np.ndarray, scored_N: np.ndarray) -> Candidate:
        exit_N, scored_N = np.minimum(exit_N, self.cap_N), np.minimum(scored_N, self.cap_N)
        first_head = 1 if self.has_deadline else policy.first_evidence(self.num_exits)  # the guard asks every exit
        costs = self.profile.costs(first_head)
        seconds_N = costs.at(self.padded_N)[np.arange(len(exit_N)), exit_N - 1]
        asked_N = np.maximum(np.minimum(exit_N, self.num_exits - 1) - first_head + 1, 0)
        asked_G = np.maximum.reduceat(asked_N, np.arange(0, len(asked_N), self.profile.batch))
        deciding = self._decision_seconds(policy) * float(asked_G.sum()) / len(asked_N)
        more_seconds, more_bytes = additional_costs(self.profile, first_head, self.padded_N, exit_N)
        seconds = float(seconds_N.mean()) + deciding + more_seconds
        value = score(self.metrics, self.truth_N, answer_at(self.logits_KNC, scored_N))["score"]
        bytes_read = float(np.array(self.profile.bytes_read)[exit_N - 1].mean()) + more_bytes
        mean_exit, exits_N = float(exit_N.mean()), scored_N.astype(np.uint16)
        return Candidate(policy, family, value, self.full - value, seconds, mean_exit, bytes_read, exits_N)

    def best_use_of(self, evaluated: Sequence[Candidate], seconds: float, log: Log) -> Candidate:
        """Return the candidate with the best score within `seconds`, or a slower one whose score is not significantly
        lower: a far faster policy that scores best by chance would not use the time that the user allows.
        """
        best = best_at(evaluated, seconds)
        assert best is not None, "one candidate is fast enough"
        slower = best_at([each for each in evaluated if each.seconds >= MIN_USE * seconds], seconds)
        if slower is None:
            return best
        answers = [answer_at(self.logits_KNC, each.exit_N) for each in (best, slower)]
        gain, low, high = paired_interval(self.metrics, self.truth_N, *answers, num_rounds=COMPARISON_DRAWS)
        if low > 0 or low == high:  # outside the interval, or no interval as all answers are equal
            return best
        if gain > 0:
            faster = f"{best.policy} scores {gain:.2f} more in {format_duration(best.seconds)}"
            log(f"{slower.policy} takes {format_duration(slower.seconds)}; {faster}, which may be chance")
        return slower

    def _decision_seconds(self, policy: Policy) -> float:
        """Return the time of a decision for a batch, less that of the profiled policy, which computes nothing."""
        kind = type(policy.policy if isinstance(policy, Starting) else policy)
        return DECISION_FACTORS.get(kind, 0.0) * self.profile.decide_seconds


def _nearer(
    evaluated: Sequence[tuple[float, Candidate]], at: Callable[[float], Candidate], near_seconds: float | None
) -> Iterator[Candidate]:
    """Yield candidates by bisection of the parameter between two of `evaluated` around the latency `near_seconds`."""
    if near_seconds is None:
        return
    slow = [pair for pair in evaluated if pair[1].seconds > near_seconds]
    fast = [pair for pair in evaluated if pair[1].seconds <= near_seconds]
    if not slow or not fast:
        return
    over = min(slow, key=lambda pair: pair[1].seconds)[0]
    under = max(fast, key=lambda pair: pair[1].seconds)[0]
    for _ in range(BISECTIONS):
        middle = (over * under) ** 0.5 if min(over, under) > 0 else (over + under) / 2
        middle = float(f"{middle:.5g}")
        each = at(middle)
        over, under = (middle, under) if each.seconds > near_seconds else (over, middle)
        yield each


def exits_of(policy: LearnedPolicy, training_set: TrainingSet) -> np.ndarray:
    """Return the exit of each sample [N], as `replay` does, from features that are computed already."""
    num_early, num_samples = training_set.features_KNF.shape[:2]
    exit_N = np.full(num_samples, num_early + 1)
    seconds_NK = policy.seconds(training_set.lengths_N) if isinstance(policy, ScoredPolicy) else None
    for exit_index in range(num_early, 0, -1):
        if isinstance(policy, ScoredPolicy) and seconds_NK is not None:
            leaves_N = policy.leaves(exit_index, training_set.features_KNF[exit_index - 1], seconds_NK)
        else:
            assert isinstance(policy, Thresholds) and training_set.confidence_KN is not None
            leaves_N = training_set.confidence_KN[exit_index - 1] >= policy.levels[exit_index - 1]
        exit_N[leaves_N] = exit_index
    return exit_N


def best_at(evaluated: Sequence[Candidate], seconds: float | None) -> Candidate | None:
    """Return the candidate with the best score within `seconds`, the fastest of equals; None if none is fast enough."""
    fitting = [each for each in evaluated if seconds is None or each.seconds <= seconds]
    return min(fitting, key=lambda each: (-each.score, each.seconds), default=None)


def front(evaluated: Sequence[Candidate]) -> list[Candidate]:
    """Return at most FRONT_POINTS candidates that no other beats in both score and latency, the fastest first."""
    found: list[Candidate] = []
    for each in sorted(evaluated, key=lambda each: (each.seconds, -each.score)):
        if not found or each.score > found[-1].score:
            found.append(each)
    if len(found) <= FRONT_POINTS:
        return found
    return [found[round(place * (len(found) - 1) / (FRONT_POINTS - 1))] for place in range(FRONT_POINTS)]


def reachable(profile: DeviceProfile, lengths_N: np.ndarray, deadline_seconds: float | None) -> np.ndarray:
    """Return the deepest exit that each sample reaches before the deadline at the 99th percentile; 0 for none."""
    if deadline_seconds is None:
        return np.full(len(lengths_N), profile.num_exits)
    tails = []
    for row in profile.seconds_p99:  # measured percentiles are noisy: costs increase strictly
        tails.append(tuple((np.maximum.accumulate(row) + 1e-9 * np.arange(len(row))).tolist()))
    costs = Costs(profile.lengths, tuple(tails))
    return (costs.at(lengths_N) <= deadline_seconds).sum(axis=1)
