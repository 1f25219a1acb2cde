"""The resident memory of this process: now, at its peak, and over time.

A resident set counts every mapped page once, also those that other processes share. It does not count what the page
cache keeps of files that are merely read (`measure.cached` does), nor the memory of a GPU.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional

_STATUS = "/proc/self/status"
_CLEAR_REFS = "/proc/self/clear_refs"
_UNKNOWN = -1  # what a sample stores for a number that the system does not tell


@dataclass(frozen=True)
class Memory:
    """The resident set at one moment. `anon_bytes` and `file_bytes` are None where the system does not tell them."""

    rss_bytes: int
    peak_bytes: int
    """The largest resident set since the process began, or since `reset_peak` (VmHWM).

    Since Linux 6.2 the kernel keeps it from counters of each core and may be some 0.1 MiB a core off."""
    anon_bytes: int | None
    file_bytes: int | None
    """Mapped files and shared memory (RssFile + RssShmem)."""


def read_memory() -> Memory:
    """The memory of this process, in some 15 microseconds.

    Without /proc (macOS) only the peak is known: it stands for the resident set too, as an upper bound.
    """
    kib = _status_kib()
    if "VmHWM" not in kib:
        peak_bytes = _rusage_peak_bytes()
        return Memory(peak_bytes, peak_bytes, None, None)
    if "RssAnon" not in kib:  # before Linux 4.5
        return Memory(kib["VmRSS"] << 10, kib["VmHWM"] << 10, None, None)
    return Memory(
        rss_bytes=kib["VmRSS"] << 10,
        peak_bytes=kib["VmHWM"] << 10,
        anon_bytes=kib["RssAnon"] << 10,
        file_bytes=(kib["RssFile"] + kib["RssShmem"]) << 10,
    )


def _status_kib() -> Dict[str, int]:
    # Opened anew each time: a descriptor kept across a fork would tell of the parent.
    try:
        descriptor = os.open(_STATUS, os.O_RDONLY)
    except FileNotFoundError:
        return {}
    try:
        status = os.read(descriptor, 1 << 14)
    finally:
        os.close(descriptor)
    begin = status.find(b"VmHWM:")
    words = status[begin : status.find(b"VmData:", begin)].split()  # name, number, "kB", five times
    return {name[:-1].decode(): int(number) for name, number in zip(words[0::3], words[1::3])} if begin >= 0 else {}


def _rusage_peak_bytes() -> int:
    import resource  # not everywhere

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def reset_peak() -> bool:
    """Let the peak (VmHWM) of this process begin again at what is resident now; whether the system allowed it.

    It changes what everybody else in the process reads as the peak, so it is never done unasked.
    """
    try:
        descriptor = os.open(_CLEAR_REFS, os.O_WRONLY)
    except OSError:
        return False
    try:
        os.write(descriptor, b"5")  # proc(5): reset the peak resident set, since Linux 4.0
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


class _Ticker:
    """Calls `act` at the start, in a thread every `interval_seconds`, and at the stop, which raises what it raised."""

    def __init__(self, act: Callable[[], None], interval_seconds: float) -> None:
        if not interval_seconds > 0:
            raise ValueError(f"interval_seconds must be above 0, got {interval_seconds}")
        self._act, self._interval_seconds = act, interval_seconds

    def start(self) -> None:
        self._act()
        self._error: Optional[BaseException] = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="offramp-memory", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stopping.wait(self._interval_seconds):
                self._act()
        except BaseException as error:
            self._error = error

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        self._act()


class PeakMeter:
    """The peak resident set of a phase: `with PeakMeter() as meter: ...`, then `meter.peak_bytes` and `meter.method`.

    Args:
        method: how to measure. `"sampled"`: a thread looks every `interval_seconds`; the kernel's own peak when the
            phase sets a new one for the process, else blind to what is shorter than the interval. `"clear_refs"`:
            `reset_peak` first, then the kernel's own; falls back to `"sampled"` where that is not allowed. `"hwm"`: no
            phase but the whole process since it began.
        interval_seconds: the time between two looks.

    `meter.method` says what was done once it has started; without /proc it is always `"hwm"`.
    """

    METHODS = ("sampled", "clear_refs", "hwm")

    def __init__(self, method: str = "sampled", interval_seconds: float = 0.005) -> None:
        if method not in self.METHODS:
            raise ValueError(f"method must be one of {self.METHODS}, got {method!r}")
        self.method = method
        self._ticker = _Ticker(self.look, interval_seconds)
        self._running = False
        self._peak_bytes = 0
        self._looking = threading.Lock()

    def start(self) -> None:
        """Begin the phase."""
        if self.method == "clear_refs" and not reset_peak():
            self.method = "sampled"
        if self.method == "sampled" and not Path(_STATUS).exists():
            self.method = "hwm"
        self._earlier_peak_bytes = read_memory().peak_bytes
        self._peak_bytes = 0
        self._running = True
        if self.method == "sampled":
            self._ticker.start()

    def stop(self) -> None:
        """End the phase; `peak_bytes` does not change any more."""
        if self.method == "sampled":
            self._ticker.stop()
        else:
            self.look()
        self._running = False

    def look(self) -> None:
        """Take note of what is resident now, and of the kernel's peak where it is ours."""
        memory = read_memory()
        known = self.method != "sampled" or memory.peak_bytes > self._earlier_peak_bytes
        with self._looking:
            self._peak_bytes = max(self._peak_bytes, memory.peak_bytes if known else memory.rss_bytes)

    @property
    def peak_bytes(self) -> int:
        """The peak so far, or that of the whole phase once it has ended."""
        if self._running:
            self.look()
        return self._peak_bytes

    def __enter__(self) -> PeakMeter:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()


class MemorySample(NamedTuple):
    """One row of `MemorySampler.samples`; the clock is `time.perf_counter`."""

    seconds: float
    rss_bytes: int
    anon_bytes: int | None
    file_bytes: int | None


class MemorySampler:
    """Records the memory of this process over time, from a thread, for a picture of one run.

    It keeps every sample, 32 bytes each: it is meant for seconds, not for the life of a server.
    """

    def __init__(self, interval_seconds: float = 0.002) -> None:
        self._rows = array("q")  # nanoseconds, rss, anon, file; flat, so that it weighs little in what it measures
        self._ticker = _Ticker(self._sample, interval_seconds)

    def _sample(self) -> None:
        memory = read_memory()
        parts = [_UNKNOWN if part is None else part for part in (memory.anon_bytes, memory.file_bytes)]
        self._rows.extend([time.perf_counter_ns(), memory.rss_bytes, *parts])

    def start(self) -> None:
        """Begin to sample."""
        self._ticker.start()

    def stop(self) -> None:
        """Take the last sample and end the thread."""
        self._ticker.stop()

    @property
    def samples(self) -> List[MemorySample]:
        """All samples so far, oldest first."""
        columns = [self._rows[first::4] for first in range(4)]
        return [
            MemorySample(nanoseconds / 1e9, rss, *(None if part == _UNKNOWN else part for part in parts))
            for nanoseconds, rss, *parts in zip(*columns)
        ]

    def __enter__(self) -> MemorySampler:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()
