"""Policies tried on a transcript, without running the model: where samples leave, what they score, what that takes.

What is fitted is tried on samples that it was not fitted on. Seconds come from a device profile.

Shapes: K exits, N samples, C outputs of a head.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from offramp.errors import NonFiniteError
from offramp.experiments.batching import beyond_shares, padded
from offramp.experiments.choosing import candidates
from offramp.experiments.evaluation import answer_at
from offramp.measure import median
from offramp.policies import Evidence, Policy, StopAt, parse, replay
from offramp.policies.costs import Costs
from offramp.policies.evidence import REGRESSION
from offramp.policies.fitting import TrainingSet, fit_index_risks, fit_risks, fit_stopping, fit_thresholds
from offramp.policies.learned import Halting, Index, LearnedPolicy, ScoredPolicy, Starting, Thresholds, predict_risk
from offramp.runtime.profile import DeviceProfile
from offramp.store.transcript import Transcript
from offramp.tasks.examples import spread
from offramp.tasks.metrics import paired_interval, score

FOLDS = 3
MAX_LESSONS = 6000
"""Samples that a policy is fitted to: six weights an exit need no more."""
PRICES = np.concatenate([-np.geomspace(1, 1e-2, 3), np.geomspace(1e-3, 3, 12)])
"""Of the seconds of all layers, in risk, tried for the whole front; bisection adds some near a latency that is asked
for. Below zero: the least of two noisy risks looks lower than it is, so that a fit on few samples leaves too early even
where a second costs nothing; who has more time than that gets it used.
"""
BISECTIONS = 7
RATIOS = np.geomspace(0.1, 8, 16)
FRONT_POINTS = 40
USED = 0.985
"""Of a latency that is asked for."""
CHANCES = 200
"""Draws of samples, to see what two scores differ by chance."""
MAX_FIRST = 3
"""Learned policies are also tried without the heads before this exit: a head that lets few go only costs."""
DECISIONS = 16
_BETWEEN_DECISIONS = 4 << 20
"""Floats that are read between two decisions, as the layer between them reads its weights."""
Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Tried:
    """A policy on the tune split."""

    policy: Policy
    family: str
    score: float
    loss: float
    """Points less than the last exit's."""
    seconds: float
    """Mean of a text."""
    mean_exit: float
    bytes_read: float
    exit_N: np.ndarray
    """Where each sample leaves when it is scored, uint8."""

    def row(self) -> dict[str, Any]:
        """For tables and files."""
        return {**{k: v for k, v in vars(self).items() if k not in ("policy", "exit_N")}, "policy": str(self.policy)}

    def reached(self, num_exits: int) -> list[float]:
        """The share of samples that come to each layer."""
        return [float((self.exit_N >= layer).mean()) for layer in range(1, num_exits + 1)]


@dataclass(frozen=True, eq=False)
class _View:
    """The samples as exits from `first` on see them, as if there were no others."""

    first: int
    training_set: TrainingSet
    costs: Costs

    def learned(self, policy: LearnedPolicy) -> Policy:
        """A policy of this view for the whole model."""
        return policy if self.first == 1 else Starting(self.first, policy)


Maker = Callable[[TrainingSet], LearnedPolicy]


