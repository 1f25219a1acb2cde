"""The verb tune: of all policies, the one that a goal asks for, found on a transcript without running the model.

Policies are tried on the tune split; what is fitted is tried on samples that it was not fitted on. Certificates come
from the certify split, which chooses nothing. Seconds come from a device profile.

Shapes: K exits, N samples, C outputs of a head.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from offramp.errors import BudgetError, NonFiniteError, RefusedError, UsageError
from offramp.experiments.batching import beyond_shares, padded
from offramp.experiments.choosing import candidates
from offramp.experiments.evaluation import answer_at
from offramp.measure import median
from offramp.policies import Evidence, Policy, StopAt, parse, replay
from offramp.policies.certify import Certificate, certify, losses, samples_needed
from offramp.policies.costs import Costs
from offramp.policies.evidence import MULTI_LABEL, REGRESSION
from offramp.policies.fitting import Lessons, fit_index_risks, fit_risks, fit_stopping, fit_thresholds
from offramp.policies.learned import (
    Halting,
    Index,
    LearnedPolicy,
    ScoredPolicy,
    Starting,
    Thresholds,
    predicted,
    to_json,
)
from offramp.runtime.durations import format_duration
from offramp.runtime.profile import DeviceProfile
from offramp.store.policy_file import PolicyFile
from offramp.store.transcript import Transcript
from offramp.tasks.examples import spread
from offramp.tasks.metrics import score

FOLDS = 3
MAX_LESSONS = 6000
"""Samples that a policy is fitted to: six weights an exit need no more."""
PRICES = 14
"""Of a second, tried for the whole front; bisection adds some near a latency that is asked for."""
BISECTIONS = 7
RATIOS = np.geomspace(0.1, 8, 16)
FRONT_POINTS = 40
USED = 0.97
"""Of a latency that is asked for."""
MAX_FIRST = 3
"""Learned policies are also tried without the heads before this exit: a head that lets few go only costs."""
DECISIONS = 50
BOOTSTRAP_ROUNDS = 300
Say = Callable[[str], None]


@dataclass(frozen=True)
class Goal:
    """What is asked for; at least one of them."""

    latency_seconds: float | None = None
    """Mean of a text, at batches of several a row's share: the best score at this or less."""
    max_drop: float | None = None
    """Points that may be lost: the fastest policy that is certified to lose no more."""
    confidence: float = 0.9
    """Of the certificate."""
    method: str = "ucb"
    """Of the certificate: one of `policies.certify.METHODS`."""
    deadline_seconds: float | None = None
    """Of every text: the policy is run under a guard."""

    def __post_init__(self) -> None:
        if self.latency_seconds is None and self.max_drop is None and self.deadline_seconds is None:
            raise UsageError("no goal", None, "give --latency, --max-drop or --deadline")
        if self.latency_seconds is not None and self.max_drop is not None:
            raise UsageError("two goals", None, "give --latency or --max-drop")
        if self.max_drop is not None and self.deadline_seconds is not None:
            what = "no drop can be certified under a deadline: what the guard cuts depends on the time of day"
            raise UsageError(what, None, "give --max-drop or --deadline")
        if self.max_drop is not None and not 0 < self.max_drop < 100:
            raise UsageError(f"--max-drop {self.max_drop:g} is in points, above 0 and below 100")
        if not 0 < self.confidence < 1:
            raise UsageError(f"--confidence {self.confidence:g} is not between 0 and 1")


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


