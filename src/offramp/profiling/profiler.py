"""Measurement of device profiles: whole passes through the real engine are timed (`runtime.profile` holds the result).

The latency of a pass depends on the passes before it, because CPU caches keep the first layers from one short pass to
the next. The exit of each pass is therefore drawn at random for some passes, and kept constant for others.

Shapes: L lengths, K exits, P passes, B rows of a pass, S tokens of a row.
"""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Callable, DefaultDict, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from offramp.measure import MOST_SPANS, TRACED_PASSES, median, percentile
from offramp.policies import Evidence
from offramp.policies.policy import MemorylessPolicy
from offramp.program.inputs import Batch
from offramp.program.program import Program
from offramp.runtime.profile import DeviceProfile, Table, cached_profile, fingerprint_of, save_profile
from offramp.tasks.text import token_batch
from offramp.units import format_duration

if TYPE_CHECKING:
    from offramp.session.classifier import Classifier

MAX_SECONDS = 100.0
"""Time limit of the rounds in seconds; with start-up, a profile takes at most two minutes if one round fits."""
NUM_ROUNDS = 16
_SWEEPS_IN_A_ROW, _PASSES_IN_A_ROW = 3, 18
"""Minimum numbers of sweeps over all lengths, and of passes, to one exit before the next exit."""
_WINSORIZED = 0.05
"""Fraction of the slowest and fastest passes that are clipped in the model of the caches."""
_CACHE_PASSES, _NEARBY = 6, 20
"""Time constant of the caches in passes, and the number of passes on either side used to estimate machine speed."""
_REFITS = 3
"""Number of fits of the cache model, each after clipping the residuals of the one before."""
_MAX_HEAD_FACTOR, _MAX_HEAD_ERROR = 3.0, 0.5
"""Upper bound on the ratio of measured head time to its kernel time, and the relative standard error below which the
ratio is used."""
_SLOWEST = 3.0
"""Bound on a pass in multiples of the median; slower ones count as this, so that a few do not dominate the mean."""
_PASSES_AT_ONCE = TRACED_PASSES // 2
"""Passes that run before their traces are read, since reading takes as long as a short pass and evicts its code."""
_COMMON_TOKENS = 2048
"""Number of token ids used, as few as common texts use; each block of their embeddings is verified once."""

Log = Callable[[str], None]
Samples = Dict[Tuple[int, ...], List[float]]
"""A length and an exit, or one of the two -> measurements."""


class _Pass(NamedTuple):
    place: int
    """Index in the log."""
    kind: Tuple[int, int, int, int]
    """Length, exit (0: rows leave one by one), rows, and first head."""
    seconds: float
    num_bytes: int
    """Bytes read for all rows."""
    trace_index: int


class Scheduled(MemorylessPolicy):
    """Policy of a profiled classifier: all rows leave at `exit_index`; if it is None, half of them at each exit.

    No head before `first_head` is evaluated. It has no state of a batch, and is its own decider.
    """

    def __init__(self) -> None:
        self.exit_index: Optional[int] = 1
        self.first_head = 1

    def __str__(self) -> str:
        return "scheduled"

    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """Accept every model."""

    def earliest_exit(self, num_exits: int) -> int:
        """Return the first exit."""
        return 1

    def first_evidence(self, num_exits: int) -> int:
        """Return `first_head`: a later one measures passes without heads."""
        return self.first_head

    def last_exit(self, num_exits: int) -> int:
        """Return the last exit."""
        return num_exits

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        """Return the rows that leave at this exit."""
        if self.exit_index is None:
            return np.arange(evidence.num_rows) % 2 == 1
        return np.full(evidence.num_rows, exit_index >= self.exit_index)