class Trials:
    """Policies tried on one transcript, with the seconds of a profile."""

    def __init__(self, transcript: Transcript, profile: DeviceProfile, deadline_seconds: float | None = None) -> None:
        about = transcript.about
        self.problem, self.metrics, self.profile = about.problem, about.metrics, profile
        self.logits_KNC = np.ascontiguousarray(transcript.logits_NKC.swapaxes(0, 1))
        self.truth_N, self.lengths_N = transcript.labels_N, transcript.lengths_N.astype(np.int64)
        self.num_exits = len(self.logits_KNC)
        self.padded_N = padded(self.lengths_N, profile.batch)
        self.has_deadline = deadline_seconds is not None
        self.cap_N = _reachable(profile, self.padded_N, deadline_seconds)
        firsts = (1,) if self.has_deadline else range(1, 1 + min(MAX_FIRST, self.num_exits - 1))
        self.views = [self._view(first, transcript.path) for first in firsts]
        full_N = self._answers(np.full(len(self.truth_N), self.num_exits))
        self.full = score(self.metrics, self.truth_N, full_N)["score"]
        order_N = np.random.default_rng(0).permutation(len(self.truth_N))
        self.fold_N = np.empty(len(order_N), np.int64)
        self.fold_N[order_N] = np.arange(len(order_N)) % FOLDS
        self.decision_seconds: dict[type, float] = {}

    def all(self, say: Say, near_seconds: float | None) -> Iterator[Tried]:
        """Every family; of those with a parameter also policies near a latency."""
        say(f"trying policies on {len(self.truth_N)} samples")
        yield from self._rules(near_seconds)
        for view in self.views:
            if self.problem != REGRESSION:
                levels = lambda ratio: lambda training_set: fit_thresholds(training_set, ratio)  # noqa: E731
                yield from self._family("thresholds", view, levels, RATIOS, near_seconds)
            risks = _remembered(fit_risks)
            yield from self._halting(view, risks, near_seconds)
            say(f"fitting the cost function from exit {view.first} on")
            unit = 1 / float(np.mean([row[-1] - row[0] for row in view.costs.seconds]))  # a second's worth in risk
            prices = unit * PRICES
            yield from self._family("stopping", view, self._stopping(view, risks), prices, near_seconds)
            yield from self._family("index", view, self._index(view), prices, near_seconds)

    def _rules(self, near_seconds: float | None) -> Iterator[Tried]:
        """What needs no training_set."""
        by_level: dict[str, list[tuple[float, Tried]]] = {}
        for text in ("none", *candidates(self.num_exits, self.problem)):
            each = self.rule(parse(text))
            yield each
            rule, _, level = text.rpartition(":")
            if rule.endswith(("confidence", "entropy")):
                by_level.setdefault(rule, []).append((float(level), each))
        for rule, tried in by_level.items():
            yield from _nearer(tried, lambda level, rule=rule: self.rule(parse(f"{rule}:{level}")), near_seconds)

    def _family(
        self,
        family: str,
        view: _View,
        make: Callable[[float], Maker],
        parameters: Sequence[float] | np.ndarray,
        near_seconds: float | None,
    ) -> Iterator[Tried]:
        """Parameters that spread over the front, and, by bisection, some whose policy takes about `near_seconds`."""
        tried = [(float(each), self.fitted(family, view, make(float(each)))) for each in parameters]
        yield from (each for _, each in tried)
        yield from _nearer(tried, lambda parameter: self.fitted(family, view, make(parameter)), near_seconds)

    def rule(self, policy: Policy) -> Tried:
        """A policy that learnt nothing here."""
        exit_N = replay(policy, self.logits_KNC, self.problem, self.lengths_N)
        return self._tried(policy, str(policy).partition(":")[0], exit_N)

    def fitted(self, family: str, view: _View, make: Maker) -> Tried:
        """A policy fitted to all samples. Its seconds are its own; its score is that of policies that were fitted
        without the fold they are tried on.
        """
        exit_N = np.empty(len(self.truth_N), np.int64)
        for fold in range(FOLDS):
            here_N = self.fold_N == fold
            policy = make(self._training_set(view, fold))
            exit_N[here_N] = exits_of(policy, view.training_set.rows(here_N)) + view.first - 1
        policy = make(self._training_set(view, None))
        own_N = exits_of(policy, view.training_set) + view.first - 1
        return self._tried(view.learned(policy), family, own_N, exit_N)

    def _view(self, first: int, where: object) -> _View:
        try:
            training_set = TrainingSet.from_logits(
                self.logits_KNC[first - 1 :], self.truth_N, self.lengths_N, self.problem
            )
        except ValueError as error:
            raise NonFiniteError(str(error), where, "train the exits again") from None
        return _View(first, training_set, self.profile.costs_from(first))

    def _training_set(self, view: _View, fold: int | None) -> TrainingSet:
        indices = np.flatnonzero(self.fold_N != (-1 if fold is None else fold))
        return view.training_set.rows(np.array(spread(indices.tolist(), MAX_LESSONS)))

    def _tried(self, policy: Policy, family: str, exit_N: np.ndarray, scored_N: np.ndarray | None = None) -> Tried:
        exit_N = np.minimum(exit_N, self.cap_N)
        scored_N = exit_N if scored_N is None else np.minimum(scored_N, self.cap_N)
        first_head = 1 if self.has_deadline else policy.first_evidence(self.num_exits)  # the guard asks every exit
        costs = self.profile.costs(first_head)
        seconds_N = costs.at(self.padded_N)[np.arange(len(exit_N)), exit_N - 1]
        asked_N = np.maximum(np.minimum(exit_N, self.num_exits - 1) - first_head + 1, 0)
        asked_G = np.maximum.reduceat(asked_N, np.arange(0, len(asked_N), self.profile.batch))
        deciding = self._decision_seconds(policy) * float(asked_G.sum()) / len(asked_N)
        more_seconds, more_bytes = beyond_shares(self.profile, first_head, self.padded_N, exit_N)
        seconds = float(seconds_N.mean()) + deciding + more_seconds
        value = score(self.metrics, self.truth_N, self._answers(scored_N))["score"]
        bytes_read = float(np.array(self.profile.bytes_read)[exit_N - 1].mean()) + more_bytes
        mean_exit, exits_N = float(exit_N.mean()), scored_N.astype(np.uint8)
        return Tried(policy, family, value, self.full - value, seconds, mean_exit, bytes_read, exits_N)

    def best_use_of(self, tried: Sequence[Tried], seconds: float, say: Say) -> Tried:
        """The best score within so many seconds; of those that chance cannot tell from it, one that uses them.

        A score that is best by chance and far faster would leave the user with less than he gave time for.
        """
        best = best_at(tried, seconds)
        assert best is not None, "one of those tried is fast enough"
        using = best_at([each for each in tried if each.seconds >= USED * seconds], seconds)
        if using is None:
            return best
        answers = [self._answers(each.exit_N) for each in (best, using)]
        gain, low, high = paired_interval(self.metrics, self.truth_N, *answers, num_rounds=CHANCES)
        if low > 0 or low == high:  # beyond the bootstrap's interval; it is none if all answers are the same
            return best
        if gain > 0:
            faster = f"{best.policy} scores {gain:.2f} more in {best.seconds * 1e3:.2f} ms"
            say(f"{using.policy} takes {using.seconds * 1e3:.2f} ms; {faster}, which may be chance")
        return using

    def _decision_seconds(self, policy: Policy) -> float:
        """How much longer it decides at an exit, for a batch, than the profiled policy, which decides nothing.

        Measured here, and drawn out as the decisions of the profiled policy are in the engine.
        """
        kind = type(policy.policy if isinstance(policy, Starting) else policy)
        if not issubclass(kind, LearnedPolicy):
            return 0.0
        if kind not in self.decision_seconds:
            asked = (self.logits_KNC, self.problem, self.lengths_N, self.profile.batch)
            if not self.decision_seconds:
                self.decision_seconds[StopAt] = _seconds_a_decision(StopAt(1), *asked)
            base, own = self.decision_seconds[StopAt], _seconds_a_decision(policy, *asked)
            self.decision_seconds[kind] = max(own - base, 0.0) * max(self.profile.decide_seconds / base, 1.0)
        return self.decision_seconds[kind]

    def _answers(self, exit_N: np.ndarray) -> np.ndarray:
        return answer_at(self.logits_KNC, exit_N)

    def _halting(
        self, view: _View, by_training_set: Callable[[TrainingSet], Any], near_seconds: float | None
    ) -> Iterator[Tried]:
        is_logistic = view.training_set.is_logistic
        all_risks = by_training_set(self._training_set(view, None))
        seen = [predict_risk(w, x, is_logistic) for w, x in zip(all_risks, view.training_set.features_KNF, strict=True)]
        levels = np.quantile(np.concatenate(seen), np.linspace(0.05, 0.97, 16))
        make = lambda level: lambda training_set: Halting(by_training_set(training_set), level, is_logistic)  # noqa: E731
        yield from self._family("halting", view, make, levels, near_seconds)

    def _stopping(self, view: _View, by_training_set: Callable[[TrainingSet], Any]) -> Callable[[float], Maker]:
        return lambda price: (
            lambda training_set: fit_stopping(training_set, by_training_set(training_set), view.costs, price)
        )

    def _index(self, view: _View) -> Callable[[float], Maker]:
        by_training_set = _remembered(fit_index_risks)
        is_logistic = view.training_set.is_logistic
        return lambda price: lambda training_set: Index(by_training_set(training_set), view.costs, price, is_logistic)


