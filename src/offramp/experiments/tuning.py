"""Selection of the policy that meets a goal, on a transcript and without running the model.

Policies are evaluated on the tune split (`trials.py`). Certificates come from the certify split, which is not used for
the selection otherwise.

Shapes: K exits, N samples, C outputs of a head.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from offramp.errors import BudgetError, RefusedError, UsageError
from offramp.experiments.batching import padded
from offramp.experiments.children import Log
from offramp.experiments.evaluation import answer_at
from offramp.experiments.trials import Candidate, Trials, best_at, front, reachable
from offramp.measure.statistics import bootstrap
from offramp.policies import FullDepth, StopAt, replay
from offramp.policies.certify import Certificate, certify, is_certifiable, least_epsilon, losses, samples_needed
from offramp.policies.codec import to_json
from offramp.policies.evidence import MULTI_LABEL
from offramp.runtime.profile import DeviceProfile
from offramp.store.policy_file import PolicyFile, Prediction
from offramp.store.transcript import Transcript
from offramp.tasks.metrics import score
from offramp.units import format_duration, named_duration

BOOTSTRAP_ROUNDS = 300
MANY_SAMPLES = 100_000
"""Largest number of samples for which the requirement of `ucb` is computed: it allocates arrays of this size."""


@dataclass(frozen=True)
class Goal:
    """Requirements on a policy. At least one of latency, drop and deadline is given; raises UsageError otherwise."""

    latency_seconds: float | None = None
    """Mean latency of a text in seconds, its share of a batch: the policy with the best score within it is chosen."""
    max_drop: float | None = None
    """Points of the score that may be lost: the fastest policy with a certificate for this is chosen."""
    confidence: float = 0.9
    """Confidence of the certificate."""
    method: str = "ucb"
    """Method of the certificate, one of `policies.certify.METHODS`."""
    deadline_seconds: float | None = None
    """Deadline of each request in seconds, which a guard enforces at run time."""
    include_training_rows: bool = False
    """True to accept samples that the model was trained on."""

    def __post_init__(self) -> None:
        if self.latency_seconds is None and self.max_drop is None and self.deadline_seconds is None:
            raise UsageError("no goal", None, "give --latency, --max-drop or --deadline")
        if self.latency_seconds is not None and self.max_drop is not None:
            raise UsageError("two goals", None, "give --latency or --max-drop")
        if self.max_drop is not None and self.deadline_seconds is not None:
            what = "no drop can be certified under a deadline: what the guard stops depends on the load"
            raise UsageError(what, None, "give --max-drop or --deadline")
        if self.max_drop is not None and not 0 < self.max_drop < 100:
            raise UsageError(f"--max-drop {self.max_drop:g} is in points, above 0 and below 100")
        if not 0 < self.confidence < 1:
            raise UsageError(f"--confidence {self.confidence:g} is not between 0 and 1")


def tune(
    transcript: Transcript, certify_on: Transcript | None, profile: DeviceProfile, goal: Goal, log: Log
) -> tuple[PolicyFile, list[Candidate]]:
    """Return the policy that meets the goal, and for comparison the best of each family with the same latency.

    Raises UsageError for unsuitable splits, BudgetError for a latency or deadline below the first exit, RefusedError
    where no policy can be certified, NonFiniteError for a transcript with NaN.
    """
    _require_usable(transcript, certify_on, profile, goal)
    transcripts = [transcript] if certify_on is None else [transcript, certify_on]
    require_held_out(transcripts, goal)
    num_trained = _training_rows(transcripts, log)
    trials = Trials(transcript, profile, goal.deadline_seconds)
    _require_possible(trials, goal)
    candidates = list(trials.all(log, goal.latency_seconds))
    if goal.max_drop is not None:
        assert certify_on is not None
        chosen, certificate = _certified(candidates, certify_on, goal, log)
    else:
        chosen, certificate = trials.best_use_of(candidates, goal.latency_seconds or float("inf"), log), None
    families = {each.family: None for each in candidates}
    limit, about = chosen.seconds * 1.001, transcript.about
    rivals = [best_at([each for each in candidates if each.family == family], limit) for family in families]
    names = ("score", "loss", "seconds", "mean_exit", "bytes_read")
    reached = tuple(float((chosen.exit_N >= layer).mean()) for layer in range(1, trials.num_exits + 1))
    predicted = Prediction(**{name: getattr(chosen, name) for name in names}, reached=reached)
    tuned_on = {
        "task": about.task,
        "metrics": list(about.metrics),
        "tune_sha256": about.data_sha256,
        "certify_sha256": certify_on.about.data_sha256 if certify_on else None,
        "num_samples": len(trials.truth_N),
        "training_rows": num_trained,
        "max_length": about.max_length,
    }
    file = PolicyFile(
        to_json(chosen.policy),
        about.model_sha256,
        goal.deadline_seconds,
        predicted,
        certificate,
        tuned_on,
        profile.measured_on,
        [each.row() for each in front(candidates)],
    )
    return file, [each for each in rivals if each is not None]


def shortfall(file: PolicyFile, transcript: Transcript, profile: DeviceProfile) -> str | None:
    """Return how a policy that `tune` found misses its goal, or None: it saves nothing, or some texts are late."""
    if file.certificate is not None and file.policy == to_json(FullDepth()):
        return "no policy faster than the whole model keeps within the drop"
    if file.deadline_seconds is None:
        return None
    lengths_N = padded(transcript.lengths_N.astype(np.int64), profile.batch)
    late = float((reachable(profile, lengths_N, file.deadline_seconds) == 0).mean())
    deadline = format_duration(file.deadline_seconds)
    return f"{100 * late:.1f} % of the texts miss the deadline of {deadline} at every exit" if late else None


def _certified(
    candidates: Sequence[Candidate], certify_on: Transcript, goal: Goal, log: Log
) -> tuple[Candidate, dict[str, Any]]:
    """Return the fastest certified candidate and its certificate.

    Pareto testing (Laufer-Goldenberg et al., ICLR 2023): the full model, which loses nothing, and the faster candidates
    on the front of the tune split are ordered by their loss there, and tested on the certify split until a test fails.
    The last that passed is the fastest.
    """
    about = certify_on.about
    whole = next(each for each in candidates if isinstance(each.policy, FullDepth))
    faster = [each for each in front(candidates)[::-1] if each.seconds < whole.seconds]
    ordered = [whole, *faster]  # in order of increasing loss
    logits_KNC, truth_N = certify_on.logits_NKC.swapaxes(0, 1), certify_on.labels_N
    full_N = answer_at(logits_KNC, np.full(len(truth_N), len(logits_KNC)))
    assert goal.max_drop is not None
    epsilon, delta = goal.max_drop / 100, 1 - goal.confidence

    def answers(each: Candidate) -> np.ndarray:
        exit_N = replay(each.policy, logits_KNC, about.problem, certify_on.lengths_N.astype(np.int64))
        return answer_at(logits_KNC, exit_N)

    log(f"certifying up to {len(ordered)} policies on {len(truth_N)} samples")
    method = _method(about.metrics, goal)
    kind, last, risk = ("certified" if method == goal.method else "estimated"), -1, 0.0
    if kind == "certified":
        rows = [losses(truth_N, answers(each), full_N) for each in ordered]
        last = certify(rows, epsilon, delta, goal.method)
        risk = float(rows[last].mean())
    for each in ordered if kind == "estimated" else ():
        drop, bound = _bootstrapped_drop(about.metrics, truth_N, full_N, answers(each), goal.confidence)
        if bound > goal.max_drop:
            break
        last, risk = last + 1, drop / 100
    what = f"policy is {kind} to lose at most {goal.max_drop:g} points on {len(truth_N)} samples"
    allowed = _allowed(len(truth_N), goal.confidence, "ltt" if method == "bootstrap" else method)
    remedy = f"allow a larger --max-drop, a smaller --confidence, or certify on more ({allowed})"
    if last < 0:  # not even the full model
        raise RefusedError(f"no {what}", certify_on.path, remedy)
    if last == 0:
        log(f"no faster {what}: {remedy}")
    certificate = Certificate(method, epsilon, None if method == "crc" else delta, len(truth_N), risk)
    facts = {"kind": kind, "split_sha256": about.data_sha256, "num_tested": last + 1}
    return ordered[last], {**asdict(certificate), **facts}


def _bootstrapped_drop(
    metrics: Sequence[str], truth_N: np.ndarray, full_N: np.ndarray, early_N: np.ndarray, confidence: float
) -> tuple[float, float]:
    """Return the points lost and their upper bound at this confidence, by the percentile bootstrap over samples."""

    def drop(draw: np.ndarray) -> float:
        values = [score(metrics, truth_N[draw], answer_N[draw])["score"] for answer_N in (full_N, early_N)]
        return values[0] - values[1]

    whole, draws = bootstrap(drop, (len(truth_N),), BOOTSTRAP_ROUNDS)
    return whole, float(np.quantile(draws, confidence))


def _require_usable(transcript: Transcript, certify_on: Transcript | None, profile: DeviceProfile, goal: Goal) -> None:
    about, num_exits = transcript.about, transcript.logits_NKC.shape[1]
    if num_exits == 1:
        what = "the model has one exit, so there is nothing to tune"
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
    num_shared = _shared_rows(transcript, certify_on)
    if num_shared:
        what = f"{num_shared} rows of the certify split are in the tune split too"
        raise UsageError(what, certify_on.path, "write both at once: offramp eval --split tune,certify")
    num_samples, levels = len(certify_on.labels_N), (goal.max_drop / 100, 1 - goal.confidence)
    method = _method(about.metrics, goal)
    rule = "ltt" if method == "bootstrap" else method  # no method with a confidence needs fewer
    if is_certifiable(num_samples, *levels, rule):
        return
    fewest = samples_needed(*levels, "crc" if rule == "crc" else "ltt")
    needed = samples_needed(*levels, rule) if rule == "ucb" and fewest < MANY_SAMPLES else fewest
    more = f"certify on {needed} rows or more, of which none has a loss"
    more += f", or --method ltt, which needs no more than {fewest}" if needed > fewest else ""
    least = _least_drop(num_samples, goal.confidence, rule)
    what = f"{goal.max_drop:g} points cannot be certified: {_allowed(num_samples, goal.confidence, rule)}"
    raise UsageError(what, certify_on.path, f"give --max-drop {least:g}, or {more}" if least < 100 else more)


def _least_drop(num_samples: int, confidence: float, rule: str) -> float:
    """Return the points that `num_samples` can certify if none has a loss, rounded up to two digits."""
    points = 100 * least_epsilon(num_samples, 1 - confidence, rule)
    step = 10.0 ** (math.floor(math.log10(points)) - 1)
    return float(f"{math.ceil(points / step - 1e-6) * step:.4g}")


def _allowed(num_samples: int, confidence: float, rule: str) -> str:
    allows = "certified in the mean" if rule == "crc" else f"that {100 * confidence:g} % allows"
    return f"with {num_samples} rows the least drop {allows} is {_least_drop(num_samples, confidence, rule):g} points"


def _shared_rows(transcript: Transcript, other: Transcript) -> int:
    """Return the number of rows of `other` that are in `transcript`; 0 where it is unknown."""
    if transcript.rows_N is None or other.rows_N is None or transcript.about.row_salt != other.about.row_salt:
        return 0
    return int(np.isin(other.rows_N, transcript.rows_N).sum())


def require_held_out(transcripts: Sequence[Transcript], goal: Goal) -> None:
    """Raise UsageError for samples that the model was trained on, unless the goal accepts them."""
    for each in transcripts:
        if each.about.includes_training_rows and each.about.training_rows and not goal.include_training_rows:
            what = f"the model was trained on {each.about.training_rows} of {len(each.labels_N)} samples"
            remedy = "write the transcript without --include-training-rows, or give it here too"
            raise UsageError(what, each.path, remedy)


def _training_rows(transcripts: Sequence[Transcript], log: Log) -> int | None:
    """Return the number of samples that the model was trained on, or None if it is unknown."""
    total = 0
    for each in transcripts:
        if each.about.training_rows is None:
            log(f"{each.path}: the rows of the model's training are not recorded, so that samples may be among them")
            return None
        total += each.about.training_rows if each.about.includes_training_rows else 0
    return total


def _method(metrics: Sequence[str], goal: Goal) -> str:
    """Return the method of the certificate: the bootstrap where the metric is not a mean over samples."""
    return goal.method if tuple(metrics) == ("accuracy",) else "bootstrap"


def _require_possible(trials: Trials, goal: Goal) -> None:
    a_text = trials.rule(StopAt(1)).seconds
    a_pass = float(trials.profile.costs().at(trials.padded_N)[:, 0].mean()) * trials.profile.batch
    asked = (("latency", goal.latency_seconds, a_text), ("deadline", goal.deadline_seconds, a_pass))
    for name, seconds, smallest in asked:
        if seconds is not None and seconds < smallest:
            what = f"a {name} of {format_duration(seconds)} is below the first exit"
            remedy = f"--{name} {named_duration(1.05 * smallest)} is about the smallest that works"
            raise BudgetError(what, f"which takes {format_duration(smallest)} in the mean", remedy)