def passes_at_once(program: Program) -> int:
    """Return how many passes run before their traces are read: no more than an engine keeps, with the next one."""
    most_spans = sum(2 + 2 * len(step.shards) for step in program.steps()) + 4 * len(program.layers)
    return max(min(_PASSES_AT_ONCE, MOST_SPANS // most_spans - 1), 1)


def profile_lengths(longest: int) -> Tuple[int, ...]:
    """Return the lengths to profile: the powers of two from 4 on, and `longest`."""
    powers = [1 << power for power in range(2, 20) if 1 << power < longest]
    return (*powers, longest)


def device_profile(classifier: Classifier, longest: int, log: Log, recall: bool = False) -> DeviceProfile:
    """Return the profile of a planned classifier whose policy is `Scheduled`, and keep it in the cache folder.

    `recall`: return the cached profile if there is one for inputs of `longest` tokens.
    """
    profile = cached_profile(fingerprint_of(classifier), longest) if recall else None
    if profile is None:
        with classifier:
            profile = measure_profile(classifier, longest, log)
        save_profile(profile)
    return profile


def measure_profile(classifier: Classifier, longest: int, log: Log, max_seconds: float = MAX_SECONDS) -> DeviceProfile:
    """Time passes of every length up to `longest` to every exit, with the rows that the classifier was planned for.

    The classifier is open, and its policy is `Scheduled`.
    """
    profiler = Profiler(classifier, longest)
    began = time.perf_counter()
    for number in range(1, NUM_ROUNDS + 1):
        profiler.run_round(began + max_seconds)
        elapsed = time.perf_counter() - began
        if number == 1:
            rounds = max(1, min(NUM_ROUNDS, int(max_seconds / elapsed)))
            what = f"{len(profiler.lengths)} lengths x {classifier.num_exits} exits"
            log(f"profiling {what}: {format_duration(elapsed * rounds)} in all")
        if elapsed * (number + 1) / number > max_seconds:
            break
    return profiler.profile()


class Profiler:
    """Times passes of every length up to `longest` to every exit, in rounds.

    The classifier is open, and its policy is `Scheduled`. If it was planned for several rows, passes of one row and
    passes whose rows leave one after another are timed as well.
    """

    def __init__(self, classifier: Classifier, longest: int) -> None:
        assert isinstance(classifier.policy, Scheduled)
        self.classifier, self.policy = classifier, classifier.policy
        self.lengths, self.exits = profile_lengths(longest), tuple(range(1, classifier.num_exits + 1))
        self.num_rows, self.num_rounds = classifier.settings.num_rows, 0
        self._order = random.Random(0)
        self._log: List[_Pass] = []
        self._passes: List[_Pass] = []
        self._singles: List[_Pass] = []
        self._samples: DefaultDict[str, Samples] = defaultdict(lambda: defaultdict(list))
        """Name of a measurement -> its samples; those of stages by length and stage."""
        self._decisions: List[float] = []
        self._compared: List[Tuple[float, float]] = []

    def run_round(self, until: float = math.inf) -> None:
        """Run one pass of each length to each exit in random order; then passes exit by exit until the time `until`
        (time.perf_counter seconds).
        """
        for length in self.lengths:  # first reads, allocations and cold caches are not part of normal passes
            for num_rows in {self.num_rows, 1}:
                self._run(length, len(self.exits), num_rows)
        kinds: List[Tuple[Optional[int], int]] = [(exit_index, self.num_rows) for exit_index in self.exits]
        if self.num_rows > 1:
            kinds += [(None, self.num_rows), *((exit_index, 1) for exit_index in self.exits)]
        jobs = [(length, *kind) for kind in kinds for length in self.lengths]
        self._order.shuffle(jobs)
        num_drawn = len(jobs)
        self._order.shuffle(kinds)
        lengths = list(self.lengths) * max(_SWEEPS_IN_A_ROW, -(-_PASSES_IN_A_ROW // len(self.lengths)))
        for kind in kinds:
            self._order.shuffle(lengths)
            jobs += [(length, *kind) for length in lengths]
        at_once = passes_at_once(self.classifier.schedule.program)
        for start in range(0, len(jobs), at_once):
            if start < num_drawn or time.perf_counter() < until:
                self._add(jobs[start : start + at_once])
        for place, length in enumerate(self.lengths):
            if place and time.perf_counter() > until:
                break
            self._compare_heads(length, (1, len(self.exits)))
            self._compare_heads(length, (len(self.exits), 1))
        self.num_rounds += 1

    def _add(self, jobs: Sequence[Tuple[int, Optional[int], int]]) -> None:
        """Run passes back to back, as in use, and then evaluate their traces."""
        for ran in [self._run(*job) for job in jobs]:
            length, exit_index, num_rows, _ = ran.kind
            spans = self.classifier.trace.spans(ran.trace_index)
            if not exit_index:
                self._samples["gather"][length,] += _seconds(spans, "gather")
                continue
            if num_rows == 1:
                self._singles.append(ran)
                self._add_heads("single head", spans, length, exit_index)
            if num_rows == self.num_rows:
                self._passes.append(ran)
                self._samples["bytes"][exit_index,].append(ran.num_bytes / num_rows)
                self._take_apart(spans, length, exit_index)

    def _compare_heads(self, length: int, firsts: Tuple[int, int]) -> None:
        """Time two whole passes, with all heads and without, after one pass of this length."""
        last = len(self.exits)
        self._run(length, last, self.num_rows)
        found = {first: self._run(length, last, self.num_rows, first) for first in firsts}
        early = [span for span in self.classifier.trace.spans(found[1].trace_index) if span.stage < last]
        saved = found[1].seconds - found[last].seconds
        self._compared.append((saved, sum(_seconds(early, "head", "decide"))))

    def _run(self, length: int, exit_index: Optional[int], num_rows: int, first_head: int = 1) -> _Pass:
        classifier = self.classifier
        self.policy.exit_index, self.policy.first_head = exit_index, first_head
        classifier.gathering.always = exit_index is None
        began = time.perf_counter()
        batch = _like_inputs(classifier, num_rows, length, len(self._log))
        results = classifier.predict_batches([batch], began=began)
        num_bytes = sum(result.bytes_read for result in results)
        kind = (length, exit_index or 0, num_rows, first_head)
        assert classifier.feed is not None, "it has just run"
        last_pass = classifier.feed.pass_index - 1
        self._log.append(_Pass(len(self._log), kind, classifier.latencies[-1], num_bytes, last_pass))
        return self._log[-1]

    def _take_apart(self, spans: Sequence[Any], length: int, exit_index: int) -> None:
        self._decisions += _seconds(spans, "decide")
        ends = {span.stage: span.end_seconds for span in spans if span.kind in ("decide", "head")}
        previous = min(span.start_seconds for span in spans)
        for stage in self.exits:
            end = ends.get(stage if stage < len(self.exits) else stage + 1)  # the head of the model is one stage later
            if end is not None:
                self._samples["step"][length, stage].append(end - previous)
                previous = end
        for stage in self.exits[:exit_index]:
            self._samples["compute"][length, stage].append(sum(_seconds(spans, "compute", stage=stage)))
            self._samples["read"][stage,].append(sum(_seconds(spans, "read", "idle_read", stage=stage)))
        self._add_heads("head", spans, length, exit_index)

    def _add_heads(self, name: str, spans: Sequence[Any], length: int, exit_index: int) -> None:
        for stage in self.exits[: min(exit_index, len(self.exits) - 1)]:
            self._samples[name][length, stage].append(sum(_seconds(spans, "head", "decide", stage=stage)))

    def profile(self) -> DeviceProfile:
        """Return the profile of the rounds so far."""
        before = self._before()
        among = float(np.mean([before[ran.place] for ran in self._passes]))
        after_seconds = self._after_seconds(before)

        def adjusted(ran: _Pass) -> float:
            """Return the latency of a pass as if the passes before it had the mean latency of the profile."""
            return max(ran.seconds - after_seconds * (before[ran.place] - among), ran.seconds / 2)

        means = self._means(_by_kind(self._passes, adjusted))
        tails = self._table(_by_kind(self._passes, lambda ran: ran.seconds), 99)
        reads, num_bytes = ([self._samples[name][stage,] for stage in self.exits] for name in ("read", "bytes"))
        gathers = [self._samples["gather"][length,] for length in self.lengths]
        decisions = self._decisions or [0.0]
        return DeviceProfile(
            fingerprint_of(self.classifier),
            self.lengths,
            means,
            tuple(tuple(map(max, mean_K, tail_K)) for mean_K, tail_K in zip(means, tails)),
            self._table(self._samples["step"], 99),
            self._head_seconds("head"),
            median(decisions),
            self._table(self._samples["compute"], 50),
            tuple(map(median, reads)),
            tuple(percentile(seconds, 99) for seconds in reads),
            tuple(map(median, num_bytes)),
            self._means(_by_kind(self._singles, adjusted)),
            self._head_seconds("single head"),
            tuple(median(seconds or [0.0]) for seconds in gathers),
            after_seconds,
            math.exp(among),
            self.num_rounds,
            self._table(self._samples["compute"], 99),
            self._table(self._samples["head"], 99, self.exits[:-1]),
            percentile(decisions, 99),
        )

    def _head_seconds(self, name: str) -> Table:
        """Return the cost of heads [L, K - 1]: medians of their kernel times, scaled by the measured overhead."""
        factor, medians = self._head_overhead_factor(), self._table(self._samples[name], 50, self.exits[:-1])
        return tuple(tuple(factor * seconds for seconds in row) for row in medians)

    def _head_overhead_factor(self) -> float:
        """Return the ratio of the time saved by omitting heads to their kernel time; 1 if noise hides it."""
        saved, in_heads = (np.array(column) for column in zip(*self._compared))
        if not in_heads.any():
            return 1.0
        saved = _winsorize(saved)
        error = saved.std() * np.sqrt(len(saved)) / in_heads.sum()
        factor = float(saved.sum() / in_heads.sum())
        return min(max(factor, 0.0), _MAX_HEAD_FACTOR) if error < _MAX_HEAD_ERROR else 1.0

    def _before(self) -> List[float]:
        """Return for each pass the exponentially weighted mean logarithm of the usual seconds of earlier passes."""
        by_kind = _by_kind(self._log, lambda ran: ran.seconds, 4)
        usual = {kind: math.log(median(seconds)) for kind, seconds in by_kind.items()}
        before, found = usual[self._log[0].kind], []
        for ran in self._log:
            found.append(before)
            before += (usual[ran.kind] - before) / _CACHE_PASSES
        return found

    def _after_seconds(self, before: Sequence[float]) -> float:
        """Estimate `DeviceProfile.after_seconds` by least squares within passes of one length to one exit.

        Residuals are relative to the usual seconds, and to nearby passes, since the speed of the machine drifts.
        """
        kinds = [ran.kind for ran in self._passes]
        cells = [np.array([place for place, each in enumerate(kinds) if each == kind]) for kind in sorted(set(kinds))]
        seen_P, usual_P = np.array([ran.seconds for ran in self._passes]), np.empty(len(kinds))
        for here in cells:
            usual_P[here] = np.median(seen_P[here])
        longer_P = _detrend(np.array([before[ran.place] for ran in self._passes]) / usual_P, cells)
        spread, slope = float((longer_P**2).sum()), 0.0
        if spread < 1e-12 * float((1 / usual_P**2).sum()):
            return 0.0  # all passes have the same latency
        more_P = seen_P / usual_P
        for _ in range(_REFITS):
            kept_P = slope * longer_P + _winsorize(more_P - slope * longer_P)
            slope = float(longer_P @ _detrend(kept_P, cells)) / spread
        return min(max(slope, 0.0), float(usual_P.min()) / 2)

    def _means(self, samples: Samples) -> Table:
        """Return medians [L, K], scaled per exit so that their sum is that of all samples, the slowest clipped."""
        medians = self._table(samples, 50)
        above = []
        for column, stage in enumerate(self.exits):
            pairs = [(row[column], samples[length, stage]) for row, length in zip(medians, self.lengths)]
            seen = sum(min(seconds, _SLOWEST * middle) for middle, each in pairs for seconds in each)
            above.append(seen / sum(middle * len(each) for middle, each in pairs))
        return tuple(tuple(more * seconds for more, seconds in zip(above, row)) for row in medians)

    def _table(self, samples: Samples, percent: float, exits: Optional[Sequence[int]] = None) -> Table:
        """Return a percentile of the samples of each length and exit, or of some exits."""
        stages = self.exits if exits is None else exits
        return tuple(tuple(percentile(samples[length, stage], percent) for stage in stages) for length in self.lengths)


def _like_inputs(classifier: Classifier, num_rows: int, length: int, number: int) -> Batch:
    """Return a batch of new tokens, after encoding inputs of the same length as a real batch would be."""
    texts = classifier.store.program.texts
    if texts is None:
        return classifier.encoder.encode([classifier.encoder.sample[0]] * num_rows)
    classifier.encoder.encode([" ".join(["a"] * (length - 2))] * num_rows)
    spread = min(texts.vocab_size, _COMMON_TOKENS)
    ids_BS = (np.arange(num_rows * length, dtype=np.int64).reshape(num_rows, length) * 17 + number * 131) % spread
    return token_batch(texts, ids_BS, np.ones_like(ids_BS), np.zeros_like(ids_BS))


def _by_kind(passes: Sequence[_Pass], seconds_of: Callable[[_Pass], float], size: int = 2) -> Samples:
    """Return the seconds of passes by the first `size` parts of their kinds: by length and exit."""
    found: Samples = defaultdict(list)
    for ran in passes:
        found[ran.kind[:size]].append(seconds_of(ran))
    return found


def _winsorize(values: np.ndarray) -> np.ndarray:
    """Clip values to the quantiles _WINSORIZED and 1 - _WINSORIZED."""
    return np.clip(values, *np.quantile(values, (_WINSORIZED, 1 - _WINSORIZED)))


def _detrend(values: np.ndarray, cells: Sequence[np.ndarray]) -> np.ndarray:
    """Subtract the mean of its cell from each value, and then the mean of the nearby values."""
    places, values = np.arange(len(values)), values.copy()
    for here in cells:
        values[here] -= values[here].mean()
    first, end = np.maximum(places - _NEARBY, 0), np.minimum(places + _NEARBY + 1, len(values))
    sums = np.concatenate(([0.0], np.cumsum(values)))
    return values - (sums[end] - sums[first]) / (end - first)


def _seconds(spans: Sequence[Any], *kinds: str, stage: Optional[int] = None) -> List[float]:
    """Return the seconds of spans of some kinds, of one stage or of all."""
    return [
        span.end_seconds - span.start_seconds for span in spans if span.kind in kinds and stage in (None, span.stage)
    ]