def _nearer(
    tried: Sequence[tuple[float, Tried]], at: Callable[[float], Tried], near_seconds: float | None
) -> Iterator[Tried]:
    """Policies between two of those `tried`, by their one parameter, whose seconds come ever nearer."""
    if near_seconds is None:
        return
    slow = [pair for pair in tried if pair[1].seconds > near_seconds]
    fast = [pair for pair in tried if pair[1].seconds <= near_seconds]
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


def _seconds_a_decision(
    policy: Policy, logits_KNC: np.ndarray, problem: str, lengths_N: np.ndarray, batch: int
) -> float:
    """Of a batch at an exit: the median over some batches, all exits asked. Little of a decision is in the caches, as
    little is in use.
    """
    num_exits, num_samples = logits_KNC.shape[:2]
    seconds, weights = [], np.ones(_BETWEEN_DECISIONS, np.float32)
    for start in range(0, min(DECISIONS * batch, num_samples), batch):
        here = slice(start, min(start + batch, num_samples))
        decider = policy.start(here.stop - start, num_exits)
        for exit_index in range(policy.first_evidence(num_exits), num_exits):
            weights.sum()
            began = time.perf_counter()
            evidence = Evidence.from_logits(logits_KNC[exit_index - 1, here], problem, lengths_N[here])
            decider.update(exit_index, evidence)
            seconds.append(time.perf_counter() - began)
    return median(seconds)


