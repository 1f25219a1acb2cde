"""Deadline guard: continue only if the next exit is likely to be reached in time (F6 in docs/cost-function.md).

The guard learns from measured times, so a disk that becomes slow leads to earlier exits instead of missed deadlines. It
reads no clock: all times are passed in.
"""

from __future__ import annotations

from typing import Callable, Dict, Optional, Tuple, Union

from offramp.units import parse_duration

_DECAY = 0.98
"""Factor per request applied to learned times. A step that was slow once is tried again after at most some hundred
requests."""
Expected = Callable[[int, int], float]
"""Function (exit, tokens) -> upper estimate of the seconds from the previous exit to this one."""


class NoDeadline:
    """The guard of requests without a deadline: never too late, and nothing to learn."""

    deadline_seconds = None
    needs_every_exit = False

    def begin(self) -> None:
        """Ignore a new request."""

    def record(self, exit_index: int, length: int, seconds: float, compute_seconds: float) -> None:
        """Ignore how long an exit took."""

    def allows_next_exit(self, exit_index: int, length: int, elapsed_seconds: float) -> bool:
        """Return True."""
        return True

    def latest_seconds(self, exit_index: int, length: int) -> Optional[float]:
        """Return None: wait for weights as long as it takes."""
        return None


class DeadlineGuard:
    """Decides for one request at a time. `deadline_seconds` count from the start of the request."""

    needs_every_exit = True
    """Every exit is evaluated, whatever the policy: under a deadline any answer is better than none."""

    def __init__(self, deadline_seconds: float, expected: Expected = lambda *_: 0.0) -> None:
        if not deadline_seconds > 0:
            raise ValueError(f"deadline_seconds must be positive, got {deadline_seconds}")
        self.deadline_seconds, self.expected = deadline_seconds, expected
        self._learned: Dict[Tuple[int, int], Tuple[float, float]] = {}
        """Exit, size class of the tokens -> most seconds from the previous exit, and most of them spent computing."""

    def begin(self) -> None:
        """Start a new request and decay the learned times."""
        for key, (seconds, compute_seconds) in self._learned.items():
            self._learned[key] = (seconds * _DECAY, compute_seconds * _DECAY)

    def record(self, exit_index: int, length: int, seconds: float, compute_seconds: float) -> None:
        """Record the seconds from the previous exit to this one, and the part of them spent computing."""
        most_seconds, most_computing = self._most(exit_index, length)
        most = (max(most_seconds, seconds), max(most_computing, compute_seconds))
        self._learned[exit_index, length.bit_length()] = most

    def allows_next_exit(self, exit_index: int, length: int, elapsed_seconds: float) -> bool:
        """Return whether the exit after `exit_index` is likely to be reached in time."""
        step = max(self.expected(exit_index + 1, length), self._most(exit_index + 1, length)[0])
        return elapsed_seconds + step <= self.deadline_seconds

    def latest_seconds(self, exit_index: int, length: int) -> float:
        """Return the latest time to wait for weights, in seconds from the start of the request.

        Later, the exit after `exit_index` can no longer answer in time.
        """
        return self.deadline_seconds - self._most(exit_index + 1, length)[1]

    def _most(self, exit_index: int, length: int) -> Tuple[float, float]:
        return self._learned.get((exit_index, length.bit_length()), (0.0, 0.0))


Guard = Union[DeadlineGuard, NoDeadline]
NO_DEADLINE = NoDeadline()


def guard_for(deadline: Union[float, str, None]) -> Guard:
    """Return the guard of a deadline in seconds, or as text like `60ms`; None: no deadline. Raises ValueError."""
    return NO_DEADLINE if deadline is None else DeadlineGuard(parse_duration(deadline))
