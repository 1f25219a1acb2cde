"""`Classifier`: inputs in, results out, under a budget; safe from several threads.

It is given a store, a backend, an encoder of inputs and a policy. It does not choose them.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Callable, Deque, Dict, Iterable, List, Optional, Sequence, Tuple

from offramp import measure
from offramp.errors import StoreError, UsageError
from offramp.forks import Forked
from offramp.measure import PeakMeter, Trace
from offramp.policies import Policy
from offramp.program.inputs import Batch, InputEncoder
from offramp.runtime.backend import Backend
from offramp.runtime.config import EngineConfig
from offramp.runtime.engine import Engine
from offramp.runtime.exits import load_exits
from offramp.runtime.feed import WeightFeed
from offramp.runtime.footprint import trim_memory
from offramp.runtime.gate import ExitGate, Gathering
from offramp.runtime.guard import NO_DEADLINE, Guard
from offramp.runtime.inputs import InputReader
from offramp.runtime.ledger import BUDGET, CONTAINER, LEDGER, Limit, Share, system_limit
from offramp.runtime.memory_model import SMALL_LENGTH, Footprint, MemoryModel, Workload
from offramp.runtime.planner import UNRESTRICTED, Plan, Strategy
from offramp.runtime.run_plan import Reads, allocate, choose_reads, make_run_plan, plan_items
from offramp.runtime.schedule import Schedule
from offramp.runtime.sweep import Outcome, PassCost
from offramp.session.bulk import bulk_batches
from offramp.session.containers import ContainerWatch
from offramp.session.lengths import require_feasible
from offramp.session.records import plan_record, run_record
from offramp.session.requests import require_several, stream_results
from offramp.session.results import Result, result_of
from offramp.store import Store
from offramp.store.files import notice
from offramp.store.upcasting import staging_bytes
from offramp.units import format_size

if TYPE_CHECKING:
    from typing import Iterator, Literal, overload


@dataclass(frozen=True)
class Settings:
    """Options of a classifier. Sizes are in bytes."""

    budget_bytes: int
    """Most memory of the process: the budget, or less where `limited_by` says so."""
    num_rows: int = 1
    """Rows of a batch."""
    length: Optional[int] = None
    """Tokens of the longest expected input; None: the limit of the encoder."""
    reads: str = "auto"
    own_process: bool = False
    """The process serves only this classifier: the budget holds from its start, not from here."""
    is_bulk: bool = False
    """Texts of similar length run together, limited by the memory of the plan."""
    num_batches: int = 1
    """Batches that share a sweep over the weights in bulk mode."""
    encoding_bytes: int = 0
    """Memory for encoding the largest input, such as decoding an image; 0 if negligible."""
    num_inputs: Optional[int] = None
    """Number of inputs, if they are known: bulk mode plans for no more."""
    reached: Tuple[float, ...] = ()
    """Share of rows that reach each layer, if known: shards that are used most become resident. Empty: all rows."""
    config: Optional[EngineConfig] = None
    """Options that these settings were made from, for records."""
    limited_by: str = BUDGET
    """Source of `budget_bytes`, one of those in `ledger`."""
    margin_bytes: int = 0
    """Part of the limit of a container that is left to the kernel, beside `budget_bytes`."""

    @property
    def strategy(self) -> Strategy:
        """Restriction of the plans that are compared."""
        config = self.config
        return UNRESTRICTED if config is None else Strategy(config.residency, config.slots, config.resident_layers)

    @property
    def reads_ahead(self) -> bool:
        """True unless the read of a shard starts when its step is due."""
        return self.config is None or (self.config.prefetch and not self.config.is_list)

    def __post_init__(self) -> None:
        for name in ("num_rows", "num_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def limit(self) -> Limit:
        """Most memory of the process, and what sets it."""
        return Limit(self.budget_bytes, self.limited_by, margin_bytes=self.margin_bytes)


@dataclass
class RunCounts:
    """Counts of a run since `open`."""

    latencies: Deque[float] = field(default_factory=lambda: deque(maxlen=65536))
    seconds: float = 0.0
    num_inputs: int = 0
    num_cut: int = 0
    """Rows that the deadline ended."""
    num_late: int = 0
    """Rows whose answer came after the deadline."""
    num_stages: int = 0
    """Layers that were run, summed over rows."""

    def add(self, seconds: float, outcomes: Sequence[Outcome], deadline_seconds: Optional[float]) -> None:
        """Count one request."""
        self.latencies.append(seconds)
        self.seconds, self.num_inputs = self.seconds + seconds, self.num_inputs + len(outcomes)
        self.num_cut += sum(outcome.is_cut for outcome in outcomes)
        self.num_late += len(outcomes) if deadline_seconds is not None and seconds > deadline_seconds else 0
        self.num_stages += sum(outcome.exit_stage for outcome in outcomes)


class Classifier(Forked):
    """Classifies inputs with a store. A context manager; `close` frees the weights and ends all threads.

    In the child of a fork it starts threads of its own. A pickle of it names its store and its options; the
    process that loads it plans and opens it again.
    """

    def __init__(
        self,
        store: Store,
        backend: Backend,
        encoder: InputEncoder,
        policy: Policy,
        settings: Settings,
        guard: Guard = NO_DEADLINE,
    ) -> None:
        self.store, self.backend, self.encoder, self.policy, self.settings = store, backend, encoder, policy, settings
        self.guard, program, self._labels = guard, store.program, store.labels
        self.schedule, self._inputs = Schedule(program, policy.last_exit(len(program.layers))), InputReader(store)
        heads = load_exits(store, policy, needs_all=guard.needs_every_exit)
        self._gate = ExitGate(store, backend, policy, heads, guard)
        workload = Workload(settings.num_rows, self.length, settings.num_batches)
        self._workload, self._planned_bytes = workload, backend.activation_bytes(workload.num_rows, workload.length)
        self.items = plan_items(store, self.schedule.uses(), workload, backend.num_threads, settings.reached)
        self._footprint = _find_footprint(self, MemoryModel(self._inputs, backend))
        self.measured = LEDGER.moment()
        self._left: Optional[Limit] = None
        self._make_plan()
        self.trace, self.counts = _new_trace(settings), RunCounts()
        self._lock, self._is_forked, self._is_freed = threading.Lock(), False, False
        self._engine: Optional[Engine] = None
        self._watch = ContainerWatch()
        self.recipe: Optional[Callable[[], Classifier]] = None
        """Makes this classifier again, in any process; None: it was made of parts."""
        self._peak = PeakMeter("hwm" if settings.own_process else "clear_refs")
        self.survive_forks()

    def open(self) -> Classifier:
        """Allocate the memory of the plan and start to read. Raises BudgetError if the budget is too small for it.

        Unless the process serves only this classifier, the kernel's peak (VmHWM) is reset, if allowed.
        """
        with self._lock, LEDGER.lock:
            if not self._is_open:
                try:
                    _open(self)
                except BaseException:
                    _free(self)
                    raise
        return self

    __enter__ = open

    def __exit__(self, *_: object) -> None:
        self.close()

    def after_fork(self) -> None:
        """Replace the lock, which another thread may have held."""
        self._lock, self._is_forked = threading.Lock(), True

    def __reduce__(self) -> Tuple[Any, ...]:
        if self.recipe is None:
            what = "a classifier that was made of parts cannot be pickled"
            raise UsageError(what, self.store.path, "call offramp.load in the other process")
        return _reopened, (self.recipe, self.store.digest, self._is_open)

    def close(self) -> None:
        """Stop the reader, free the slots, end the threads of the backend, remember which files were verified."""
        with self._lock:
            _free(self)

    if TYPE_CHECKING:

        @overload
        def predict(
            self, texts: Iterable[Any], *, more: bool = ..., stream: Literal[False] = ..., all_scores: bool = ...
        ) -> List[Result]: ...

        @overload
        def predict(
            self, texts: Iterable[Any], *, more: bool = ..., stream: Literal[True], all_scores: bool = ...
        ) -> Iterator[Result]: ...

    def predict(
        self, texts: Iterable[Any], *, more: bool = True, stream: bool = False, all_scores: bool = False
    ) -> Any:
        """Return one result for each input, in order. A text is a string or a pair of strings.

        Args:
            texts: inputs: a list, a generator, a column of a table, or another iterable.
            more: False: no further inputs follow, so nothing is read ahead.
            stream: return an iterator instead of a list. It takes inputs as it needs them (the rows of one batch; in
                bulk mode 1024) and yields results as they are ready. It may be left, or closed, at any time.
            all_scores: set `Result.scores`, the probability of each class.

        Raises ValueError for one input in place of several, and for a table.
        """
        require_several(texts)
        if stream:
            return stream_results(self, texts, more=more, all_scores=all_scores)
        texts = texts if isinstance(texts, (list, tuple)) else list(texts)
        indices = range(len(texts))
        step = self.settings.num_rows
        batches = [list(indices[start : start + step]) for start in indices[::step]]
        if self.settings.is_bulk:
            batches = list(bulk_batches(list(self.encoder.lengths(texts)), self._workload, self.backend))
        found: Dict[int, Result] = {}
        for start in range(0, len(batches), self.settings.num_batches):
            end = start + self.settings.num_batches
            parts = [[texts[index] for index in batch] for batch in batches[start:end]]
            results = _swept(self, parts, more=more or end < len(batches), all_scores=all_scores)
            found.update(zip((index for batch in batches[start:end] for index in batch), results))
        return [found[index] for index in indices]

    def predict_batches(
        self, batches: Sequence[Batch], *, more: bool = True, began: Optional[float] = None, all_scores: bool = False
    ) -> List[Result]:
        """Return the results of several encoded batches that share one sweep over the weights, batch after batch."""
        _require_planned(batches, self._workload, self._planned_bytes, self.backend)
        with self._lock:
            if self._engine is None or not self._is_open:
                raise ValueError("the classifier is not open: use it in a `with` block, or call open()")
            if self._is_forked:
                self._is_forked = False
                self.backend.renew()
            _follow_container(self)
            began = time.perf_counter() if began is None else began
            outcomes = self._engine.sweep(batches, more=more, began=began)
            self.counts.add(time.perf_counter() - began, outcomes, self.guard.deadline_seconds)
            self._peak.sample()  # other code may reset the kernel's peak before the next call
        problem = self.store.program.problem
        return [result_of(outcome, problem, self._labels, all_scores=all_scores) for outcome in outcomes]

    @property
    def length(self) -> int:
        """Tokens of the longest input that is planned for."""
        return self.settings.length or self.encoder.max_length

    @property
    def num_exits(self) -> int:
        """Number of exits, the model's own head included."""
        return self.schedule.num_exits

    @property
    def feed(self) -> Optional[WeightFeed]:
        """Reader of the weights; None before the first `open`."""
        return None if self._engine is None else self._engine.feed

    @property
    def gathering(self) -> Gathering:
        """Learned costs of gathering rows."""
        return self._gate.gathering

    @property
    def latencies(self) -> List[float]:
        """Seconds of each sweep since `open`, from inputs to results (the last 65,536)."""
        return list(self.counts.latencies)

    @property
    def costs(self) -> List[PassCost]:
        """Compute and read seconds of each sweep since `open` (the last 4,096)."""
        return [] if self._engine is None else list(self._engine.costs)

    @property
    def peak_rss_bytes(self) -> int:
        """Peak resident memory in bytes: since `open`, or of the whole process if it serves only this classifier."""
        return self._peak.peak_bytes or measure.read_memory().peak_bytes

    def describe_plan(self) -> Dict[str, Any]:
        """Return the plan as one JSON object, stage by stage. Sizes are in bytes."""
        return plan_record(self)

    def record(self, first_batch: int = 0) -> Dict[str, Any]:
        """Return one JSON object about the run since `open`; medians leave out batches before `first_batch`."""
        return run_record(self, first_batch)

    @property
    def _is_open(self) -> bool:
        return self.feed is not None and self.feed.is_open

    def _make_plan(self) -> None:
        """Make the plan with what other open engines leave, unless it is made."""
        settings, footprint = self.settings, self._footprint
        left = LEDGER.left(settings.limit, self.measured)
        if left != self._left:
            uses, batches, own = self.items, self._workload.num_batches, settings.own_process
            plan = make_run_plan(self.schedule, uses, batches, footprint, left, own, settings.strategy)
            self._left, self.plan, self.planned_reads = left, plan, _reads_for(self, plan)

    def _warm_up(self, num_rows: int, length: int) -> None:
        """Run what a pass of [B, S] tokens runs, without weights, so that code and heap are as a pass leaves them."""
        blank = self._inputs.blank(num_rows, length)
        if blank is not None:
            self.backend.prepare(num_rows, length)
            self._inputs.read(blank, self.backend.allocate)
        self.backend.warm_up(num_rows, length)
        self.encoder.encode(list(self.encoder.sample))


