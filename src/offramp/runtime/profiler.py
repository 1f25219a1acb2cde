"""The profiler: times whole passes through the real engine, to fill a device profile (`profile.py`).

Where each pass ends is drawn in turn, so that they follow one another as in use.

Shapes: L lengths, K exits, B rows of a pass, S tokens of a row.
"""

from __future__ import annotations

import random
import time
from collections import deque
from typing import Any, Callable, Deque, Dict, List, Optional, Sequence, Tuple

import numpy as np

from offramp.measure import median, percentile
from offramp.policies import Decider, Evidence, Policy
from offramp.policies.policy import Memoryless
from offramp.runtime.classifier import Classifier
from offramp.runtime.course import Arrays, Batch, Tokens
from offramp.runtime.profile import DeviceProfile, Table, fingerprint_of

MAX_SECONDS = 100.0
"""A profile takes two minutes at most, with what comes before the first pass, but for the least rounds."""
NUM_ROUNDS, LEAST_ROUNDS = 25, 3
_FAR_OUT = 0.1
"""Of passes at either end, whose seconds say nothing of the caches."""
_PASSES_BEFORE, _NEARBY = 3, 15
"""Passes that the caches remember, and passes to either side that tell how fast the machine was in that moment."""
_MOST_DRAWN_OUT, _SURE_ENOUGH = 3.0, 0.5
"""Of what heads take: no more than so often what lies between their instructions, and known to so much."""
_SLOWEST = 3.0
"""Times the median: a pass that was slower than that counts as so slow, since a few such would make a mean theirs."""
_COMMON_TOKENS = 2048
"""Of a vocabulary, which texts mostly consist of; their blocks are checked once."""


class Scheduled(Policy):
    """Leaves where it is told to, or, told nothing, lets half of the rows go at each exit.

    The policy that a classifier to be profiled must have.
    """

    def __init__(self) -> None:
        self.exit_index: Optional[int] = 1
        self.first_head = 1

    def __str__(self) -> str:
        return "scheduled"

    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """Makes sense on every model."""

    def earliest_exit(self, num_exits: int) -> int:
        """The first one."""
        return 1

    def first_evidence(self, num_exits: int) -> int:
        """The first, or a later one, to see what passes without heads take."""
        return self.first_head

    def last_exit(self, num_exits: int) -> int:
        """The last one."""
        return num_exits

    def start(self, num_rows: int, num_exits: int) -> Decider:
        """A state without a memory."""
        return _Leave(self)


class _Leave(Memoryless):
    def __init__(self, policy: Scheduled) -> None:
        self.policy = policy

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        if self.policy.exit_index is None:
            return np.arange(evidence.num_rows) % 2 == 1
        return np.full(evidence.num_rows, exit_index >= self.policy.exit_index)


def profile_lengths(longest: int) -> Tuple[int, ...]:
    """Powers of two from 4 on, and the longest itself."""
    powers = [1 << power for power in range(2, 20) if 1 << power < longest]
    return (*powers, longest)


def measure_profile(
    classifier: Classifier,
    longest: int,
    say: Callable[[str], None],
    max_seconds: float = MAX_SECONDS,
) -> DeviceProfile:
    """Time passes of every length up to `longest` to every exit, with as many rows as the classifier was planned for.

    The classifier is `Scheduled`, and is open.
    """
    profiler = Profiler(classifier, longest)
    began = time.perf_counter()
    for number in range(1, NUM_ROUNDS + 1):
        profiler.run_round()
        elapsed = time.perf_counter() - began
        if number in (1, LEAST_ROUNDS):
            rounds = max(LEAST_ROUNDS, min(NUM_ROUNDS, int(max_seconds * number / elapsed)))
            what = f"{len(profiler.lengths)} lengths x {classifier.num_exits} exits"
            say(f"profiling {what}: {elapsed * rounds / number:.0f} s in all")
        if number >= LEAST_ROUNDS and elapsed * (number + 1) / number > max_seconds:
            break
    return profiler.profile()


