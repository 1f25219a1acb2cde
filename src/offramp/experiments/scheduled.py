"""The pool of a scheduler of dask: its workers receive jobs as JSON, and start a process for each.

This process chooses the worker of each job: it counts attempts itself, whatever number of failures the scheduler
allows, and gives no two jobs that measure time to one machine.
"""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from offramp.errors import UsageError, import_error, said
from offramp.experiments.children import Log, LostError
from offramp.experiments.jobs import WorkerJob
from offramp.experiments.pools import KILLED, MAX_ATTEMPTS, Outcome, attempt, failure_of
from offramp.experiments.specification import Experiment

_CONNECT_SECONDS = 10
"""Most seconds until a scheduler answers, and until it has its first worker."""
_RESTART_SECONDS = 60
"""Most seconds of a sweep without any worker: a nanny starts another in place of one that was killed."""
_ANSWER_SECONDS = 60
"""Most seconds until a scheduler that is connected answers a question."""
_LOOK_SECONDS = 0.5
"""Seconds between two questions for the workers."""
_BEGUN = ("processing-tasks", "lost-computed-tasks")
"""Keys of the tasks that a worker had begun when it was lost, in the events of a scheduler."""
_AGAIN = "run the command again: records are kept"


@dataclass(eq=False)
class _Sent:
    """A job, and the attempt that runs."""

    text: str
    log: Log
    alone: bool
    found: Future[Outcome]
    worker: str | None = None
    """Address of the worker that runs it; None: it waits for one."""
    remote: Any = None
    """Future of dask of the attempt."""
    began: float = 0.0
    attempts: int = 0
    seconds: float = 0.0
    """Seconds of the attempts that have ended."""


class ScheduledPool:
    """Workers of a dask scheduler.

    Models, data and results must lie at the same paths on all machines. Raises UsageError for a scheduler that does not
    answer or has no worker, and for one on another machine without TLS.
    """

    def __init__(self, address: str) -> None:
        require_safe(address)
        self._address, self._client = address, connect(address)
        self._machines: dict[str, str] = {}
        """Address of each worker -> its machine, once it is known."""
        self._asked: dict[str, Any] = {}
        """Address of each worker -> the future of dask of its machine."""
        self._sent: list[_Sent] = []
        self._lock = threading.Lock()
        self._refusal: UsageError | None = None
        self._next_look = self._last_seen = time.monotonic()
        try:
            while not self._asked:
                self._look(_CONNECT_SECONDS)
                time.sleep(_LOOK_SECONDS if not self._asked else 0)
        except BaseException:
            self.close()
            raise

    def room(self, num_jobs: int, alone: bool) -> int:
        """Return the number of workers; of machines, if jobs are to run alone."""
        with self._lock:
            return len(set(self._machines.values())) if alone else len(self._machines)

    def start(self, job: WorkerJob, timeout_seconds: float | None, log: Log, alone: bool) -> Future[Outcome]:
        """Submit a job to a free worker. Where the worker is lost, another one receives the job."""
        text = json.dumps({"job": job.to_json(), "timeout": timeout_seconds})
        sent = _Sent(text, log, alone, Future())
        self._sent.append(sent)
        self._place(sent)
        return sent.found

    def check(self) -> None:
        """Take jobs back from lost workers and give them to others.

        Raises UsageError if the scheduler is gone, has no workers any more, or has one that cannot run jobs.
        """
        if self._client.status != "running":
            raise self._gone("the connection is lost")
        if self._refusal is not None:
            raise self._refusal
        if time.monotonic() >= self._next_look:
            self._look(_RESTART_SECONDS)
        self._sent = [sent for sent in self._sent if not sent.found.done()]
        for sent in self._sent:
            if sent.worker is None:
                self._place(sent)

    def close(self) -> None:
        """Cancel the jobs and disconnect."""
        logger = logging.getLogger("distributed.client")
        logger.disabled = True  # pages about a connection that is lost, of which the sweep has told
        with contextlib.suppress(Exception):  # the scheduler may be gone
            self._client.close(timeout=_CONNECT_SECONDS)
        logger.disabled = False

    def _ask(self, question: Callable[[], Any]) -> Any:
        """Return what the scheduler answers. Raises UsageError if it is gone."""
        try:
            return question()
        except Exception as error:  # of dask or of the system, by the moment at which the connection broke
            raise self._gone(said(error)) from None

    def _look(self, max_seconds: float) -> None:
        """Ask which workers there are. Raises UsageError if there have been none for so long."""
        workers = set(self._ask(lambda: self._client.nthreads(callback_timeout=_ANSWER_SECONDS)))
        now = time.monotonic()
        self._next_look = now + _LOOK_SECONDS
        if workers:
            self._last_seen = now
        elif now - self._last_seen > max_seconds:
            remedy = f"start one: dask worker ADDRESS --nthreads 1, and {_AGAIN}"
            raise UsageError("the scheduler has no worker", self._address, remedy)
        self._note(workers)

    def _note(self, workers: set[str]) -> None:
        """Ask new workers for their machines, and take jobs back from those that are lost."""
        for address in workers - set(self._asked):
            self._asked[address] = remote = self._client.submit(machine_id, workers=[address], pure=False)
            remote.add_done_callback(lambda done, address=address: self._note_machine(address, done))
        with self._lock:
            for address in set(self._asked) - workers:
                self._asked.pop(address).release()
                self._machines.pop(address, None)
        for sent in self._sent:
            if sent.worker is not None and sent.worker not in workers:
                self._take_back(sent, sent.worker)

    def _take_back(self, sent: _Sent, worker: str) -> None:
        """Take a job back from a lost worker; an attempt that the worker had not begun does not count."""
        remote = sent.remote
        if remote is None:  # it has ended meanwhile
            return
        answer = self._ask(lambda: self._client.get_events(worker))
        events = [event for _, event in answer if isinstance(event, dict)]
        begun = [event[name] for event in events for name in _BEGUN if name in event]
        was_begun = not begun or any(remote.key in keys for keys in begun)
        self._end(sent, remote, _lost(worker) if was_begun else None)

    def _note_machine(self, address: str, done: Any) -> None:
        """Note the machine of a worker, which is used from then on. Called in a thread of dask."""
        try:
            machine = done.result()
        except Exception as error:
            if done.status == "error" and not _is_lost(error):
                self._refusal = self._unable(address, error)
            return  # a worker or scheduler that is lost is seen by the next look
        with self._lock:
            if self._asked.get(address) is done:
                self._machines[address] = machine

    def _place(self, sent: _Sent) -> None:
        """Submit a job to a free worker, if there is one, on a machine without jobs if it is to run alone."""
        with self._lock:
            busy = {each.worker for each in self._sent if each.worker is not None}
            machines = {self._machines.get(address) for address in busy} if sent.alone else set()
            free = [each for each, machine in self._machines.items() if each not in busy and machine not in machines]
            if not free or sent.worker is not None or sent.found.done():  # it has ended meanwhile
                return
            sent.worker, sent.began = free[0], time.perf_counter()
            sent.remote = self._client.submit(run_remotely, sent.text, workers=[sent.worker], pure=False)
        sent.remote.add_done_callback(lambda done: self._receive(sent, done))

    def _receive(self, sent: _Sent, done: Any) -> None:
        """Note what became of an attempt. Called in a thread of dask."""
        try:
            answer = json.loads(done.result())
        except Exception as error:
            if done.status == "error" and _is_lost(error):
                self._end(sent, done, _lost(str(sent.worker)))
                return
            with self._lock:
                if sent.remote is done:  # else it was taken back, and this is its cancellation
                    unable = done.status == "error"
                    refusal = self._unable(str(sent.worker), error) if unable else self._gone(said(error))
                    sent.remote = None
                    sent.found.set_exception(refusal)
            return
        for line in answer["lines"]:
            sent.log(line)
        self._end(sent, done, answer["outcome"])

    def _end(self, sent: _Sent, remote: Any, outcome: Outcome | None) -> None:
        """End an attempt: with the outcome of the job, or so that another worker receives it.

        `outcome` is None if the attempt had not begun.
        """
        with self._lock:
            if sent.remote is not remote:  # it has ended before
                return
            sent.remote, sent.worker = None, None
            if outcome is not None:
                sent.attempts += 1
                sent.seconds += outcome.get("seconds", time.perf_counter() - sent.began)
                is_lost = "error" in outcome and outcome["error"]["kind"] == KILLED
                if not is_lost or sent.attempts == MAX_ATTEMPTS:
                    sent.found.set_result({**outcome, "attempts": sent.attempts, "seconds": sent.seconds})
        remote.release()

    def _gone(self, reason: str) -> UsageError:
        return UsageError(f"the scheduler is gone ({reason})", self._address, f"start it, and {_AGAIN}")

    def _unable(self, worker: str, error: Exception) -> UsageError:
        what = f"a worker of the scheduler cannot run jobs ({said(error)})"
        return UsageError(what, worker, f"install the same offramp there as here, and {_AGAIN}")