def _find_footprint(classifier: Classifier, model: MemoryModel) -> Footprint:
    """Return the memory of the process besides weights: measured, or estimated where a container is too small."""
    settings, workload = classifier.settings, classifier._workload
    reading_bytes = settings.encoding_bytes + staging_bytes(classifier.store.manifest)
    left = LEDGER.left(settings.limit, LEDGER.moment())
    left_bytes = left.num_bytes - left.reserved_bytes
    if left.source == CONTAINER:
        how = (workload.num_batches, Footprint(0, 0), Limit(0), False)
        weights = make_run_plan(classifier.schedule, classifier.items, *how).smallest_budget_bytes
        estimate = model.estimate_footprint(workload, left_bytes - weights, reading_bytes)
        if estimate is not None:
            return estimate
    most_bytes = system_limit().num_bytes if settings.own_process else 0
    return model.measure_footprint(classifier._warm_up, workload, left_bytes, reading_bytes, most_bytes=most_bytes)


def _swept(classifier: Classifier, parts: Sequence[Sequence[Any]], *, more: bool, all_scores: bool) -> List[Result]:
    """Return the results of one sweep of batches. Its arrays are freed before those of the next one are made."""
    began = time.perf_counter()
    batches = [classifier.encoder.encode(part) for part in parts]
    return classifier.predict_batches(batches, more=more, began=began, all_scores=all_scores)


