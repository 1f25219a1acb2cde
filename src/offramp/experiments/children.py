"""Commands in processes of their own: what they print, or the error that they ended with.

A measurement needs a process to itself: peaks are those of whole processes.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from offramp.errors import BudgetError, DiskFullError, OfframpError, RefusedError, UsageError

_PREFIX = "offramp: error: "
_ERRORS = {error.exit_code: error for error in (UsageError, BudgetError, RefusedError, DiskFullError)}


def output_of(command: Sequence[str]) -> str:
    """What a command prints. Raises the OfframpError of its exit code, with the last line that it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        if done.returncode < 0 or not said:  # killed: what it said last was not why
            said = [f"a process ended with {done.returncode}"]
        raise _ERRORS.get(done.returncode, OfframpError)(said[-1].removeprefix(_PREFIX))
    return done.stdout
