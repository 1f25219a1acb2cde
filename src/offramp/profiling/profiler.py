"""The profiler: times whole passes through the real engine, to fill a device profile (`profile.py`).

Where each pass ends is drawn in turn, or stays the same for some time: caches keep the first layers from one short pass
to the next, the better the longer that goes on, so that it matters what came before.

Shapes: L lengths, K exits, P passes, B rows of a pass, S tokens of a row.
"""

from __future__ import annotations

import math
import random
import time
from typing import TYPE_CHECKING, Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from offramp.measure import TRACED_PASSES, median, percentile
from offramp.policies import Decider, Evidence, Policy
from offramp.policies.policy import Memoryless
from offramp.program.inputs import Batch
from offramp.runtime.profile import DeviceProfile, Table, fingerprint_of
from offramp.tasks.text import token_batch

if TYPE_CHECKING:
    from offramp.session.classifier import Classifier

MAX_SECONDS = 100.0
"""A profile takes two minutes at most, with what comes before the first pass, if each pass can be run once by then."""
NUM_ROUNDS = 16
_SWEEPS_IN_A_ROW, _PASSES_IN_A_ROW = 3, 18
"""Of all lengths to one exit, and passes, at least, before those to another."""
_FAR_OUT = 0.05
"""Of passes at either end, whose seconds say nothing of the caches."""
_MEMORY, _NEARBY = 6, 20
"""Passes that the caches remember, about; and passes to either side that tell how fast the machine was then."""
_REFITS = 3
"""Times that a line is drawn, and then what is far from it drawn in."""
_MOST_DRAWN_OUT, _SURE_ENOUGH = 3.0, 0.5
"""Of what heads take: no more than so often what lies between their instructions, and known to so much."""
_SLOWEST = 3.0
"""Times the median: a pass that was slower than that counts as so slow, since a few such would make a mean theirs."""
_AT_ONCE = TRACED_PASSES // 2
"""Passes, before their traces are read: that takes as long as a short pass, and drives its code out of caches."""
_COMMON_TOKENS = 2048
"""Of a vocabulary, which texts mostly consist of; their blocks are checked once."""

Cell = Tuple[int, int]
"""A length and an exit."""


class _Ran(NamedTuple):
    place: int
    """In the log."""
    kind: Tuple[int, int, int, int]
    """Its length, exit (0: rows leave one by one), rows, and first head."""
    seconds: float
    num_bytes: int
    """What its rows read."""
    pass_index: int


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
        profiler.run_round(began + max_seconds)
        elapsed = time.perf_counter() - began
        if number == 1:
            rounds = max(1, min(NUM_ROUNDS, int(max_seconds / elapsed)))
            what = f"{len(profiler.lengths)} lengths x {classifier.num_exits} exits"
            say(f"profiling {what}: {elapsed * rounds:.0f} s in all")
        if elapsed * (number + 1) / number > max_seconds:
            break
    return profiler.profile()