def _require_planned(batches: Sequence[Batch], planned: Workload, planned_bytes: int, backend: Backend) -> None:
    """Raise UsageError for batches that take more memory than was planned."""
    if len(batches) > planned.num_batches:
        raise UsageError(f"{len(batches)} batches", None, f"the plan was made for {planned.num_batches}")
    for batch in batches:
        if backend.activation_bytes(batch.num_rows, batch.length) > planned_bytes:
            what, most = f"{batch.num_rows} x {batch.length}", f"{planned.num_rows} x {planned.length}"
            raise UsageError(f"batch of {what} tokens", None, f"the plan was made for {most}")


def _reopened(recipe: Callable[[], Classifier], digest: str, is_open: bool) -> Classifier:
    """Return the classifier of a pickle. Raises StoreError if its store is another one by now."""
    classifier = recipe()
    if classifier.store.digest != digest:
        what = "the store is another one than when the classifier was pickled"
        raise StoreError(what, classifier.store.path, "load it again, and pickle that")
    return classifier.open() if is_open else classifier


def _open(classifier: Classifier) -> None:
    classifier._make_plan()  # other engines may have opened or closed since
    require_feasible(classifier)
    if classifier._is_freed:  # it is loaded before weights are
        classifier._warm_up(1, SMALL_LENGTH)
        trim_memory()
    classifier._peak.start()
    classifier.trace, classifier.counts = _new_trace(classifier.settings), RunCounts()
    feed, parts = _new_feed(classifier), (classifier._inputs, classifier.backend, classifier._gate)
    classifier._engine, classifier._is_freed = Engine(classifier.schedule, *parts, feed), False
    LEDGER.reserve(classifier, _share(classifier, feed))


