"""Commands in processes of their own: what they print, or the error that they ended with.

A measurement needs a process to itself: peaks are those of whole processes.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Sequence

from offramp.errors import BudgetError, DiskFullError, OfframpError, RefusedError, UsageError

_PREFIX = "offramp: error: "
_ERRORS = {error.exit_code: error for error in (UsageError, BudgetError, RefusedError, DiskFullError)}


def output_of(command: Sequence[str], say: Callable[[str], None] = lambda line: None) -> str:
    """What a command prints; what it says meanwhile is passed on. Raises the OfframpError of its exit code, with the
    last line that it said.
    """
    said: list[str] = []
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(command, stdout=output, stderr=subprocess.PIPE, text=True) as child:
            assert child.stderr is not None
            try:
                for line in filter(None, map(str.strip, child.stderr)):
                    said.append(line)
                    if not line.startswith(_PREFIX):
                        say(line)
            except BaseException:  # nobody listens any more: it must not go on alone
                child.kill()
                raise
        if child.returncode:
            if child.returncode < 0 or not said:  # killed: what it said last was not why
                said = [f"a process ended with {child.returncode}"]
            raise _ERRORS.get(child.returncode, OfframpError)(said[-1].removeprefix(_PREFIX))
        output.seek(0)
        return output.read()
