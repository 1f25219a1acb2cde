"""The deadline guard: go on only if the next answer is likely to be there in time (F6 of the cost function).

It learns from what it sees, so that a disk which becomes slow leads to earlier exits and not to missed deadlines. It
reads no clock: times are given to it.
"""

from __future__ import annotations

from typing import Callable, Dict, Optional, Tuple, Union

from offramp.units import parse_duration

_FORGET = 0.98
"""A request. What was slow once is tried again after some hundred requests at the latest."""
Expected = Callable[[int, int], float]
"""(exit, tokens) -> seconds from the exit before to this one, seldom exceeded."""


def nothing_expected(exit_index: int, length: int) -> float:
    """Of a machine that nobody measured."""
    return 0.0


class NoDeadline:
    """The guard of requests without a deadline: never too late, and nothing to learn."""

    deadline_seconds = None
    needs_every_exit = False

    def begin(self) -> None:
        """Ignore a new request."""

    def saw(self, exit_index: int, length: int, seconds: float, compute_seconds: float) -> None:
        """Ignore how long an exit took."""

    def may_go_on(self, exit_index: int, length: int, elapsed_seconds: float) -> bool:
        """Return True."""
        return True

    def latest_seconds(self, exit_index: int, length: int) -> Optional[float]:
        """Return None: wait for weights as long as it takes."""
        return None


class DeadlineGuard:
    """Decides for one request at a time; `deadline_seconds` count from its start."""

    needs_every_exit = True
    """Every exit is evaluated, whatever the policy: under a deadline any answer is better than none."""

    def __init__(self, deadline_seconds: float, expected: Expected = nothing_expected) -> None:
        if not deadline_seconds > 0:
            raise ValueError(f"expected a deadline above 0, got {deadline_seconds}")
        self.deadline_seconds, self.expected = deadline_seconds, expected
        self._seen: Dict[Tuple[int, int], float] = {}
        self._computed: Dict[Tuple[int, int], float] = {}

    def begin(self) -> None:
        """A new request: what was seen before counts a little less."""
        for key in self._seen:
            self._seen[key] *= _FORGET
        for key in self._computed:
            self._computed[key] *= _FORGET

    def saw(self, exit_index: int, length: int, seconds: float, compute_seconds: float) -> None:
        """From the exit before to this one it took so long, of which computing took some."""
        key = (exit_index, length.bit_length())
        self._seen[key] = max(self._seen.get(key, 0.0), seconds)
        self._computed[key] = max(self._computed.get(key, 0.0), compute_seconds)

    def may_go_on(self, exit_index: int, length: int, elapsed_seconds: float) -> bool:
        """Whether the exit after `exit_index` is likely to be reached in time."""
        step = max(self.expected(exit_index + 1, length), self._seen.get((exit_index + 1, length.bit_length()), 0.0))
        return elapsed_seconds + step <= self.deadline_seconds

    def latest_seconds(self, exit_index: int, length: int) -> float:
        """Until when, from the start, it may be waited for weights, if the exit after `exit_index` is to answer."""
        return self.deadline_seconds - self._computed.get((exit_index + 1, length.bit_length()), 0.0)


Guard = Union[DeadlineGuard, NoDeadline]
NO_DEADLINE = NoDeadline()


def guard_for(deadline: Union[float, str, None]) -> Guard:
    """Return the guard of a deadline in seconds, or as text like `60ms`; None: no deadline. Raises ValueError."""
    return NO_DEADLINE if deadline is None else DeadlineGuard(parse_duration(deadline))
