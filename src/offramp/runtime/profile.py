"""The device profile: what leaving at each exit takes on this machine, measured through the real engine.

Whole passes are timed, under the budget that the policy is for: what is resident, what prefetch hides and what it does
not is in them, and nothing is composed. Where each pass ends is drawn in turn, so that they follow one another as in
use. A profile is of one store, backend, budget and batch size on one machine; elsewhere it is refused.

Shapes: L lengths, K exits, B rows of a pass, S tokens of a row.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from offramp.errors import OfframpError, RefusedError, StoreError
from offramp.measure import median, percentile
from offramp.measure.hardware import environment
from offramp.policies import Decider, Evidence, Policy
from offramp.policies.costs import Costs, as_tuples
from offramp.policies.policy import Memoryless
from offramp.runtime.classifier import Classifier
from offramp.runtime.course import Arrays, Batch, Tokens
from offramp.store.memory import cache_folder
from offramp.store.policy_file import FORMAT, read_json, write_json

MAX_SECONDS = 100.0
"""A profile takes two minutes at most, with what comes before the first pass."""
NUM_ROUNDS, LEAST_ROUNDS = 15, 3
_REMEDY = "measure it again: offramp bench STORE --save-profile FILE"
_SHORTEST = 8
_COMMON_TOKENS = 2048
"""Of a vocabulary, which texts mostly consist of; their blocks are checked once."""

Table = Tuple[Tuple[float, ...], ...]


@dataclass(frozen=True)
class DeviceProfile:
    """Seconds of passes of `batch` rows that leave together; `costs` are those of a text. Rows of tables are lengths,
    columns exits, from the first to the last.
    """

    fingerprint: Dict[str, Any]
    """Machine, store, backend, batch size and plan."""
    lengths: Tuple[int, ...]
    seconds: Table
    """[L, K], from the texts to the answers of each exit, all heads before it included: the median."""
    seconds_p99: Table
    step_seconds_p99: Table
    """[L, K], from the answer of the exit before, or from the start, to this one."""
    head_seconds: Table
    """[L, K - 1], the head and the decision of each exit but the last: the median."""
    compute_seconds: Table
    """[L, K], of each layer: the median."""
    read_seconds: Tuple[float, ...]
    """[K], of each layer, hidden or not: the median; 0 where it was resident."""
    read_seconds_p99: Tuple[float, ...]
    bytes_read: Tuple[float, ...]
    """[K], of a text that leaves there: the median."""
    num_rounds: int

    @property
    def num_exits(self) -> int:
        """K."""
        return len(self.seconds[0])

    @property
    def batch(self) -> int:
        """Rows of a pass. The first profiles were all of one and did not say so."""
        return int(self.fingerprint.get("batch", 1))

    def costs(self, first_head: int = 1) -> Costs:
        """Seconds a text to each exit for a policy whose first head is `first_head`: a row's share of the pass."""
        rows = []
        for seconds_K, heads_K in zip(self.seconds, self.head_seconds):
            spared = sum(heads_K[: first_head - 1])
            row: List[float] = []
            for exit_index, seconds in enumerate(seconds_K, start=1):
                rest = seconds - (spared if exit_index >= first_head else sum(heads_K[: exit_index - 1]))
                share = rest / self.batch
                row.append(max(share, (row[-1] if row else 0.0) + 1e-7))  # noise must not turn the order round
            rows.append(tuple(row))
        return Costs(self.lengths, tuple(rows))

    def step_p99(self, exit_index: int, length: int) -> float:
        """Seconds of a pass from the exit before to this one, seldom exceeded: for a deadline guard."""
        column = [row[exit_index - 1] for row in self.step_seconds_p99]
        return float(np.interp(length, self.lengths, column))


class _Scheduled(Policy):
    """Leaves where it is told to; not for users."""

    def __init__(self) -> None:
        self.exit_index = 1

    def __str__(self) -> str:
        return "scheduled"

    def check(self, num_exits: int, problem: Optional[str]) -> None:
        """Makes sense on every model."""

    def earliest_exit(self, num_exits: int) -> int:
        return 1

    def last_exit(self, num_exits: int) -> int:
        return num_exits

    def start(self, num_rows: int, num_exits: int) -> Decider:
        return _Leave(self)