def connect(address: str) -> Any:
    """Return the client of a scheduler. Raises UsageError if it does not answer."""
    try:
        import distributed
    except ImportError as error:
        raise import_error(error, "distributed", "sweep") from None
    security = _certificates(distributed, address) if address.startswith("tls://") else None
    try:
        return distributed.Client(address, timeout=_CONNECT_SECONDS, security=security, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        what = f"no scheduler answers ({said(error)})"
        raise UsageError(what, address, "start one: dask scheduler, and dask worker ADDRESS --nthreads 1") from None


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


def _lost(worker: str) -> Outcome:
    return {"error": failure_of(LostError(f"the worker of this job was lost ({worker})"))}


def _is_lost(error: Exception) -> bool:
    """Return whether dask gave a job up because its workers were lost."""
    return type(error).__name__ == "KilledWorker"


def run_remotely(text: str) -> str:
    """Run a job, as JSON, once, on the machine of a worker; return the outcome and the lines of its log as JSON."""
    tree, lines = json.loads(text), []
    outcome = attempt(WorkerJob.from_json(tree["job"]), tree["timeout"], lines.append, max_attempts=1)
    return json.dumps({"outcome": outcome, "lines": lines})


def machine_id() -> str:
    """Return what tells this machine from others, also in a container, which has an address of its own."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        return platform.node()


def require_unplaced(address: str, experiments: Sequence[Experiment]) -> None:
    """Raise UsageError for experiments of one machine: a scheduler gives jobs to any of its workers.

    `device` names the machine, and every `tune:` needs a profile of the machine on which its policy runs.
    """
    require_safe(address)
    for each in experiments:
        exit, part = each.engine.exit, None
        if each.device is not None:
            part = f"device={each.device} is of one machine"
        elif exit.startswith("tune:"):
            part = f"exit={exit} is tuned with the profile of one machine"
        if part is not None:
            what = f"{part}, and a scheduler gives jobs to any of its workers"
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