def _reads_for(classifier: Classifier, plan: Plan) -> Reads:
    """Return how the shards that a plan streams are read."""
    streamed = dict.fromkeys(item.shard for item in classifier.items if item.shard not in plan.residents)
    growth_bytes, reads = plan.predicted_peak_bytes - plan.base_bytes, classifier.settings.reads
    found = choose_reads(classifier.store, reads, list(streamed), growth_bytes, measure.available_bytes())
    if classifier.settings.strategy.is_list and found.name == "mapped":
        return Reads("buffered", "a list of layers has its own copies")
    return found


def _new_feed(classifier: Classifier) -> WeightFeed:
    store, schedule, settings = classifier.store, classifier.schedule, classifier.settings
    reads = classifier.planned_reads
    buffers, how = allocate(store, classifier.plan, reads), (schedule.stage_of, classifier.trace)
    if settings.reads_ahead:
        return WeightFeed(store, buffers, *how, **reads.options)
    from offramp.runtime.due import DueFeed, ListFeed  # only where feeds are compared

    if settings.strategy.is_list:
        residents = classifier.plan.residents
        layer_of = {shard: layer for shard, layer in schedule.layer_of.items() if shard not in residents}
        return ListFeed(store, buffers, layer_of, settings.strategy.residency, *how, **reads.options)
    return DueFeed(store, buffers, *how, **reads.options)


