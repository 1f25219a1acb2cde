"""Start a command, watch it from outside, and turn what it printed into a result."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finished:
    """What became of one process."""

    returncode: int
    """Negative: the signal that ended it."""
    timed_out: bool
    seconds: float
    lines: tuple[tuple[float, str], ...]
    """Each line of stdout, and when it came in seconds from the start."""
    errors: str
    peak_rss_bytes: int
    """As `wait4` tells it; never below the peak of the process that started it, which is kept small for that reason."""
    major_faults: int = 0
    """Pages that it waited for the disk for."""


def offramp(*words: object) -> list[str]:
    """The command line of offramp, in a process of its own."""
    return [sys.executable, "-m", "offramp", *map(str, words)]


def run(command: Sequence[str], environment: dict[str, str], timeout_seconds: float | None = None) -> Finished:
    """Run to the end, or kill at the time limit."""
    expired = threading.Event()
    with tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **environment}
        )

        def expire() -> None:
            expired.set()
            child.kill()

        timer = threading.Timer(timeout_seconds or threading.TIMEOUT_MAX, expire)
        timer.daemon = True
        timer.start()
        try:
            assert child.stdout is not None
            lines = tuple((time.perf_counter() - began, line) for line in child.stdout)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = code = os.waitstatus_to_exitcode(status)
        finally:
            timer.cancel()
            if child.returncode is None:  # interrupted
                child.kill()
                child.wait()
        seconds = time.perf_counter() - began
        errors.seek(0)
        peak_rss_bytes, faults = usage.ru_maxrss << 10, usage.ru_majflt
        return Finished(code, expired.is_set(), seconds, lines, errors.read(), peak_rss_bytes, faults)


def failure(done: Finished) -> str | None:
    """How it failed, in a few words, or None."""
    if done.timed_out:
        return f"did not finish in {done.seconds:.0f} s"
    if done.returncode < 0:
        return f"killed by signal {-done.returncode} after {done.seconds:.0f} s"
    if done.returncode:
        return f"exit {done.returncode}: {(done.errors.strip().splitlines() or ['no message'])[-1]}"
    return None


def json_result(command: Sequence[str], environment: dict[str, str]) -> dict[str, Any]:
    """The JSON object on the last line, or `{"failed": why}`."""
    done = run(command, environment)
    reason = failure(done)
    return {"failed": reason} if reason else json.loads(done.lines[-1][1])