def tune(
    transcript: Transcript,
    certify_on: Transcript | None,
    profile: DeviceProfile,
    goal: Goal,
    say: Say,
) -> tuple[PolicyFile, list[Tried]]:
    """The policy that the goal asks for, and the best of each family at the same goal, for comparison.

    Raises UsageError for splits that cannot serve, BudgetError for a latency or deadline that no exit keeps,
    RefusedError where nothing can be certified, NonFiniteError for a transcript with NaN.
    """
    _require_usable(transcript, certify_on, profile, goal)
    trials = Trials(transcript, profile, goal.deadline_seconds)
    _require_possible(trials, goal)
    tried = list(trials.all(say, goal.latency_seconds))
    certificate: dict[str, Any] | None = None
    if goal.max_drop is not None:
        assert certify_on is not None
        chosen, certificate = _certified(tried, certify_on, goal, say)
    else:
        chosen = trials.best_use_of(tried, goal.latency_seconds or float("inf"))
    families = {each.family: None for each in tried}
    rivals = [best_at([each for each in tried if each.family == family], chosen.seconds * 1.001) for family in families]
    about = transcript.about
    file = PolicyFile(
        to_json(chosen.policy), about.model_sha256, goal.deadline_seconds,
        {k: v for k, v in chosen.row().items() if k not in ("policy", "family")}, certificate,
        {"task": about.task, "metrics": list(about.metrics), "tune_sha256": about.data_sha256,
         "certify_sha256": certify_on.about.data_sha256 if certify_on else None, "num_samples": len(trials.truth_N)},
        profile.fingerprint, [each.row() for each in front(tried)],
    )  # fmt: skip
    return file, [each for each in rivals if each is not None]


@dataclass(frozen=True, eq=False)
class _View:
    """The samples as exits from `first` on see them, as if there were no others."""

    first: int
    lessons: Lessons
    costs: Costs

    def learned(self, policy: LearnedPolicy) -> Policy:
        """A policy of this view for the whole model."""
        return policy if self.first == 1 else Starting(self.first, policy)