def _follow_container(classifier: Classifier) -> None:
    """Give memory back where the container was lowered below what the plan takes, or evicts code of this process.

    A smaller plan keeps fewer weights in memory. Raises BudgetError if none fits.
    """
    plan = classifier.plan
    (limit, reason), engine = classifier._watch.limit(plan), classifier._engine
    if limit is None or engine is None or limit.num_bytes >= plan.predicted_peak_bytes:
        return
    lowered = {"budget_bytes": limit.num_bytes, "limited_by": limit.source, "margin_bytes": limit.margin_bytes}
    # The peak so far is that of the larger plan, and counts no longer.
    classifier.settings = replace(classifier.settings, own_process=False, **lowered)
    with LEDGER.lock:
        LEDGER.release(classifier)
        classifier._make_plan()
        try:
            require_feasible(classifier)
        except BaseException:
            _free(classifier)
            raise
        before, plan = engine.feed, classifier.plan
        before.close()
        feed = engine.feed = _new_feed(classifier)
        feed.count_read(before.bytes_read)
        feed.count_charged(before.bytes_used)
        feed.pass_index = before.pass_index
        LEDGER.reserve(classifier, _share(classifier, feed))
    notice(f"{reason}: {plan.num_slots} slots and {format_size(plan.resident_bytes)} of weights stay in memory")


def _free(classifier: Classifier) -> None:
    """Free what `close` frees. It is loaded again when it is used."""
    classifier._peak.stop()
    LEDGER.release(classifier)
    if classifier._engine is not None:
        classifier._engine.feed.close()
    classifier.backend.close()
    classifier.store.close()
    classifier._is_freed = True


def _share(classifier: Classifier, feed: WeightFeed) -> Share:
    """Return what a classifier reserves."""
    plan, settings, measured = classifier.plan, classifier.settings, classifier.measured
    budget_bytes = settings.budget_bytes if settings.limited_by == BUDGET else None
    weight_bytes = plan.num_slots * plan.slot_bytes + plan.resident_bytes
    return Share(weight_bytes, plan.activation_bytes, budget_bytes, feed.resident_bytes, measured)


def _new_trace(settings: Settings) -> Trace:
    return Trace(max(1, measure.TRACED_PASSES // settings.num_batches), measure.MOST_SPANS)