class _Leave(Memoryless):
    def __init__(self, policy: _Scheduled) -> None:
        self.policy = policy

    def update(self, exit_index: int, evidence: Evidence) -> np.ndarray:
        return np.full(evidence.num_rows, exit_index >= self.policy.exit_index)


def scheduled_policy() -> Policy:
    """The policy that a classifier to be profiled must have."""
    return _Scheduled()


def profile_lengths(longest: int) -> Tuple[int, ...]:
    """Powers of two from 8 on, and the longest itself."""
    powers = [1 << power for power in range(3, 20) if _SHORTEST <= 1 << power < longest]
    return (*powers, longest)


def measure_profile(
    classifier: Classifier,
    longest: int,
    say: Callable[[str], None],
    max_seconds: float = MAX_SECONDS,
) -> DeviceProfile:
    """Time passes of every length up to `longest` to every exit, with as many rows as the classifier was planned for.

    The classifier has `scheduled_policy`, and is open.
    """
    policy = classifier.policy
    assert isinstance(policy, _Scheduled)
    num_exits, lengths = classifier.num_exits, profile_lengths(longest)
    samples = _Samples(num_exits, lengths)
    order = random.Random(0)
    began, number = time.perf_counter(), 0
    for number in range(1, NUM_ROUNDS + 1):
        jobs = [(length, exit_index) for length in lengths for exit_index in range(1, num_exits + 1)]
        order.shuffle(jobs)
        for length, policy.exit_index in jobs:
            samples.add(classifier, length, policy.exit_index)
        elapsed = time.perf_counter() - began
        if number in (1, LEAST_ROUNDS):
            rounds = max(LEAST_ROUNDS, min(NUM_ROUNDS, int(max_seconds * number / elapsed)))
            say(f"profiling {len(lengths)} lengths x {num_exits} exits: {elapsed * rounds / number:.0f} s in all")
        if number >= LEAST_ROUNDS and elapsed * (number + 1) / number > max_seconds:
            break
    return samples.profile(fingerprint_of(classifier), number)


def machine() -> Dict[str, Any]:
    """What tells machines apart."""
    facts = environment()
    return {key: facts[key] for key in ("cpu_model", "num_cores", "platform", "total_memory_bytes")}


def fingerprint_of(classifier: Classifier) -> Dict[str, Any]:
    """What a profile holds for: another value of any of these, and it does not."""
    plan = classifier.plan
    return {
        **machine(),
        "backend": classifier.backend.name,
        "threads": classifier.backend.num_threads,
        "batch": classifier.settings.num_rows,
        "store_sha256": classifier.store.digest,
        "num_slots": plan.num_slots,
        "residents": len(plan.residents),
        "reads": "direct" if classifier.direct and plan.num_slots else "buffered",
    }


def save_profile(profile: DeviceProfile, path: Optional[Path] = None) -> None:
    """Keep it in a file, or, best effort, in the cache folder."""
    tree = {"format": FORMAT, **asdict(profile)}
    if path is not None:
        write_json(path, tree)
        return
    try:
        write_json(_cached(profile.fingerprint), tree)
    except (OSError, OfframpError):  # an unwritable cache is no error
        return


def load_profile(path: Path) -> DeviceProfile:
    """Read it from a file. Raises UsageError, StoreError, VersionError."""
    tree = read_json(path, "device profile", _REMEDY)
    try:
        fields = {name: as_tuples(tree[name]) for name in DeviceProfile.__dataclass_fields__}
        profile = DeviceProfile(**{**fields, "fingerprint": dict(tree["fingerprint"])})
        profile.costs()
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise StoreError(f"no device profile ({error})", path, _REMEDY) from None
    return profile