Maker = Callable[[Lessons], LearnedPolicy]


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
        """Every family; of the cost function also policies near a latency."""
        say(f"trying policies on {len(self.truth_N)} samples")
        for text in ("none", *candidates(self.num_exits, self.problem)):
            yield self.rule(parse(text))
        for view in self.views:
            if self.problem != REGRESSION:
                for ratio in RATIOS:
                    yield self.fitted("thresholds", view, lambda lessons, ratio=ratio: fit_thresholds(lessons, ratio))
            risks = _remembered(fit_risks)
            yield from self._halting(view, risks)
            say(f"fitting the cost function from exit {view.first} on")
            yield from self._priced("stopping", view, self._stopping(view, risks), near_seconds)
            yield from self._priced("index", view, self._index(view), near_seconds)

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
            policy = make(self._lessons(view, fold))
            exit_N[here_N] = exits_of(policy, view.lessons.rows(here_N)) + view.first - 1
        policy = make(self._lessons(view, None))
        own_N = exits_of(policy, view.lessons) + view.first - 1
        return self._tried(view.learned(policy), family, own_N, exit_N)

    def _view(self, first: int, where: object) -> _View:
        try:
            lessons = Lessons.from_logits(self.logits_KNC[first - 1 :], self.truth_N, self.lengths_N, self.problem)
        except ValueError as error:
            raise NonFiniteError(str(error), where, "train the exits again") from None
        costs = self.profile.costs(first)
        return _View(first, lessons, Costs(costs.lengths, tuple(row[first - 1 :] for row in costs.seconds)))

    def _lessons(self, view: _View, fold: int | None) -> Lessons:
        indices = np.flatnonzero(self.fold_N != (-1 if fold is None else fold))
        return view.lessons.rows(np.array(spread(indices.tolist(), MAX_LESSONS)))

    def _tried(self, policy: Policy, family: str, exit_N: np.ndarray, scored_N: np.ndarray | None = None) -> Tried:
        exit_N = np.minimum(exit_N, self.cap_N)
        scored_N = exit_N if scored_N is None else np.minimum(scored_N, self.cap_N)
        first_head = 1 if self.has_deadline else policy.first_evidence(self.num_exits)  # the guard asks every exit
        costs = self.profile.costs(first_head)
        seconds_N = costs.at(self.padded_N)[np.arange(len(exit_N)), exit_N - 1]
        asked_N = np.maximum(np.minimum(exit_N, self.num_exits - 1) - first_head + 1, 0)
        more_seconds, more_bytes = beyond_shares(self.profile, costs, self.padded_N, exit_N)
        seconds = float((seconds_N + asked_N * self._decision_seconds(policy)).mean()) + more_seconds
        value = score(self.metrics, self.truth_N, self._answers(scored_N))["score"]
        bytes_read = float(np.array(self.profile.bytes_read)[exit_N - 1].mean()) + more_bytes
        mean_exit, exits_N = float(exit_N.mean()), scored_N.astype(np.uint8)
        return Tried(policy, family, value, self.full - value, seconds, mean_exit, bytes_read, exits_N)

    def best_use_of(self, tried: Sequence[Tried], seconds: float) -> Tried:
        """The best score within so many seconds; of those that chance cannot tell from it, one that uses them.

        A score that is best by chance and far faster would leave the user with less than he gave time for.
        """
        best = best_at(tried, seconds)
        assert best is not None, "stage:1 is fast enough"
        using = best_at([each for each in tried if each.seconds >= USED * seconds], seconds)
        if using is None:
            return best
        differs = (self._answers(best.exit_N) != self._answers(using.exit_N)).mean()
        error = 100 * float(np.sqrt(differs / len(self.truth_N)))
        return using if differs and using.score >= best.score - error else best

    def _decision_seconds(self, policy: Policy) -> float:
        """How much longer it decides at an exit than the policy that was profiled, which decides nothing."""
        kind = type(policy.policy if isinstance(policy, Starting) else policy)
        if not issubclass(kind, LearnedPolicy):
            return 0.0
        if kind not in self.decision_seconds:
            asked = (self.logits_KNC, self.problem, self.lengths_N, self.profile.batch)
            base, own = _seconds_a_decision(StopAt(1), *asked), _seconds_a_decision(policy, *asked)
            self.decision_seconds[kind] = max(own - base, 0.0)
        return self.decision_seconds[kind]

    def _answers(self, exit_N: np.ndarray) -> np.ndarray:
        return answer_at(self.logits_KNC, exit_N)

    def _halting(self, view: _View, by_lessons: Callable[[Lessons], Any]) -> Iterator[Tried]:
        is_logistic = view.lessons.is_logistic
        all_risks = by_lessons(self._lessons(view, None))
        seen = [predicted(w, x, is_logistic) for w, x in zip(all_risks, view.lessons.features_KNF, strict=True)]
        for level in np.quantile(np.concatenate(seen), np.linspace(0.05, 0.97, 16)):
            make = lambda lessons, level=level: Halting(by_lessons(lessons), float(level), is_logistic)  # noqa: E731
            yield self.fitted("halting", view, make)

    def _stopping(self, view: _View, by_lessons: Callable[[Lessons], Any]) -> Callable[[float], Maker]:
        return lambda price: lambda lessons: fit_stopping(lessons, by_lessons(lessons), view.costs, price)

    def _index(self, view: _View) -> Callable[[float], Maker]:
        by_lessons = _remembered(fit_index_risks)
        is_logistic = view.lessons.is_logistic
        return lambda price: lambda lessons: Index(by_lessons(lessons), view.costs, price, is_logistic)

    def _priced(
        self, family: str, view: _View, make: Callable[[float], Maker], near_seconds: float | None
    ) -> Iterator[Tried]:
        """Prices that spread over the front, then, by bisection, some whose policy takes about `near_seconds`."""
        unit = 1 / float(np.mean([row[-1] - row[0] for row in view.costs.seconds]))  # a second's worth in risk
        prices = [float(price) for price in unit * np.geomspace(1e-3, 3, PRICES)]
        tried = [(price, self.fitted(family, view, make(price))) for price in prices]
        yield from (each for _, each in tried)
        if near_seconds is None:
            return
        slow = [price for price, each in tried if each.seconds > near_seconds]
        fast = [price for price, each in tried if each.seconds <= near_seconds]
        if not slow or not fast:
            return
        low, high = max(slow), min(fast)
        for _ in range(BISECTIONS):
            price = (low * high) ** 0.5
            each = self.fitted(family, view, make(price))
            low, high = (price, high) if each.seconds > near_seconds else (low, price)
            yield each


