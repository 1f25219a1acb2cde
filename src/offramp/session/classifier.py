"""`Classifier`: texts in, results out, under a budget; safe from several threads.

It is given a store, a backend, an encoder of texts and a policy.
It does not choose the backend (`offramp.load` does) and does not read files of texts.

Shapes: B rows, S tokens, C labels.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from dataclasses import dataclass
from itertools import chain
from typing import Any, Deque, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np

from offramp.errors import UsageError
from offramp.measure import (
    TRACED_PASSES,
    PeakMeter,
    Trace,
    available_bytes,
    bound_seconds,
    cached_bytes,
    median,
    read_memory,
)
from offramp.policies import Policy
from offramp.program.program import Texts
from offramp.runtime.backend import Backend
from offramp.runtime.config import EngineConfig
from offramp.runtime.course import Arrays, Batch, Tokens, course_of
from offramp.runtime.exits import load_exits
from offramp.runtime.gathering import Gathering
from offramp.runtime.guard import DeadlineGuard
from offramp.runtime.loop import Loop
from offramp.runtime.passes import Outcome, PassCost
from offramp.runtime.prepare import Workload, allocate, make_run_plan, settle
from offramp.runtime.reads import choose_direct
from offramp.store import Encoder, Store

MAX_BULK_ROWS = 256
_SAMPLE = ("a b",)
"""What a process encodes to come to its footprint, if its encoder has no `sample` of its own."""


@dataclass(frozen=True)
class Result:
    """What was found for one text. The fields are the keys of `offramp run --json`."""

    label: Optional[str]
    """The `id2label` string; None for regression. Multi-label: the most probable one."""
    score: float
    """Its softmax probability (multi-label: sigmoid; regression: the value)."""
    exit_stage: int
    """The exit that answered, from 1; the number of layers where none left early."""
    stages_run: int
    """Layers that were computed for this text."""
    bytes_read: int
    """This text's share of what was read from the store."""
    labels: Optional[Tuple[str, ...]] = None
    """Multi-label only: all labels with a probability of one half or more."""


