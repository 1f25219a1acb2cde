"""The parent's side of worker processes. A measurement needs a process of its own, because peaks are those of whole
processes. Keeps to Python 3.8: `offramp profile` uses it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from typing import Any, Callable, Optional, Sequence

from offramp import errors
from offramp.backends import thread_variables
from offramp.errors import OfframpError
from offramp.experiments.jobs import WorkerJob
from offramp.units import format_duration

WORKER = (sys.executable, "-m", "offramp.experiments.worker")
Log = Callable[[str], None]


class LostError(OfframpError):
    """A worker process ended without a result: it was killed, or a library ended it."""


class TimedOutError(OfframpError):
    """A worker process exceeded its time limit."""


def ignore(line: str) -> None:
    """Log nothing."""


def run_worker(
    job: WorkerJob,
    log: Log = ignore,
    timeout_seconds: Optional[float] = None,
    started: Callable[[subprocess.Popen], None] = lambda child: None,
    within: Sequence[str] = (),
) -> Any:
    """Run a job in a process of its own and return its result. `log` receives its progress.

    `within` is put before the command of the worker, and becomes it by exec.

    Raises the OfframpError that the worker raised, LostError if it ended without a result, and TimedOutError. If the
    caller is interrupted, the worker is killed. `started` receives the process, which another thread may kill.
    """
    expired = threading.Event()
    threads = thread_variables(job.config.backend, job.config.threads) if job.config.threads else {}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": {**os.environ, **threads}}
    with tempfile.TemporaryFile("w+") as stderr:
        with subprocess.Popen([*within, *WORKER], stderr=stderr, universal_newlines=True, **pipes) as child:
            started(child)
            timer = _timer(child, timeout_seconds, expired)
            try:
                outcome = _converse(child, job, log)
            except BaseException:
                child.kill()
                raise
            finally:
                timer.cancel()
        stderr.seek(0)
        last = ""
        for last in filter(None, map(str.strip, stderr)):
            log(last)
    if expired.is_set() and "result" not in outcome:
        what = f"a worker process did not finish in {format_duration(timeout_seconds or 0)}"
        raise TimedOutError(what, None, "allow more time")
    if "error" in outcome:
        raise error_of(outcome["error"])
    if "result" not in outcome:  # a process that was killed has not printed the reason
        where = last if child.returncode >= 0 and last else None
        raise LostError(f"a worker process ended with {child.returncode} and no result", where)
    return outcome["result"]


def _timer(child: subprocess.Popen, seconds: Optional[float], expired: threading.Event) -> threading.Timer:
    """Start a timer that kills the worker; without a limit, return one that is not started."""

    def expire() -> None:
        expired.set()
        child.kill()

    timer = threading.Timer(seconds or 0, expire)
    timer.daemon = True
    if seconds is not None:
        timer.start()
    return timer


def _converse(child: subprocess.Popen, job: WorkerJob, log: Log) -> dict[str, Any]:
    """Send the job, pass on the progress, and return the last message; {} if there was none."""
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(json.dumps({**job.to_json(), "parent": os.getpid()}))
        child.stdin.close()
    except BrokenPipeError:  # the worker has ended: its messages, if any, give the reason
        pass
    outcome: dict[str, Any] = {}
    for line in child.stdout:
        try:
            message = json.loads(line)
            known = isinstance(message, dict) and set(message) <= {"progress", "result", "error"}
        except ValueError:
            message, known = {}, False
        if not known:
            log(f"a worker process printed a line that is no message: {line.strip()}")
        elif "progress" in message:
            log(message["progress"])
        else:
            outcome = message
    return outcome


def error_of(tree: dict[str, Any]) -> OfframpError:
    """Return the error that a worker described, as its own class."""
    known = {**vars(errors), TimedOutError.__name__: TimedOutError}  # of a process that the worker started
    kind = known.get(str(tree.get("class")), OfframpError)
    error = kind.__new__(kind)  # MissingExtraError has other arguments than its base
    OfframpError.__init__(error, tree["what"], tree["where"], tree["remedy"])
    error.environment = tree.get("environment")
    return error