class Profiler:
    """Times passes of every length up to `longest` to every exit, in rounds: seconds as they were seen, a list for each
    length and exit. The classifier is `Scheduled`, and is open. If it was planned for several rows, passes of
    one row are timed too, and passes that rows leave one after another.
    """

    def __init__(self, classifier: Classifier, longest: int) -> None:
        assert isinstance(classifier.policy, Scheduled)
        self.classifier, self.policy = classifier, classifier.policy
        self.lengths, self.exits = profile_lengths(longest), tuple(range(1, classifier.num_exits + 1))
        self.num_rows, self.num_rounds = classifier.settings.num_rows, 0
        self._number, self._order = 0, random.Random(0)
        self._totals: Dict[Tuple[int, int], List[float]] = {}
        self._singles: Dict[Tuple[int, int], List[float]] = {}
        self._steps: Dict[Tuple[int, int], List[float]] = {}
        self._heads: Dict[Tuple[int, int], List[float]] = {}
        self._decisions: List[float] = []
        self._computes: Dict[Tuple[int, int], List[float]] = {}
        self._single_heads: Dict[Tuple[int, int], List[float]] = {}
        self._gathers: Dict[int, List[float]] = {}
        self._compared: List[Tuple[float, float]] = []
        self._afters: List[Tuple[float, int, int, float]] = []
        self._last_exits: Deque[int] = deque([len(self.exits)] * _PASSES_BEFORE, maxlen=_PASSES_BEFORE)
        self._reads: Dict[int, List[float]] = {}
        self._bytes: Dict[int, List[float]] = {}

    def run_round(self) -> None:
        """One pass of each length to each exit, in a drawn order."""
        if not self.num_rounds:
            self._warm_up()
        several = self.num_rows > 1
        exits: Tuple[Optional[int], ...] = (*self.exits, None) if several else self.exits
        jobs = [(length, exit_index, self.num_rows) for length in self.lengths for exit_index in exits]
        jobs += [(length, exit_index, 1) for length in self.lengths for exit_index in self.exits if several]
        self._order.shuffle(jobs)
        for length, exit_index, num_rows in jobs:
            self._add(length, exit_index, num_rows)
        for length in self.lengths:
            self._compare_heads(length)
        self.num_rounds += 1

    def _warm_up(self) -> None:
        """First reads, and arrays of every size, are no part of a pass in use."""
        for length in self.lengths:
            for num_rows in {self.num_rows, 1}:
                self._run(length, len(self.exits), num_rows)

    def _add(self, length: int, exit_index: Optional[int], num_rows: int) -> None:
        """Run one pass, and take it apart."""
        seconds, spans, num_bytes = self._run(length, exit_index, num_rows)
        before = sum(self._last_exits) / _PASSES_BEFORE
        self._last_exits.append(exit_index or len(self.exits))
        if exit_index is None:
            self._gathers.setdefault(length, []).extend(_all_seconds(spans, "gather"))
            return
        if num_rows == 1:
            self._singles.setdefault((length, exit_index), []).append(seconds)
            self._add_heads(self._single_heads, spans, length, exit_index)
        if num_rows != self.num_rows:
            return
        self._totals.setdefault((length, exit_index), []).append(seconds)
        self._afters.append((before, length, exit_index, seconds))
        self._bytes.setdefault(exit_index, []).append(num_bytes / num_rows)
        self._take_apart(spans, length, exit_index)

    def _compare_heads(self, length: int) -> None:
        """Two passes of the whole model, with all heads and without, after one of this length; each first in turn."""
        last = len(self.exits)
        self._last_exits.extend([last] * _PASSES_BEFORE)
        firsts = (1, last) if self.num_rounds % 2 else (last, 1)
        self._run(length, last, self.num_rows)
        found = {first: self._run(length, last, self.num_rows, first) for first in firsts}
        early = [span for span in found[1][1] if span.stage < last]
        in_heads = sum(_all_seconds(early, "head") + _all_seconds(early, "decide"))
        self._compared.append((found[1][0] - found[last][0], in_heads))

    def _run(
        self, length: int, exit_index: Optional[int], num_rows: int, first_head: int = 1
    ) -> Tuple[float, List[Any], int]:
        """Seconds of one pass, its spans, and the bytes that its rows read."""
        classifier, self._number = self.classifier, self._number + 1
        self.policy.exit_index, self.policy.first_head = exit_index, first_head
        classifier.gathering.always = exit_index is None
        began = time.perf_counter()
        batch = _like_inputs(classifier, num_rows, length, self._number)
        results = classifier.predict_batch(batch, began=began)
        spans = [span for span in classifier.trace.spans() if span.pass_index == classifier.last_pass]
        return classifier.latencies[-1], spans, sum(result.bytes_read for result in results)

    def _take_apart(self, spans: Sequence[Any], length: int, exit_index: int) -> None:
        self._decisions += _all_seconds(spans, "decide")
        ends = {span.stage: span.end_seconds for span in spans if span.kind in ("decide", "head")}
        previous = min(span.start_seconds for span in spans)
        for stage in self.exits:
            end = ends.get(stage if stage < len(self.exits) else stage + 1)  # the model's own head is a stage behind
            if end is not None:
                self._steps.setdefault((length, stage), []).append(end - previous)
                previous = end
        for stage in self.exits[:exit_index]:
            self._computes.setdefault((length, stage), []).append(_seconds(spans, "compute", stage))
            self._reads.setdefault(stage, []).append(
                _seconds(spans, "read", stage) + _seconds(spans, "idle_read", stage)
            )
        self._add_heads(self._heads, spans, length, exit_index)

    def _add_heads(
        self, heads: Dict[Tuple[int, int], List[float]], spans: Sequence[Any], length: int, exit_index: int
    ) -> None:
        for stage in self.exits[: min(exit_index, len(self.exits) - 1)]:
            seconds = _seconds(spans, "head", stage) + _seconds(spans, "decide", stage)
            heads.setdefault((length, stage), []).append(seconds)

    def profile(self) -> DeviceProfile:
        """What the rounds so far come to."""
        means, tails = self._means(self._totals), self._table(self._totals, self.exits, 99)
        return DeviceProfile(
            fingerprint_of(self.classifier),
            self.lengths,
            means,
            tuple(tuple(map(max, mean_K, tail_K)) for mean_K, tail_K in zip(means, tails)),
            self._table(self._steps, self.exits, 99),
            self._head_seconds(self._heads),
            median(self._decisions or [0.0]),
            self._table(self._computes, self.exits, 50),
            tuple(median(self._reads[stage]) for stage in self.exits),
            tuple(percentile(self._reads[stage], 99) for stage in self.exits),
            tuple(median(self._bytes[stage]) for stage in self.exits),
            self._means(self._singles),
            self._head_seconds(self._single_heads),
            tuple(median(self._gathers.get(length) or [0.0]) for length in self.lengths),
            self._after_seconds(),
            self.num_rounds,
        )

    def _head_seconds(self, heads: Dict[Tuple[int, int], List[float]]) -> Table:
        """[L, K - 1]."""
        drawn_out, early = self._heads_drawn_out(), self.exits[:-1]
        return tuple(tuple(drawn_out * seconds for seconds in row) for row in self._table(heads, early, 50))

    def _heads_drawn_out(self) -> float:
        """What passes take less without heads, of what lies between the instructions of the heads; 1 if noise hides
        it.
        """
        less, in_heads = (np.array(column) for column in zip(*self._compared))
        if not in_heads.any():
            return 1.0
        less = _without_far_out(less)
        error = less.std() * np.sqrt(len(less)) / in_heads.sum()
        share = float(less.sum() / in_heads.sum())
        return min(max(share, 0.0), _MOST_DRAWN_OUT) if error < _SURE_ENOUGH else 1.0

    def _after_seconds(self) -> Tuple[float, ...]:
        """[K], by least squares on exits of the passes before, the machine's drift taken out; 0 if that may be none."""
        before, usual, seen = (np.array(column) for column in zip(*self._before_usual_seen()))
        nearby = [slice(max(place - _NEARBY, 0), place + _NEARBY + 1) for place in range(len(seen))]
        more = _without_far_out(seen - usual * np.array([np.median((seen / usual)[each]) for each in nearby]))
        mean_exit = before.mean()
        before -= mean_exit
        spread = float((before**2).sum())
        slope = float(before @ more) / spread if spread else 0.0
        error = float((more - more.mean() - slope * before).std()) / spread**0.5 if spread else 0.0
        if abs(slope) < 2 * error:
            slope = 0.0
        return tuple(slope * float(exit_index - mean_exit) for exit_index in self.exits)

    def _before_usual_seen(self) -> List[Tuple[float, float, float]]:
        """Of each pass: the mean exit of those before, the median of passes like it, and what it took."""
        medians = {cell: median(samples) for cell, samples in self._totals.items()}
        return [(before, medians[length, stage], seconds) for before, length, stage, seconds in self._afters]

    def _means(self, samples: Dict[Tuple[int, int], List[float]]) -> Table:
        """[L, K], medians; those of an exit are drawn out to add up to all that was seen of it, but for the slowest."""
        medians = self._table(samples, self.exits, 50)
        above = []
        for column, stage in enumerate(self.exits):
            pairs = [(row[column], samples[length, stage]) for row, length in zip(medians, self.lengths)]
            seen = sum(min(seconds, _SLOWEST * middle) for middle, each in pairs for seconds in each)
            above.append(seen / sum(middle * len(each) for middle, each in pairs))
        return tuple(tuple(more * seconds for more, seconds in zip(above, row)) for row in medians)

    def _table(self, samples: Dict[Tuple[int, int], List[float]], exits: Sequence[int], percent: float) -> Table:
        return tuple(tuple(percentile(samples[length, stage], percent) for stage in exits) for length in self.lengths)


def _like_inputs(classifier: Classifier, num_rows: int, length: int, number: int) -> Batch:
    """A batch that takes as long to encode and to read as one of texts, or of images; the tokens of each are others."""
    texts = classifier.texts
    if texts is None:
        return Arrays(classifier.encoder.encode(list(classifier.encoder.sample) * num_rows))
    classifier.encoder.encode([" ".join(["a"] * (length - 2))] * num_rows)
    spread = min(texts.vocab_size, _COMMON_TOKENS)
    ids_BS = (np.arange(num_rows * length, dtype=np.int64).reshape(num_rows, length) * 17 + number * 131) % spread
    return Tokens(ids_BS, np.ones_like(ids_BS), np.zeros_like(ids_BS))


def _without_far_out(values: np.ndarray) -> np.ndarray:
    """The same, those at either end drawn in."""
    return np.clip(values, *np.quantile(values, (_FAR_OUT, 1 - _FAR_OUT)))


def _seconds(spans: Sequence[Any], kind: str, stage: int) -> float:
    return sum(_all_seconds([span for span in spans if span.stage == stage], kind))


def _all_seconds(spans: Sequence[Any], kind: str) -> List[float]:
    return [span.end_seconds - span.start_seconds for span in spans if span.kind == kind]