def _seconds_a_decision(
    policy: Policy, logits_KNC: np.ndarray, problem: str, lengths_N: np.ndarray, batch: int
) -> float:
    """Of a sample at an exit: the median over some batches, all exits asked."""
    num_exits, num_samples = logits_KNC.shape[:2]
    seconds = []
    for start in range(0, min(DECISIONS * batch, num_samples), batch):
        here = slice(start, min(start + batch, num_samples))
        num_rows = here.stop - start
        began = time.perf_counter()
        decider = policy.start(num_rows, num_exits)
        for exit_index in range(policy.first_evidence(num_exits), num_exits):
            evidence = Evidence.from_logits(logits_KNC[exit_index - 1, here], problem, lengths_N[here])
            decider.update(exit_index, evidence)
        asked = num_exits - policy.first_evidence(num_exits) or 1
        seconds.append((time.perf_counter() - began) / (asked * num_rows))
    return median(seconds)


def exits_of(policy: LearnedPolicy, lessons: Lessons) -> np.ndarray:
    """Where each sample leaves: what `replay` says, from features that are there already."""
    num_early, num_samples = lessons.features_KNF.shape[:2]
    exit_N = np.full(num_samples, num_early + 1)
    seconds_NK = policy.seconds(lessons.lengths_N) if isinstance(policy, ScoredPolicy) else np.empty((num_samples, 0))
    for exit_index in range(num_early, 0, -1):
        if isinstance(policy, ScoredPolicy):
            leaves_N = policy.leaves(exit_index, lessons.features_KNF[exit_index - 1], seconds_NK)
        else:
            assert isinstance(policy, Thresholds) and lessons.confidence_KN is not None
            leaves_N = lessons.confidence_KN[exit_index - 1] >= policy.levels[exit_index - 1]
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


def _certified(tried: Sequence[Tried], certify_on: Transcript, goal: Goal, say: Say) -> tuple[Tried, dict[str, Any]]:
    """Pareto testing (Laufer-Goldenberg et al., ICLR 2023): the front of the tune split in order of its loss there,
    then tests on the certify split until one fails; the last that passed is the fastest.
    """
    about = certify_on.about
    ordered = front(tried)[::-1]  # the faster, the more it loses
    logits_KNC, truth_N = certify_on.logits_NKC.swapaxes(0, 1), certify_on.labels_N
    full_N = answer_at(logits_KNC, np.full(len(truth_N), len(logits_KNC)))
    assert goal.max_drop is not None
    epsilon, delta = goal.max_drop / 100, 1 - goal.confidence

    def answers(each: Tried) -> np.ndarray:
        exit_N = replay(each.policy, logits_KNC, about.problem, certify_on.lengths_N.astype(np.int64))
        return answer_at(logits_KNC, exit_N)

    say(f"certifying up to {len(ordered)} policies on {len(truth_N)} samples")
    if about.metrics == ("accuracy",):
        rows = [losses(truth_N, answers(each), full_N) for each in ordered]
        last = certify(rows, epsilon, delta, goal.method)
        risk = float(rows[last].mean())
        kind = "certified"
    else:
        last, risk = -1, 0.0
        for each in ordered:
            drop, bound = _bootstrapped_drop(about.metrics, truth_N, full_N, answers(each), goal.confidence)
            if bound > goal.max_drop:
                break
            last, risk = last + 1, drop / 100
        kind = "estimated"
    if last < 0:
        what = f"no policy is {kind} to lose at most {goal.max_drop:g} points on {len(truth_N)} samples"
        remedy = "allow a larger --max-drop, a smaller --confidence, or certify on more"
        raise RefusedError(what, certify_on.path, remedy)
    method = goal.method if kind == "certified" else "bootstrap"
    certificate = Certificate(method, epsilon, None if method == "crc" else delta, len(truth_N), risk)
    return ordered[last], {
        **asdict(certificate),
        "kind": kind,
        "split_sha256": about.data_sha256,
        "num_tested": last + 1,
    }