def exits_of(policy: LearnedPolicy, training_set: TrainingSet) -> np.ndarray:
    """Where each sample leaves: what `replay` says, from features that are there already."""
    num_early, num_samples = training_set.features_KNF.shape[:2]
    exit_N = np.full(num_samples, num_early + 1)
    seconds_NK = (
        policy.seconds(training_set.lengths_N) if isinstance(policy, ScoredPolicy) else np.empty((num_samples, 0))
    )
    for exit_index in range(num_early, 0, -1):
        if isinstance(policy, ScoredPolicy):
            leaves_N = policy.leaves(exit_index, training_set.features_KNF[exit_index - 1], seconds_NK)
        else:
            assert isinstance(policy, Thresholds) and training_set.confidence_KN is not None
            leaves_N = training_set.confidence_KN[exit_index - 1] >= policy.levels[exit_index - 1]
        exit_N[leaves_N] = exit_index
    return exit_N


def best_at(tried: Sequence[Tried], seconds: float | None) -> Tried | None:
    """The best score within so many seconds, the fastest of equals; None if none is so fast."""
    fitting = [each for each in tried if seconds is None or each.seconds <= seconds]
    return min(fitting, key=lambda each: (-each.score, each.seconds), default=None)


def front(tried: Sequence[Tried]) -> list[Tried]:
    """Those that no other beats in score and seconds both, the fastest first; at most FRONT_POINTS of them."""
    found: list[Tried] = []
    for each in sorted(tried, key=lambda each: (each.seconds, -each.score)):
        if not found or each.score > found[-1].score:
            found.append(each)
    if len(found) <= FRONT_POINTS:
        return found
    return [found[round(place * (len(found) - 1) / (FRONT_POINTS - 1))] for place in range(FRONT_POINTS)]


def _reachable(profile: DeviceProfile, lengths_N: np.ndarray, deadline_seconds: float | None) -> np.ndarray:
    """The deepest exit that each sample reaches before the deadline, nearly always; at least the first."""
    if deadline_seconds is None:
        return np.full(len(lengths_N), profile.num_exits)
    tails = Costs(profile.lengths, _growing(profile.seconds_p99))
    return np.maximum((tails.at(lengths_N) <= deadline_seconds).sum(axis=1), 1)


def _growing(table: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """Rows whose values grow: tails are noisy."""
    return tuple(tuple((np.maximum.accumulate(row) + 1e-9 * np.arange(len(row))).tolist()) for row in table)


def _remembered(fit: Callable[[TrainingSet], Any]) -> Callable[[TrainingSet], Any]:
    """A fit that is not repeated for the same samples, which are told by their lengths and losses."""
    known: dict[Any, Any] = {}

    def remembered(training_set: TrainingSet) -> Any:
        key = (training_set.lengths_N.tobytes(), training_set.loss_KN.tobytes())
        if key not in known:
            known[key] = fit(training_set)
        return known[key]

    return remembered
