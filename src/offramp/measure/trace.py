"""Timed events of a run: waits, reads and computation of each stage.

The trace does not interpret events: their kinds and the meaning of stages are defined by the callers. Events are kept
in memory, for a bounded number of passes, so tracing can stay enabled in a long-lived process.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import threading
from typing import IO, Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from offramp.errors import UsageError
from offramp.forks import Forked

TRACED_PASSES = 16
"""Number of passes whose events an engine keeps. BERT-base records 150 events per pass, 0.1 MiB in total."""
MOST_SPANS = 6144
"""Number of events, 0.25 MiB, above which an engine keeps fewer passes, but two. With blocks of 1 MiB BERT-base records
1,400 events per pass."""
_EVENT = struct.Struct("<IIIiddq")
"""An event as it is kept, in 40 bytes, since no plan counts them; a `Span` takes five times as much. Numbers of name,
kind and thread, then stage, start, end and bytes."""
_pack = _EVENT.pack


class Span(NamedTuple):
    """One timed event. Timestamps are those of `time.perf_counter`."""

    name: str
    stage: int
    kind: str
    """`wait` (the engine waits for a shard), `read`, `idle_read` (between passes), `compute`, `head`, `decide` or
    `gather`."""
    start_seconds: float
    end_seconds: float
    bytes: int = 0
    thread: str = "loop"
    """`loop` or `reader`."""
    pass_index: int = 0


class Trace(Forked):
    """Thread-safe record of spans that keeps the last `num_passes` passes.

    If they have more than `num_spans` spans, the oldest are dropped when a pass begins; two are always kept.
    """

    def __init__(self, num_passes: int = 64, num_spans: Optional[int] = None) -> None:
        if num_passes < 1:
            raise ValueError(f"num_passes must be at least 1, got {num_passes}")
        self.num_passes, self.num_spans = num_passes, num_spans
        self._passes: Dict[int, bytearray] = {}
        self._texts: List[str] = []
        self._numbers: Dict[str, int] = {}
        self._opening = threading.Lock()
        self.survive_forks()

    def after_fork(self) -> None:
        """Replace the lock, which another thread may have held while it entered a text."""
        self._opening = threading.Lock()
        self._numbers = {text: number for number, text in enumerate(self._texts)}

    def add(self, span: Span) -> None:
        """Record one event. The oldest pass is dropped when more than `num_passes` are kept."""
        events = self._passes.get(span.pass_index)
        if events is None:
            with self._opening:
                events = self._passes.setdefault(span.pass_index, bytearray())
                while len(self._passes) > self.num_passes or self._is_long():
                    del self._passes[min(self._passes)]
        name, kind, thread = self._number(span.name), self._number(span.kind), self._number(span.thread)
        events += _pack(name, kind, thread, span.stage, span.start_seconds, span.end_seconds, span.bytes)

    def _number(self, text: str) -> int:
        """Return the number that stands for a text."""
        number = self._numbers.get(text)
        return self._enter(text) if number is None else number

    def _enter(self, text: str) -> int:
        with self._opening:
            number = self._numbers.setdefault(text, len(self._texts))
            if number == len(self._texts):
                self._texts.append(text)
        return number

    def _is_long(self) -> bool:
        if self.num_spans is None or len(self._passes) <= 2:
            return False
        return sum(map(len, self._passes.values())) > self.num_spans * _EVENT.size

    def spans(self, pass_index: Optional[int] = None) -> List[Span]:
        """Return the spans of one pass, or of all kept passes, in order of their start."""
        with self._opening:
            kept = {index: bytes(events) for index, events in self._passes.items() if pass_index in (None, index)}
        found = (self._span(index, event) for index, events in kept.items() for event in _EVENT.iter_unpack(events))
        return sorted(found, key=lambda span: span.start_seconds)

    def _span(self, pass_index: int, event: Tuple[int, int, int, int, float, float, int]) -> Span:
        name, kind, thread, stage, start_seconds, end_seconds, num_bytes = event
        texts = self._texts
        return Span(texts[name], stage, texts[kind], start_seconds, end_seconds, num_bytes, texts[thread], pass_index)

    def to_jsonl(self, path: Any) -> None:
        """Write one JSON object per span, with the fields of `Span`."""
        with _opened(path) as file:
            for span in self.spans():
                file.write(json.dumps(span._asdict()) + "\n")

    def to_chrome(self, path: Any) -> None:
        """Write a file in the Trace Event Format, which Perfetto and chrome://tracing open."""
        with _opened(path) as file:
            json.dump({"traceEvents": list(_chrome_events(self.spans())), "displayTimeUnit": "ms"}, file)


def _opened(path: Any) -> IO[str]:
    """Open a file for writing. Raises UsageError for a pipe without a reader, which would be waited for."""

    def opener(name: str, flags: int) -> int:
        descriptor = os.open(name, flags | os.O_NONBLOCK, 0o666)
        os.set_blocking(descriptor, True)
        return descriptor

    try:
        return open(path, "w", encoding="utf-8", opener=opener)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise UsageError("no process reads this pipe", path, "start its reader first, or name a file") from None


def _chrome_events(spans: Sequence[Span]) -> Iterator[Dict[str, Any]]:
    """Yield the names of process and threads ("M" events), then one "X" event per span.

    Timestamps are microseconds from the start of the first span.
    """
    threads = {name: number for number, name in enumerate(sorted({span.thread for span in spans}), start=1)}
    yield {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "offramp"}}
    for name, number in threads.items():
        yield {"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": name}}
    for span in spans:
        start, seconds = span.start_seconds - spans[0].start_seconds, span.end_seconds - span.start_seconds
        event = {"ph": "X", "pid": 1, "tid": threads[span.thread], "name": span.name, "cat": span.kind}
        facts = {"kind": span.kind, "stage": span.stage, "pass_index": span.pass_index, "bytes": span.bytes}
        yield {**event, "ts": start * 1e6, "dur": seconds * 1e6, "args": facts}


def bound_seconds(compute: Sequence[float], read: Sequence[float], fill_seconds: float) -> float:
    """Return the lower bound of the seconds of a pass with perfect overlap: max(sum of compute, sum of read) + fill.

    Args:
        compute: seconds of computation, one entry per stage.
        read: seconds of reading, one entry per shard that is read.
        fill_seconds: time that cannot overlap with computation, such as the first read.
    """
    return max(sum(compute), sum(read)) + fill_seconds