def _bootstrapped_drop(
    metrics: Sequence[str], truth_N: np.ndarray, full_N: np.ndarray, early_N: np.ndarray, confidence: float
) -> tuple[float, float]:
    """Points lost, and what is not exceeded with so much confidence, by the percentile bootstrap over samples."""
    generator = np.random.default_rng(0)
    draws = generator.integers(0, len(truth_N), (BOOTSTRAP_ROUNDS, len(truth_N)))

    def drop(draw: Any) -> float:
        values = [score(metrics, truth_N[draw], answer_N[draw])["score"] for answer_N in (full_N, early_N)]
        return values[0] - values[1]

    return drop(slice(None)), float(np.quantile([drop(draw) for draw in draws], confidence))


def _reachable(profile: DeviceProfile, lengths_N: np.ndarray, deadline_seconds: float | None) -> np.ndarray:
    """The deepest exit that each sample reaches before the deadline, nearly always; at least the first."""
    if deadline_seconds is None:
        return np.full(len(lengths_N), profile.num_exits)
    tails = Costs(profile.lengths, _growing(profile.seconds_p99))
    return np.maximum((tails.at(lengths_N) <= deadline_seconds).sum(axis=1), 1)


def _growing(table: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    """Rows whose values grow: tails are noisy."""
    return tuple(tuple((np.maximum.accumulate(row) + 1e-9 * np.arange(len(row))).tolist()) for row in table)


def _remembered(fit: Callable[[Lessons], Any]) -> Callable[[Lessons], Any]:
    """A fit that is not repeated for the same samples, which are told by their lengths and losses."""
    known: dict[Any, Any] = {}

    def remembered(lessons: Lessons) -> Any:
        key = (lessons.lengths_N.tobytes(), lessons.loss_KN.tobytes())
        if key not in known:
            known[key] = fit(lessons)
        return known[key]

    return remembered


def _require_usable(transcript: Transcript, certify_on: Transcript | None, profile: DeviceProfile, goal: Goal) -> None:
    about, num_exits = transcript.about, transcript.logits_NKC.shape[1]
    if num_exits == 1:
        what = "the model has one exit, there is nothing to tune"
        raise UsageError(what, transcript.path, "train exits: offramp train")
    if about.problem == MULTI_LABEL:
        raise UsageError("texts with several labels cannot be tuned yet", transcript.path, "name a policy")
    if profile.num_exits != num_exits:
        what = f"the profile has {profile.num_exits} exits, the transcript {num_exits}"
        raise RefusedError(what, transcript.path, "take the profile and the transcript of one store")
    if goal.max_drop is None:
        return
    if certify_on is None or certify_on.about.split == about.split:
        raise UsageError("no certify split to certify on", transcript.path.parent, "offramp eval --split tune,certify")
    if certify_on.about.model_sha256 != about.model_sha256 or certify_on.about.data_sha256 == about.data_sha256:
        what = "the certify split is of another model, or the tune split itself"
        raise UsageError(what, certify_on.path, "write both at once: offramp eval --split tune,certify")
    needed = samples_needed(goal.max_drop / 100, 1 - goal.confidence)
    if goal.method != "crc" and about.metrics == ("accuracy",) and len(certify_on.labels_N) < needed:
        what = f"the certify split has {len(certify_on.labels_N)} samples"
        told = f"{goal.max_drop:g} points at confidence {goal.confidence:g} need at least {needed}, without a fault"
        raise UsageError(what, certify_on.path, told)


def _require_possible(trials: Trials, goal: Goal) -> None:
    a_text = float(trials.profile.costs().at(trials.padded_N)[:, 0].mean())
    a_pass = a_text * trials.profile.batch
    for name, asked, smallest in (
        ("latency", goal.latency_seconds, a_text),
        ("deadline", goal.deadline_seconds, a_pass),
    ):
        if asked is not None and asked < smallest:
            raise BudgetError(
                f"a {name} of {format_duration(asked)} is below the first exit",
                f"which takes {format_duration(smallest)} in the mean",
                f"--{name} {smallest * 1.05e3:.3g}ms is about the smallest that would do",
            )
