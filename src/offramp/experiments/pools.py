"""Pools run jobs, each in a process of its own, and give back what became of them: here, or by a scheduler of dask.

An outcome is a tree of plain values: `result`, or `error` with the kind of the failure and the `environment` of the
process that failed; `seconds`, `attempts`. A job whose process was killed is tried once more.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol
from urllib.parse import urlsplit

from offramp.errors import (
    AbsentError,
    BudgetError,
    ChangedError,
    DiskFullError,
    OfframpError,
    RefusedError,
    UsageError,
    import_error,
    said,
)
from offramp.experiments.children import Log, LostError, TimedOutError, ignore, run_worker
from offramp.experiments.jobs import WorkerJob
from offramp.experiments.specification import Experiment
from offramp.measure.conditions import surroundings

Outcome = dict[str, Any]
MAX_ATTEMPTS = 2
"""Attempts for a job whose process is killed. Other failures are not tried again."""
_CONNECT_SECONDS = 10
_WAIT_SECONDS = 1
"""Longest wait at once: a Ctrl-C that comes just before a wait is seen only after it."""
CHANGED = "changed"
"""Kind of the failure of a job whose model or data were replaced while the sweep ran."""
_KINDS: dict[type, str] = {
    LostError: "killed", TimedOutError: "timeout", BudgetError: "memory", AbsentError: "absent",
    DiskFullError: "disk", ChangedError: CHANGED, UsageError: "refused", RefusedError: "refused",
}  # fmt: skip
"""Class of an error -> kind of the failure in records; `error` for others."""
RECORDED = ("killed", "timeout", "memory", "refused", "absent", "error")
"""Kinds of failures that records have: of the others, the sweep ends without a record."""


class Pool(Protocol):
    """Runs jobs beside each other."""

    num_workers: int
    is_here: bool
    """True if jobs run on this machine."""

    def start(self, job: WorkerJob, timeout_seconds: float | None, log: Log) -> Future[Outcome]:
        """Start a job and return the future of its outcome."""
        ...

    def close(self) -> None:
        """End all jobs that run."""
        ...


def attempt(
    job: WorkerJob, timeout_seconds: float | None, log: Log = ignore,
    started: Callable[[subprocess.Popen[str]], None] = lambda child: None,
) -> Outcome:  # fmt: skip
    """Run a job in a process of its own and return its outcome; a lost process is tried again."""
    began = time.perf_counter()
    for number in range(1, MAX_ATTEMPTS + 1):
        try:
            outcome: Outcome = {"result": run_worker(job, log, timeout_seconds, started)}
        except OfframpError as error:
            if isinstance(error, LostError) and number < MAX_ATTEMPTS:
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

    is_here = True

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._threads = ThreadPoolExecutor(num_workers)
        self._children: set[subprocess.Popen[str]] = set()
        self._lock, self._is_closed = threading.Lock(), False

    def start(self, job: WorkerJob, timeout_seconds: float | None, log: Log) -> Future[Outcome]:
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


class ScheduledPool:
    """Workers of a dask scheduler, which receive jobs as JSON and start a process for each.

    Models, data and results must lie at the same paths on all machines. Raises UsageError for a scheduler that does not
    answer, and for one on another machine without TLS.
    """

    is_here = False

    def __init__(self, address: str) -> None:
        require_safe(address)
        try:
            import distributed
        except ImportError as error:
            raise import_error(error, "distributed", "sweep") from None
        security = _certificates(distributed, address) if address.startswith("tls://") else None
        try:
            self._client = distributed.Client(
                address, timeout=_CONNECT_SECONDS, security=security, set_as_default=False
            )
        except (OSError, TimeoutError, ValueError) as error:
            what = f"no scheduler answers ({said(error)})"
            raise UsageError(what, address, "start one: dask scheduler, and dask worker ADDRESS --nthreads 1") from None
        cores: Any = self._client.ncores()  # a coroutine for clients of another kind
        self.num_workers = max(1, len(cores))

    def start(self, job: WorkerJob, timeout_seconds: float | None, log: Log) -> Future[Outcome]:
        """Submit a job. Where the worker is lost, the scheduler gives the job to another."""
        found: Future[Outcome] = Future()
        text = json.dumps({"job": job.to_json(), "timeout": timeout_seconds})
        remote = self._client.submit(run_remotely, text, pure=False)
        remote.add_done_callback(lambda done: found.set_result(_outcome_of(done)))
        return found

    def close(self) -> None:
        """Cancel the jobs and disconnect."""
        with contextlib.suppress(Exception):  # the scheduler may be gone
            self._client.close(timeout=_CONNECT_SECONDS)


def _certificates(distributed: Any, address: str) -> Any:
    """Return the TLS settings of dask's configuration. Raises UsageError for none, and for unreadable files."""
    security, reason = distributed.Security(require_encryption=True), "dask's configuration names none"
    try:
        if security.get_connection_args("client")["ssl_context"] is not None:
            return security
    except OSError as error:  # ssl.SSLError is one
        reason = said(error)
    prefix = "DASK_DISTRIBUTED__COMM__TLS__"
    remedy = f"set {prefix}CA_FILE, {prefix}CLIENT__CERT and {prefix}CLIENT__KEY to files in PEM"
    raise UsageError(f"no certificates for TLS ({reason})", address, remedy)