@dataclass(frozen=True)
class Settings:
    """How to run. Sizes in bytes."""

    budget_bytes: int
    num_rows: int = 1
    """Rows of a batch."""
    length: Optional[int] = None
    """The longest input in tokens that will come; the encoder's limit if None."""
    reads: str = "auto"
    own_process: bool = False
    """The process is there for this alone: the budget holds from its start on, not from here."""
    is_bulk: bool = False
    """Texts of about equal length run together, as many as the plan holds activations for."""
    num_batches: int = 1
    """Batches that share a sweep of the weights, in bulk: as many as the plan holds hidden states for."""
    encoding_bytes: int = 0
    """What it takes to make an array of the largest input, as to decode an image; that of texts is not worth it."""
    reached: Tuple[float, ...] = ()
    """The share of rows that come to each layer, where it is known: what is needed most is kept. All, if empty."""
    config: Optional[EngineConfig] = None
    """The options that these settings were made from, for records."""

    def __post_init__(self) -> None:
        for name in ("num_rows", "num_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


class Classifier:
    """Classifies texts with a store. A context manager; `close` frees the slots."""

    def __init__(
        self,
        store: Store,
        backend: Backend,
        encoder: Any,
        policy: Policy,
        settings: Settings,
        guard: Optional[DeadlineGuard] = None,
    ) -> None:
        self.store, self.backend, self.encoder, self.policy, self.settings = (
            store,
            backend,
            encoder,
            policy,
            settings,
        )
        self.trace = Trace(num_passes=max(1, TRACED_PASSES // settings.num_batches))
        course = course_of(store)
        exits = load_exits(store, course, policy, needs_all=guard is not None)
        self._loop = Loop(store, backend, policy, exits, self.trace, guard)
        workload = Workload(settings.num_rows, settings.length or encoder.max_length, settings.num_batches)
        self._workload, self._planned_bytes = workload, backend.activation_bytes(workload.num_rows, workload.length)
        sample = list(getattr(encoder, "sample", _SAMPLE))
        footprint = settle(
            self._loop,
            lambda: encoder.encode(sample),
            workload,
            settings.budget_bytes,
            settings.encoding_bytes,
        )
        self.plan, self.items = make_run_plan(
            self._loop, workload, footprint, settings.budget_bytes, settings.own_process, settings.reached
        )
        growth_bytes = self.plan.predicted_peak_bytes - self.plan.base_bytes
        self.direct = choose_direct(store, settings.reads, growth_bytes, available_bytes())
        self._lock, self._started = threading.Lock(), time.perf_counter()
        self._latencies: Deque[float] = deque(maxlen=65536)
        self._num_inputs, self._num_cut, self._seconds, self._open = 0, 0, 0.0, False
        self._peak = PeakMeter("hwm" if settings.own_process else "clear_refs")

    def open(self) -> Classifier:
        """Take the memory of the plan and start to read. Raises BudgetError where the budget does not hold it.

        In somebody's process it resets the kernel's peak (VmHWM), if that is allowed, to measure its own.
        """
        self.plan.require_feasible(self.items)
        with self._lock:
            if not self._open:
                self._peak.start()
                self._loop.connect(*allocate(self.store, self.plan), direct=self.direct)
                self._open = True
        return self

    def __enter__(self) -> Classifier:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the reader, free the slots, remember what was verified."""
        with self._lock:
            if self._open:
                self._peak.stop()
            self._loop.close()
            self._open = False
            self.store.close()

    def predict(self, texts: Sequence[Any], *, more: bool = True) -> List[Result]:
        """One result a text, in order; a text is a string or a pair of strings.

        `more=False`: nothing will follow, so read nothing ahead.
        """
        if isinstance(texts, str):
            raise ValueError("predict takes a list of texts, not one text: predict([text])")
        if self.settings.is_bulk:
            return self._predict_bulk(texts, more)
        results: List[Result] = []
        step = self.settings.num_rows
        for start in range(0, len(texts), step):
            began = time.perf_counter()
            batch = self._encode(texts[start : start + step])
            follows = more or start + step < len(texts)
            results += self.predict_batch(batch, more=follows, began=began)
        return results

    def _encode(self, inputs: Sequence[Any]) -> Batch:
        """Texts as tokens, or whatever else as the arrays by name that their encoder makes."""
        found = self.encoder.encode(inputs)
        return Arrays(found) if isinstance(found, dict) else Tokens(found.ids_BS, found.mask_BS, found.types_BS)

    def _predict_bulk(self, texts: Sequence[Any], more: bool) -> List[Result]:
        """The same by length, so that a sweep of the weights serves many texts and pads few tokens."""
        has_length = self.encoder.max_length > 1  # an image has none, and is not decoded to see that
        lengths = [self._encode([text]).shape[1] if has_length else 1 for text in texts]
        found: List[Optional[Result]] = [None] * len(texts)
        batches = list(self._bulk_batches(lengths))
        for start in range(0, len(batches), self.settings.num_batches):
            began, end = time.perf_counter(), start + self.settings.num_batches
            sweep = [self._encode([texts[index] for index in indices]) for indices in batches[start:end]]
            results = self.predict_batches(sweep, more=more or end < len(batches), began=began)
            for index, result in zip(chain.from_iterable(batches[start:end]), results):
                found[index] = result
        return [result for result in found if result is not None]

    def _bulk_batches(self, lengths: Sequence[int]) -> Iterator[List[int]]:
        """Indices of texts, the longest first, in batches that the plan holds.

        None has more tokens than the plan's either: its arrays would be larger than any that a backend has kept.
        """
        batch: List[int] = []
        planned_tokens = self._workload.num_rows * self._workload.length
        for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
            longest = lengths[batch[0]] if batch else lengths[index]
            fits = self.backend.activation_bytes(len(batch) + 1, longest) <= self._planned_bytes
            fits = fits and (len(batch) + 1) * longest <= planned_tokens
            if batch and (not fits or len(batch) == MAX_BULK_ROWS):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def predict_tokens(
        self,
        ids_BS: np.ndarray,
        mask_BS: np.ndarray,
        types_BS: np.ndarray,
        *,
        more: bool = True,
        began: Optional[float] = None,
    ) -> List[Result]:
        """The same for token ids: int64 [B, S], padded on the right; the mask is 1 where there is a token."""
        return self.predict_batch(Tokens(ids_BS, mask_BS, types_BS), more=more, began=began)

    def predict_batch(self, batch: Batch, *, more: bool = True, began: Optional[float] = None) -> List[Result]:
        """The same for a batch that is encoded."""
        return self.predict_batches([batch], more=more, began=began)

    def predict_batches(
        self, batches: Sequence[Batch], *, more: bool = True, began: Optional[float] = None
    ) -> List[Result]:
        """The same for several batches, which share a sweep of the weights; results batch after batch."""
        if len(batches) > self._workload.num_batches:
            raise UsageError(f"{len(batches)} batches", None, f"the plan was made for {self._workload.num_batches}")
        for batch in batches:
            if self.backend.activation_bytes(*batch.shape) > self._planned_bytes:
                raise UsageError(
                    f"batch of {batch.shape[0]} x {batch.shape[1]} tokens",
                    None,
                    f"the plan was made for {self._workload.num_rows} x {self._workload.length}",
                )
        with self._lock:
            if not self._open:
                raise ValueError("the classifier is not open: use it in a `with` block, or call open()")
            began = time.perf_counter() if began is None else began
            outcomes = self._loop.sweep(batches, more=more, began=began)
            seconds = time.perf_counter() - began
            self._latencies.append(seconds)
            self._seconds += seconds
            self._num_inputs += len(outcomes)
            self._num_cut += sum(outcome.is_cut for outcome in outcomes)
            self._peak.look()  # somebody else may reset the kernel's peak before we look again
        return [self._result(outcome) for outcome in outcomes]

    @property
    def texts(self) -> Union[Encoder, Texts, None]:
        """What the model asks of texts; None: it takes none."""
        return self._loop.course.texts

    @property
    def num_exits(self) -> int:
        """The last one included."""
        return len(self._loop.layers)

    @property
    def last_pass(self) -> int:
        """Index of the batch, or sweep of batches, that was run last, as the trace has it."""
        return self._loop.last_pass

    @property
    def gathering(self) -> Gathering:
        """What it has learnt about taking rows out of a batch."""
        return self._loop.gathering

    @property
    def latencies(self) -> List[float]:
        """Seconds of each batch so far, or sweep of batches, from text to results (the last 65,536)."""
        return list(self._latencies)

    @property
    def last_seconds(self) -> float:
        """Seconds of the batch, or sweep of batches, that was run last."""
        return self._latencies[-1]

    @property
    def costs(self) -> List[PassCost]:
        """What each pass so far took to compute and to read."""
        return list(self._loop.costs)

    @property
    def peak_rss_bytes(self) -> int:
        """The peak resident set: since `open`, or of the whole process where it is there for this alone."""
        return self._peak.peak_bytes or read_memory().peak_bytes

    def describe_plan(self) -> Dict[str, Any]:
        """The plan as one JSON object."""
        plan, stages = self.plan, []
        for stage in self._loop.stages():
            items = [
                item for item in self.items if item.shard in {shard for step in stage.steps for shard in step.shards}
            ]
            shards = [
                {"shard": item.shard, "bytes": item.num_bytes, "resident": item.shard in plan.residents}
                for item in items
            ]
            stages.append({"stage": stage.name, "bytes": sum(item.num_bytes for item in items), "shards": shards})
        return {
            "feasible": plan.feasible,
            "budget_bytes": plan.budget_bytes,
            "predicted_peak_bytes": plan.predicted_peak_bytes,
            "smallest_budget_bytes": plan.smallest_budget_bytes,
            "base_bytes": plan.base_bytes,
            "activation_bytes": plan.activation_bytes,
            "num_slots": plan.num_slots,
            "slot_bytes": plan.slot_bytes,
            "resident_bytes": plan.resident_bytes,
            "reads": "direct" if self.direct else "buffered",
            "stages": stages,
        }

    def record(self, first_batch: int = 0) -> Dict[str, Any]:
        """One JSON object about the run so far; the medians leave out the batches before `first_batch`."""
        ring, plan, manifest = self._loop.ring, self.plan, self.store.contents
        latencies, costs = self.latencies[first_batch:], self.costs[first_batch:]
        memory = read_memory()
        used_bytes, idle_bytes = (ring.bytes_used, ring.bytes_idle) if ring else (0, 0)
        return {
            "model": manifest.source.architecture,
            "store_sha256": self.store.digest,
            "config": None if self.settings.config is None else self.settings.config.to_json(),
            "backend": self.backend.name,
            "threads": self.backend.num_threads,
            "exit": str(self.policy),
            "deadline_seconds": None if self._loop.guard is None else self._loop.guard.deadline_seconds,
            "num_cut_by_deadline": self._num_cut,
            "budget_bytes": plan.budget_bytes,
            "predicted_peak_bytes": plan.predicted_peak_bytes,
            "peak_rss_bytes": self.peak_rss_bytes,
            "rss_anon_bytes": memory.anon_bytes,
            "rss_file_bytes": memory.file_bytes,
            "page_cache_bytes": self._page_cache_bytes(),
            "num_slots": plan.num_slots,
            "num_residents": len(plan.residents),
            "resident_bytes": plan.resident_bytes,
            "reads": "direct" if self.direct else "buffered",
            "verify": self.store.policy,
            "batch": self.settings.num_rows * self.settings.num_batches,
            "is_bulk": self.settings.is_bulk,
            "num_inputs": self._num_inputs,
            "seconds_total": self._seconds,
            "latency_seconds_median": median(latencies) if latencies else None,
            "bytes_read_total": used_bytes + idle_bytes,
            "bytes_read_idle": idle_bytes,
            "bound_seconds": median([_bound(cost) for cost in costs]) if costs else None,
        }

    def _page_cache_bytes(self) -> Optional[int]:
        """What the page cache holds of the shards: in no resident set, but in a memory cgroup's account."""
        parts = [cached_bytes(self.store.path / shard.file) for shard in self.store.contents.shards.values()]
        known = [part for part in parts if part is not None]
        return sum(known) if len(known) == len(parts) else None

    def _result(self, outcome: Outcome) -> Result:
        problem, labels = self._loop.course.problem, self._loop.course.labels
        assert outcome.logits_C is not None
        logits_C = outcome.logits_C.astype(np.float64)
        common = (outcome.exit_stage, outcome.exit_stage, outcome.bytes_read)
        if problem == "regression":
            return Result(None, float(logits_C[0]), *common)
        if problem == "multi_label_classification":
            scores_C = [_sigmoid(logit) for logit in logits_C]
            best = int(np.argmax(scores_C))
            return Result(
                labels[best],
                scores_C[best],
                *common,
                tuple(label for label, logit in zip(labels, logits_C) if logit >= 0),
            )
        exponents_C = np.exp(logits_C - logits_C.max())
        best = int(logits_C.argmax())
        return Result(labels[best], float(exponents_C[best] / exponents_C.sum()), *common)


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def _bound(cost: PassCost) -> float:
    return bound_seconds([cost.compute_seconds], [cost.read_seconds], cost.fill_seconds)