class Profiler:
    """Times passes of every length up to `longest` to every exit, in rounds. The classifier is `Scheduled`, and is
    open. If it was planned for several rows, passes of one row are timed too, and passes that rows leave one after
    another.
    """

    def __init__(self, classifier: Classifier, longest: int) -> None:
        assert isinstance(classifier.policy, Scheduled)
        self.classifier, self.policy = classifier, classifier.policy
        self.lengths, self.exits = profile_lengths(longest), tuple(range(1, classifier.num_exits + 1))
        self.num_rows, self.num_rounds = classifier.settings.num_rows, 0
        self._order = random.Random(0)
        self._log: List[_Ran] = []
        self._passes: List[_Ran] = []
        self._singles: List[_Ran] = []
        self._steps: Dict[Cell, List[float]] = {}
        self._heads: Dict[Cell, List[float]] = {}
        self._decisions: List[float] = []
        self._computes: Dict[Cell, List[float]] = {}
        self._single_heads: Dict[Cell, List[float]] = {}
        self._gathers: Dict[int, List[float]] = {}
        self._compared: List[Tuple[float, float]] = []
        self._reads: Dict[int, List[float]] = {}
        self._bytes: Dict[int, List[float]] = {}

    def run_round(self, until: float = math.inf) -> None:
        """One pass of each length to each exit, in a drawn order; then some, exit by exit, if the clock is not past
        `until`.
        """
        self._warm_up()
        exits: List[Optional[int]] = [*self.exits, None] if self.num_rows > 1 else [*self.exits]
        kinds = [(exit_index, self.num_rows) for exit_index in exits]
        kinds += [(exit_index, 1) for exit_index in self.exits if self.num_rows > 1]
        jobs = [(length, *kind) for kind in kinds for length in self.lengths]
        self._order.shuffle(jobs)
        num_drawn = len(jobs)
        self._order.shuffle(kinds)
        lengths = list(self.lengths) * max(_SWEEPS_IN_A_ROW, -(-_PASSES_IN_A_ROW // len(self.lengths)))
        for kind in kinds:
            self._order.shuffle(lengths)
            jobs += [(length, *kind) for length in lengths]
        for start in range(0, len(jobs), _AT_ONCE):
            if start < num_drawn or time.perf_counter() < until:
                self._add(jobs[start : start + _AT_ONCE])
        for place, length in enumerate(self.lengths):
            if place and time.perf_counter() > until:
                break
            self._compare_heads(length, (1, len(self.exits)))
            self._compare_heads(length, (len(self.exits), 1))
        self.num_rounds += 1

    def _warm_up(self) -> None:
        """First reads, arrays of every size, and what was in the caches before are no part of a pass in use."""
        for length in self.lengths:
            for num_rows in {self.num_rows, 1}:
                self._run(length, len(self.exits), num_rows)

    def _add(self, jobs: Sequence[Tuple[int, Optional[int], int]]) -> None:
        """Run passes, one right after another as in use, and then take them apart."""
        passes = [self._run(*job) for job in jobs]
        for (length, exit_index, num_rows), ran in zip(jobs, passes):
            spans = self.classifier.trace.spans(ran.pass_index)
            if exit_index is None:
                self._gathers.setdefault(length, []).extend(_all_seconds(spans, "gather"))
                continue
            if num_rows == 1:
                self._singles.append(ran)
                self._add_heads(self._single_heads, spans, length, exit_index)
            if num_rows == self.num_rows:
                self._passes.append(ran)
                self._bytes.setdefault(exit_index, []).append(ran.num_bytes / num_rows)
                self._take_apart(spans, length, exit_index)

    def _compare_heads(self, length: int, firsts: Tuple[int, int]) -> None:
        """Two passes of the whole model, with all heads and without, after one of this length."""
        last = len(self.exits)
        self._run(length, last, self.num_rows)
        found = {first: self._run(length, last, self.num_rows, first) for first in firsts}
        early = [span for span in self.classifier.trace.spans(found[1].pass_index) if span.stage < last]
        in_heads = sum(_all_seconds(early, "head") + _all_seconds(early, "decide"))
        self._compared.append((found[1].seconds - found[last].seconds, in_heads))

    def _run(self, length: int, exit_index: Optional[int], num_rows: int, first_head: int = 1) -> _Ran:
        classifier = self.classifier
        self.policy.exit_index, self.policy.first_head = exit_index, first_head
        classifier.gathering.always = exit_index is None
        began = time.perf_counter()
        batch = _like_inputs(classifier, num_rows, length, len(self._log))
        results = classifier.predict_batches([batch], began=began)
        num_bytes = sum(result.bytes_read for result in results)
        kind = (length, exit_index or 0, num_rows, first_head)
        self._log.append(_Ran(len(self._log), kind, classifier.latencies[-1], num_bytes, classifier.last_pass))
        return self._log[-1]

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

    def _add_heads(self, heads: Dict[Cell, List[float]], spans: Sequence[Any], length: int, exit_index: int) -> None:
        for stage in self.exits[: min(exit_index, len(self.exits) - 1)]:
            seconds = _seconds(spans, "head", stage) + _seconds(spans, "decide", stage)
            heads.setdefault((length, stage), []).append(seconds)

    def profile(self) -> DeviceProfile:
        """What the rounds so far come to."""
        before = self._before()
        among = float(np.mean([before[ran.place] for ran in self._passes]))
        after_seconds = self._after_seconds(before)

        def elsewhere(ran: _Ran) -> float:
            """What it would have taken after passes that are as long as those of the profile are in the mean."""
            return max(ran.seconds - after_seconds * (before[ran.place] - among), ran.seconds / 2)

        means = self._means(_by_cell(self._passes, elsewhere))
        tails = self._table(_by_cell(self._passes, lambda ran: ran.seconds), self.exits, 99)
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
            self._means(_by_cell(self._singles, elsewhere)),
            self._head_seconds(self._single_heads),
            tuple(median(self._gathers.get(length) or [0.0]) for length in self.lengths),
            after_seconds,
            math.exp(among),
            self.num_rounds,
            self._table(self._computes, self.exits, 99),
            self._table(self._heads, self.exits[:-1], 99),
            percentile(self._decisions or [0.0], 99),
        )

    def _head_seconds(self, heads: Dict[Cell, List[float]]) -> Table:
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

    def _before(self) -> List[float]:
        """Of each pass, the mean logarithm of the seconds that those before it usually take; the last weigh most."""
        by_kind: Dict[Tuple[int, ...], List[float]] = {}
        for ran in self._log:
            by_kind.setdefault(ran.kind, []).append(ran.seconds)
        usual = {kind: math.log(median(samples)) for kind, samples in by_kind.items()}
        before, found = usual[self._log[0].kind], []
        for ran in self._log:
            found.append(before)
            before += (usual[ran.kind] - before) / _MEMORY
        return found

    def _after_seconds(self, before: Sequence[float]) -> float:
        """By least squares within passes of one length to one exit, in parts of their seconds. Each pass is compared
        with those about it, since the machine drifts.
        """
        kinds = [ran.kind for ran in self._passes]
        cells = [np.array([place for place, each in enumerate(kinds) if each == kind]) for kind in sorted(set(kinds))]
        seen_P, usual_P = np.array([ran.seconds for ran in self._passes]), np.empty(len(kinds))
        for here in cells:
            usual_P[here] = np.median(seen_P[here])
        longer_P = np.array([before[ran.place] for ran in self._passes]) / usual_P
        longer_P = _less_like_and_near(longer_P, cells)
        spread, slope = float((longer_P**2).sum()), 0.0
        if spread < 1e-12 * float((1 / usual_P**2).sum()):
            return 0.0  # all passes take the same
        more_P = seen_P / usual_P
        for _ in range(_REFITS):
            kept_P = slope * longer_P + _without_far_out(more_P - slope * longer_P)
            slope = float(longer_P @ _less_like_and_near(kept_P, cells)) / spread
        return min(max(slope, 0.0), float(usual_P.min()) / 2)

    def _means(self, samples: Dict[Cell, List[float]]) -> Table:
        """[L, K], medians; those of an exit are drawn out to add up to all that was seen of it, but for the slowest."""
        medians = self._table(samples, self.exits, 50)
        above = []
        for column, stage in enumerate(self.exits):
            pairs = [(row[column], samples[length, stage]) for row, length in zip(medians, self.lengths)]
            seen = sum(min(seconds, _SLOWEST * middle) for middle, each in pairs for seconds in each)
            above.append(seen / sum(middle * len(each) for middle, each in pairs))
        return tuple(tuple(more * seconds for more, seconds in zip(above, row)) for row in medians)

    def _table(self, samples: Dict[Cell, List[float]], exits: Sequence[int], percent: float) -> Table:
        return tuple(tuple(percentile(samples[length, stage], percent) for stage in exits) for length in self.lengths)


def _like_inputs(classifier: Classifier, num_rows: int, length: int, number: int) -> Batch:
    """A batch that takes as long to encode and to read as one of texts, or of images; the tokens of each are others."""
    texts = classifier.store.program.texts
    if texts is None:
        return classifier.encoder.encode(list(classifier.encoder.sample) * num_rows)
    classifier.encoder.encode([" ".join(["a"] * (length - 2))] * num_rows)
    spread = min(texts.vocab_size, _COMMON_TOKENS)
    ids_BS = (np.arange(num_rows * length, dtype=np.int64).reshape(num_rows, length) * 17 + number * 131) % spread
    return token_batch(texts, ids_BS, np.ones_like(ids_BS), np.zeros_like(ids_BS))


def _by_cell(passes: Sequence[_Ran], seconds_of: Callable[[_Ran], float]) -> Dict[Cell, List[float]]:
    found: Dict[Cell, List[float]] = {}
    for ran in passes:
        found.setdefault(ran.kind[:2], []).append(seconds_of(ran))
    return found


def _without_far_out(values: np.ndarray) -> np.ndarray:
    """The same, those at either end drawn in."""
    return np.clip(values, *np.quantile(values, (_FAR_OUT, 1 - _FAR_OUT)))


def _less_like_and_near(values: np.ndarray, cells: Sequence[np.ndarray]) -> np.ndarray:
    """What is left of values when the means of their cells are taken off, and then of those about them."""
    places, values = np.arange(len(values)), values.copy()
    for here in cells:
        values[here] -= values[here].mean()
    first, end = np.maximum(places - _NEARBY, 0), np.minimum(places + _NEARBY + 1, len(values))
    sums = np.concatenate(([0.0], np.cumsum(values)))
    return values - (sums[end] - sums[first]) / (end - first)


def _seconds(spans: Sequence[Any], kind: str, stage: int) -> float:
    return sum(_all_seconds([span for span in spans if span.stage == stage], kind))


def _all_seconds(spans: Sequence[Any], kind: str) -> List[float]:
    return [span.end_seconds - span.start_seconds for span in spans if span.kind == kind]
