"""Processes that tests started: whether one still runs, and waiting with a limit."""

import time


def is_running(pid):
    """Return whether a process runs; a zombie that nobody has waited for yet has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, complaint):
    """Wait until a condition holds, half a minute at most."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.02)
