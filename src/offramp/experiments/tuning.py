"""The verb tune: of all policies, the one that a goal asks for, found on a transcript without running the model.

Policies are tried on the tune split (`trials.py`). Certificates come from the certify split, which chooses nothing.

Shapes: K exits, N samples, C outputs of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from offramp.errors import BudgetError, RefusedError, UsageError
from offramp.experiments.evaluation import answer_at
from offramp.experiments.trials import Say, Trials, Tried, best_at, front
from offramp.policies import FullDepth, StopAt, replay
from offramp.policies.certify import Certificate, certify, losses, samples_needed
from offramp.policies.codec import to_json
from offramp.policies.evidence import MULTI_LABEL
from offramp.runtime.profile import DeviceProfile
from offramp.store.policy_file import PolicyFile
from offramp.store.transcript import Transcript
from offramp.tasks.metrics import score
from offramp.units import format_duration

BOOTSTRAP_ROUNDS = 300
MANY_SAMPLES = 100_000
"""What `ucb` needs is found by trying, which takes arrays of so many."""


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
        chosen = trials.best_use_of(tried, goal.latency_seconds or float("inf"), say)
    families = {each.family: None for each in tried}
    rivals = [best_at([each for each in tried if each.family == family], chosen.seconds * 1.001) for family in families]
    about = transcript.about
    predicted = {key: value for key, value in chosen.row().items() if key not in ("policy", "family")}
    predicted["reached"] = chosen.reached(trials.num_exits)
    file = PolicyFile(
        to_json(chosen.policy), about.model_sha256, goal.deadline_seconds,
        predicted, certificate,
        {"task": about.task, "metrics": list(about.metrics), "tune_sha256": about.data_sha256,
         "certify_sha256": certify_on.about.data_sha256 if certify_on else None, "num_samples": len(trials.truth_N)},
        profile.measured_on, [each.row() for each in front(tried)],
    )  # fmt: skip
    return file, [each for each in rivals if each is not None]


def _certified(tried: Sequence[Tried], certify_on: Transcript, goal: Goal, say: Say) -> tuple[Tried, dict[str, Any]]:
    """Pareto testing (Laufer-Goldenberg et al., ICLR 2023): all layers, which lose nothing, and what is faster of the
    front of the tune split, in order of its loss there; then tests on the certify split until one fails. The last that
    passed is the fastest.
    """
    about = certify_on.about
    whole = next(each for each in tried if isinstance(each.policy, FullDepth))
    faster = [each for each in front(tried)[::-1] if each.seconds < whole.seconds]
    ordered = [whole, *faster]  # the faster, the more it loses
    logits_KNC, truth_N = certify_on.logits_NKC.swapaxes(0, 1), certify_on.labels_N
    full_N = answer_at(logits_KNC, np.full(len(truth_N), len(logits_KNC)))
    assert goal.max_drop is not None
    epsilon, delta = goal.max_drop / 100, 1 - goal.confidence

    def answers(each: Tried) -> np.ndarray:
        exit_N = replay(each.policy, logits_KNC, about.problem, certify_on.lengths_N.astype(np.int64))
        return answer_at(logits_KNC, exit_N)

    say(f"certifying up to {len(ordered)} policies on {len(truth_N)} samples")
    method = _method(about.metrics, goal)
    if method == goal.method:
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
    what = f"policy is {kind} to lose at most {goal.max_drop:g} points on {len(truth_N)} samples"
    remedy = "allow a larger --max-drop, a smaller --confidence, or certify on more"
    if last < 0:  # not even what loses nothing
        raise RefusedError(f"no {what}", certify_on.path, remedy)
    if last == 0:
        say(f"no faster {what}: {remedy}")
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
    levels, method = (goal.max_drop / 100, 1 - goal.confidence), _method(about.metrics, goal)
    num_samples, least = len(certify_on.labels_N), samples_needed(*levels, "crc" if method == "crc" else "ltt")
    needed = samples_needed(*levels, method) if method == "ucb" and least < MANY_SAMPLES else least
    if num_samples < needed:
        told = f"{goal.max_drop:g} points at confidence {goal.confidence:g} need at least {least}, without a fault"
        more = "" if needed == least else f", and {needed} by {method}; --method ltt needs no more than {least}"
        raise UsageError(f"the certify split has {num_samples} samples", certify_on.path, told + more)


def _method(metrics: Sequence[str], goal: Goal) -> str:
    """Of the certificate: the bootstrap where the metric is no mean over samples."""
    return goal.method if tuple(metrics) == ("accuracy",) else "bootstrap"


def _require_possible(trials: Trials, goal: Goal) -> None:
    a_text = trials.rule(StopAt(1)).seconds
    a_pass = float(trials.profile.costs().at(trials.padded_N)[:, 0].mean()) * trials.profile.batch
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
