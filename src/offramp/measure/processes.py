"""Child processes that end with their parent."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""Option of prctl(2): the signal that this process receives when its parent ends."""


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends. Other systems have no such call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def is_orphan(parent: int) -> bool:
    """Return whether the process with the id `parent` ended before `die_with_parent` took effect."""
    return os.getppid() != parent