def run_remotely(text: str) -> str:
    """Run a job, as JSON, on the machine of a worker; return the outcome as JSON."""
    tree = json.loads(text)
    return json.dumps(attempt(WorkerJob.from_json(tree["job"]), tree["timeout"]))


def _outcome_of(done: Any) -> Outcome:
    """Return the outcome of a dask future: of a job whose workers were lost several times, an error."""
    try:
        return json.loads(done.result())
    except Exception as error:
        lost = LostError(f"the workers of this job were lost ({said(error)})")
        return {"error": failure_of(lost), "attempts": MAX_ATTEMPTS, "seconds": 0.0}


def require_unplaced(address: str, experiments: Sequence[Experiment]) -> None:
    """Raise UsageError for experiments of one machine: a scheduler gives jobs to any of its workers.

    `device` names the machine, and `tune:latency` is a latency of the machine that is profiled.
    """
    require_safe(address)
    for each in experiments:
        part = f"device={each.device}" if each.device else f"exit={each.engine.exit}"
        if each.device is not None or each.engine.exit.startswith("tune:latency"):
            what = f"{part} is of one machine, and a scheduler gives jobs to any of its workers"
            error = UsageError(what, each.model, "run this experiment there, without --scheduler")
            raise error.placed(each.place)


def require_safe(address: str) -> None:
    """Raise UsageError for an address that is none, and for another machine without TLS."""
    try:
        found = urlsplit(address)
        is_address = found.scheme in ("tcp", "tls") and bool(found.hostname) and found.port is not None
    except ValueError:
        found, is_address = None, False
    if found is None or not is_address:
        raise UsageError("not the address of a scheduler", address, "give tcp://localhost:8786 or tls://HOST:8786")
    if found.scheme == "tcp" and not _is_this_machine(str(found.hostname)):
        what = "a scheduler on another machine needs TLS: without it, any machine that reaches it can run code there"
        raise UsageError(what, address, f"start it with certificates, and give tls://{found.netloc}")


def _is_this_machine(host: str) -> bool:
    return host in ("localhost", "::1", socket.gethostname()) or host.startswith("127.")


def run_all(
    pool: Pool, jobs: Iterator[tuple[Any, WorkerJob, float | None]], num_workers: int, log: Log
) -> Iterator[tuple[Any, Outcome]]:
    """Run jobs, at most `num_workers` at once, and yield each token with the outcome, in the order in which they end.

    The next job is taken from the iterator when a worker is free.
    """
    running: dict[Future[Outcome], Any] = {}
    is_empty = False
    while running or not is_empty:
        while not is_empty and len(running) < num_workers:
            following = next(jobs, None)
            is_empty = following is None
            if following is not None:
                token, job, timeout_seconds = following
                running[pool.start(job, timeout_seconds, log)] = token
        ended, _ = wait(running, _WAIT_SECONDS, FIRST_COMPLETED)
        for future in ended:
            yield running.pop(future), future.result()