def cached_profile(fingerprint: Dict[str, Any], longest: int) -> Optional[DeviceProfile]:
    """The profile of this fingerprint in the cache folder, if it has inputs of this length."""
    try:
        profile = load_profile(_cached(fingerprint))
    except OfframpError:  # nothing there, or not ours: measured again
        return None
    fits = profile.fingerprint == fingerprint and profile.lengths[-1] >= longest
    return profile if fits else None


def require_here(profile: DeviceProfile, fingerprint: Dict[str, Any], where: object) -> None:
    """Raise RefusedError naming what differs, if a profile is of another machine, store, batch size or plan."""
    there = {**profile.fingerprint, "batch": profile.batch}
    other = [key for key in fingerprint if there.get(key) != fingerprint[key]]
    if other:
        told = ", ".join(f"{key} {there.get(key)!r} there, {fingerprint[key]!r} here" for key in other[:3])
        remedy = "measure this one: offramp bench STORE --save-profile FILE"
        raise RefusedError(f"the profile was measured elsewhere ({told})", where, remedy)


def _cached(fingerprint: Dict[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
    return cache_folder() / "profiles" / (key + ".json")


class _Samples:
    """Seconds as they were seen, a list for each length and exit."""

    def __init__(self, num_exits: int, lengths: Sequence[int]) -> None:
        self.lengths, self.exits, self.number = tuple(lengths), tuple(range(1, num_exits + 1)), 0
        self.totals: Dict[Tuple[int, int], List[float]] = {}
        self.steps: Dict[Tuple[int, int], List[float]] = {}
        self.heads: Dict[Tuple[int, int], List[float]] = {}
        self.computes: Dict[Tuple[int, int], List[float]] = {}
        self.reads: Dict[int, List[float]] = {}
        self.bytes: Dict[int, List[float]] = {}

    def add(self, classifier: Classifier, length: int, exit_index: int) -> None:
        """Run one pass, and take it apart."""
        began, self.number, num_rows = time.perf_counter(), self.number + 1, classifier.settings.num_rows
        batch = _like_inputs(classifier, num_rows, length, self.number)
        results = classifier.predict_batch(batch, began=began)
        self.totals.setdefault((length, exit_index), []).append(classifier.latencies[-1])
        self.bytes.setdefault(exit_index, []).append(sum(result.bytes_read for result in results) / num_rows)
        spans = [span for span in classifier.trace.spans() if span.pass_index == classifier.last_pass]
        ends = {span.stage: span.end_seconds for span in spans if span.kind in ("decide", "head")}
        previous = min(span.start_seconds for span in spans)
        for stage in self.exits:
            end = ends.get(stage if stage < len(self.exits) else stage + 1)  # the model's own head is a stage behind
            if end is not None:
                self.steps.setdefault((length, stage), []).append(end - previous)
                previous = end
        for stage in self.exits[:exit_index]:
            self.computes.setdefault((length, stage), []).append(_seconds(spans, "compute", stage))
            self.reads.setdefault(stage, []).append(
                _seconds(spans, "read", stage) + _seconds(spans, "idle_read", stage)
            )
            if stage < len(self.exits):
                head = _seconds(spans, "head", stage) + _seconds(spans, "decide", stage)
                self.heads.setdefault((length, stage), []).append(head)

    def profile(self, fingerprint: Dict[str, Any], num_rounds: int) -> DeviceProfile:
        """Medians and tails."""
        early = self.exits[:-1]
        return DeviceProfile(
            fingerprint,
            self.lengths,
            self._table(self.totals, self.exits, 50),
            self._table(self.totals, self.exits, 99),
            self._table(self.steps, self.exits, 99),
            self._table(self.heads, early, 50),
            self._table(self.computes, self.exits, 50),
            tuple(median(self.reads[stage]) for stage in self.exits),
            tuple(percentile(self.reads[stage], 99) for stage in self.exits),
            tuple(median(self.bytes[stage]) for stage in self.exits),
            num_rounds,
        )

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


def _seconds(spans: Sequence[Any], kind: str, stage: int) -> float:
    return sum(span.end_seconds - span.start_seconds for span in spans if (span.kind, span.stage) == (kind, stage))
