"""Pools run jobs, each in a process of its own, and give back what became of them. `scheduled` has that of a scheduler.

An outcome is a tree of plain values: `result`, or `error` with the kind of the failure and the `environment` of the
process that failed; `seconds`, `attempts`. A job whose process was killed is tried once more.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

from offramp.errors import (
    AbsentError,
    BudgetError,
    ChangedError,
    DiskFullError,
    OfframpError,
    RefusedError,
    UsageError,
)
from offramp.experiments.children import Log, LostError, TimedOutError, ignore, run_worker
from offramp.experiments.jobs import WorkerJob
from offramp.measure.conditions import surroundings

Outcome = dict[str, Any]
MAX_ATTEMPTS = 2
"""Attempts for a job whose process is killed. Other failures are not tried again."""
_WAIT_SECONDS = 1
"""Longest wait at once: a Ctrl-C that comes just before a wait is seen only after it."""
_FREE_SECONDS = 0.05
"""Seconds between looks for a worker while no job runs."""
CHANGED, KILLED = "changed", "killed"
"""Kinds of the failures of a job whose model or data were replaced while the sweep ran, and of a killed process."""
_KINDS: dict[type, str] = {
    LostError: KILLED, TimedOutError: "timeout", BudgetError: "memory", AbsentError: "absent",
    DiskFullError: "disk", ChangedError: CHANGED, UsageError: "refused", RefusedError: "refused",
}  # fmt: skip
"""Class of an error -> kind of the failure in records; `error` for others."""
RECORDED = ("killed", "timeout", "memory", "refused", "absent", "error")
"""Kinds of failures that records have: of the others, the sweep ends without a record."""


class Pool(Protocol):
    """Runs jobs beside each other."""

    def room(self, num_jobs: int, alone: bool) -> int:
        """Return the most jobs that may run at once: on this machine `num_jobs`.

        On others it is the number of workers, or of machines for jobs that run `alone`.
        """
        ...

    def start(self, job: WorkerJob, timeout_seconds: float | None, log: Log, alone: bool) -> Future[Outcome]:
        """Start a job and return the future of its outcome. There is room for it."""
        ...

    def check(self) -> None:
        """Look after the jobs that run. Raises UsageError if no job can end any more."""
        ...

    def close(self) -> None:
        """End all jobs that run."""
        ...


def attempt(
    job: WorkerJob, timeout_seconds: float | None, log: Log = ignore,
    started: Callable[[subprocess.Popen[str]], None] = lambda child: None, max_attempts: int = MAX_ATTEMPTS,
) -> Outcome:  # fmt: skip
    """Run a job in a process of its own and return its outcome; a lost process is tried again."""
    began = time.perf_counter()
    for number in range(1, max_attempts + 1):
        try:
            outcome: Outcome = {"result": run_worker(job, log, timeout_seconds, started)}
        except OfframpError as error:
            if isinstance(error, LostError) and number < max_attempts:
                continue
            here = error.environment or surroundings(job.folder)  # a process that was killed has not told
            outcome = {"error": failure_of(error), "environment": here}
        return {**outcome, "attempts": number, "seconds": time.perf_counter() - began}
    raise AssertionError("the last attempt returns")


def failure_of(error: OfframpError) -> dict[str, Any]:
    """Return the reason of a failure as plain values."""
    kind = next((name for kind, name in _KINDS.items() if isinstance(error, kind)), "error")
    where = None if error.where is None else str(error.where)
    return {"kind": kind, "what": error.what, "where": where, "remedy": error.remedy}


class LocalPool:
    """Worker processes on this machine."""

    def __init__(self, num_workers: int) -> None:
        self._threads = ThreadPoolExecutor(num_workers)
        self._children: set[subprocess.Popen[str]] = set()
        self._lock, self._is_closed = threading.Lock(), False

    def room(self, num_jobs: int, alone: bool) -> int:
        """Return `num_jobs`."""
        return num_jobs

    def check(self) -> None:
        """Do nothing: a job ends with its process."""

    def start(self, job: WorkerJob, timeout_seconds: float | None, log: Log, alone: bool) -> Future[Outcome]:
        """Start a job. A process ends with the thread that started it, so that none outlives this one."""
        return self._threads.submit(attempt, job, timeout_seconds, log, self._note)

    def close(self) -> None:
        """Kill the processes that run."""
        with self._lock:
            self._is_closed = True
            for child in self._children:
                child.kill()
        self._threads.shutdown(cancel_futures=True)

    def _note(self, child: subprocess.Popen[str]) -> None:
        with self._lock:
            self._children = {each for each in self._children if each.poll() is None} | {child}
            if self._is_closed:  # a second attempt after the kill
                child.kill()


def run_all(
    pool: Pool, jobs: Iterator[tuple[Any, WorkerJob, float | None]], num_jobs: int, log: Log, alone: bool = False
) -> Iterator[tuple[Any, Outcome]]:
    """Run jobs, at most `num_jobs` at once on this machine, and yield each token with the outcome, in the order in
    which they end. `alone`: they measure time, and no two of them run at once on a machine of a scheduler.

    The next job is taken from the iterator when a worker is free. Raises UsageError if no job can end any more, after
    the outcomes that are known.
    """
    running: dict[Future[Outcome], Any] = {}
    is_empty = False
    while running or not is_empty:
        try:
            pool.check()
        except UsageError:
            for future in [each for each in running if each.done() and each.exception() is None]:
                yield running.pop(future), future.result()
            raise
        while not is_empty and len(running) < pool.room(num_jobs, alone):
            following = next(jobs, None)
            is_empty = following is None
            if following is not None:
                token, job, timeout_seconds = following
                running[pool.start(job, timeout_seconds, log, alone)] = token
        if not running:
            time.sleep(_FREE_SECONDS)
        ended, _ = wait(running, _WAIT_SECONDS, FIRST_COMPLETED)
        for future in sorted(ended, key=lambda each: each.exception() is not None):
            yield running.pop(future), future.result()
