"""Resident memory of this process: current, peak, and over time.

The resident set includes every mapped page, also pages shared with other processes. It excludes page cache of files
that are read without mapping (see `measure.cached`) and GPU memory.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from array import array
from dataclasses import dataclass
from typing import Dict, List, NamedTuple, Optional, TypeVar

from offramp.forks import Forked

_STATUS = "/proc/self/status"
_CLEAR_REFS = "/proc/self/clear_refs"
_Self = TypeVar("_Self", bound="_Sampler")
_UNKNOWN = -1
"""Stored in a sample in place of a number that the system does not report."""


@dataclass(frozen=True)
class Memory:
    """Resident set at one moment. `anon_bytes` and `file_bytes` are None if the system does not report them."""

    rss_bytes: int
    peak_bytes: int
    """Largest resident set since the process started or since `reset_peak` (VmHWM).

    Since Linux 6.2 the kernel derives it from per-core counters; the error can reach 0.1 MiB per core."""
    anon_bytes: int | None
    file_bytes: int | None
    """Mapped files and shared memory (RssFile + RssShmem)."""


def read_memory() -> Memory:
    """Return the memory of this process. Takes about 15 microseconds.

    Without /proc (macOS) only the peak is known; it is then also returned as the resident set, an upper bound.
    """
    status = _status_bytes()
    if "VmHWM" not in status:
        import resource  # not available on every system

        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)
        return Memory(peak_bytes, peak_bytes, None, None)
    anon_bytes = status.get("RssAnon")  # since Linux 4.5
    file_bytes = None if anon_bytes is None else status.get("RssFile", 0) + status.get("RssShmem", 0)
    return Memory(status.get("VmRSS", status["VmHWM"]), status["VmHWM"], anon_bytes, file_bytes)


def major_faults() -> int:
    """Return how often this process has waited for the disk for a page of a mapped file; 0 if that is not known."""
    try:
        import resource  # not available on every system
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def _status_bytes() -> Dict[str, int]:
    # Opened on every call: after a fork, an inherited descriptor would report the parent.
    try:
        descriptor = os.open(_STATUS, os.O_RDONLY)
    except OSError:  # another operating system, or a sandbox that hides it
        return {}
    try:
        status = os.read(descriptor, 1 << 14)
    finally:
        os.close(descriptor)
    begin = status.find(b"VmHWM:")
    words = status[begin : status.find(b"VmData:", begin)].split()  # name, number, "kB", five times
    return {name[:-1].decode(): int(kib) << 10 for name, kib in zip(words[0::3], words[1::3])} if begin >= 0 else {}


def reset_peak() -> bool:
    """Reset the peak (VmHWM) of this process to the current resident set. Return whether the system allowed it.

    The reset affects every reader of the peak in this process, so it happens only on request.
    """
    try:
        with os.fdopen(os.open(_CLEAR_REFS, os.O_WRONLY), "wb", 0) as file:
            file.write(b"5")  # proc(5): reset the peak resident set, since Linux 4.0
    except OSError:
        return False
    return True


class _Sampler(Forked):
    """Calls `sample` at the start, every `interval_seconds` in a thread, and at the stop.

    An error in the thread is raised again by the stop.
    """

    def __init__(self, interval_seconds: float) -> None:
        if not interval_seconds > 0:
            raise ValueError(f"interval_seconds must be positive, got {interval_seconds}")
        self._interval_seconds = interval_seconds
        self._stopping = threading.Event()
        self.survive_forks()

    def after_fork(self) -> None:
        """Forget the thread: in the child, samples are those that callers take."""
        self._stopping = threading.Event()

    def sample(self) -> None:
        """Take one sample."""
        raise NotImplementedError

    def start(self) -> None:
        """Take the first sample and start sampling."""
        self.sample()
        self._error: Optional[BaseException] = None
        self._stopping.clear()
        self._thread = threading.Thread(target=self._run, name="offramp-memory", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stopping.wait(self._interval_seconds):
                self.sample()
        except BaseException as error:
            self._error = error

    def stop(self) -> None:
        """End the thread and take the last sample."""
        self._stopping.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        self.sample()

    def __enter__(self: _Self) -> _Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


class PeakMeter(_Sampler):
    """Peak resident set of a phase: `with PeakMeter() as meter: ...`, then `meter.peak_bytes` and `meter.method`.

    Args:
        method: how to measure.
            `"sampled"`: a thread samples every `interval_seconds`. If the phase sets a new peak for the process, the
            exact peak of the kernel is used; otherwise peaks shorter than the interval can be missed.
            `"clear_refs"`: calls `reset_peak` first and uses the peak of the kernel; falls back to `"sampled"` if the
            reset is not permitted.
            `"hwm"`: the peak of the whole process since its start.
        interval_seconds: time between two samples.

    After the start, `meter.method` is the method in use; without /proc it is always `"hwm"`.
    """

    METHODS = ("sampled", "clear_refs", "hwm")

    def __init__(self, method: str = "sampled", interval_seconds: float = 0.005) -> None:
        if method not in self.METHODS:
            raise ValueError(f"method must be one of {self.METHODS}, got {method!r}")
        super().__init__(interval_seconds)
        self.method = method
        self._running = False
        self._peak_bytes = 0
        self._lock = threading.Lock()

    def after_fork(self) -> None:
        """Forget the thread, and the lock that it may have held."""
        super().after_fork()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin the phase."""
        if self.method == "clear_refs" and not reset_peak():
            self.method = "sampled"
        if self.method == "sampled" and not _status_bytes():
            self.method = "hwm"
        self._earlier_peak_bytes = read_memory().peak_bytes
        self._peak_bytes = 0
        self._running = True
        if self.method == "sampled":
            super().start()

    def stop(self) -> None:
        """End the phase, if one has begun, and freeze `peak_bytes`."""
        if not self._running:
            return
        if self.method == "sampled":
            super().stop()
        else:
            self.sample()
        self._running = False

    def sample(self) -> None:
        """Take one sample and update the peak."""
        memory = read_memory()
        known = self.method != "sampled" or memory.peak_bytes > self._earlier_peak_bytes
        with self._lock:
            self._peak_bytes = max(self._peak_bytes, memory.peak_bytes if known else memory.rss_bytes)

    @property
    def peak_bytes(self) -> int:
        """Peak so far in bytes, or that of the whole phase after it has ended."""
        if self._running:
            self.sample()
        return self._peak_bytes


class MemorySample(NamedTuple):
    """One sample of `MemorySampler`. Timestamps are those of `time.perf_counter`."""

    seconds: float
    rss_bytes: int
    anon_bytes: int | None
    file_bytes: int | None


class MemorySampler(_Sampler):
    """Records the memory of this process over time in a background thread.

    All samples are kept, 32 bytes each: intended for runs of seconds, not for long-lived servers.
    """

    def __init__(self, interval_seconds: float = 0.002) -> None:
        super().__init__(interval_seconds)
        self._rows = array("q")  # nanoseconds, rss, anon, file; flat, to add little to the memory that it measures

    def sample(self) -> None:
        """Take one sample."""
        memory = read_memory()
        parts = [_UNKNOWN if part is None else part for part in (memory.anon_bytes, memory.file_bytes)]
        self._rows.extend([time.perf_counter_ns(), memory.rss_bytes, *parts])

    @property
    def samples(self) -> List[MemorySample]:
        """All samples so far, oldest first."""
        columns = [self._rows[first::4] for first in range(4)]
        return [
            MemorySample(nanoseconds / 1e9, rss, *(None if part == _UNKNOWN else part for part in parts))
            for nanoseconds, rss, *parts in zip(*columns)
        ]
