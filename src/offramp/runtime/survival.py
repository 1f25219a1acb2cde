"""Online estimate of exit probabilities, used to decide how far ahead to prefetch weights.

The estimate uses counts only (no timing) and treats rows as independent.

Shapes: B is the number of rows evaluated at an exit.
"""

from __future__ import annotations

import numpy as np

MIN_OBSERVATIONS = 8
"""Number of rows that must have been evaluated at an exit before prefetching may stop there."""


class ExitStatistics:
    """Per-exit counts of rows evaluated and rows that exited. Exit indices start at 1."""

    def __init__(self, num_exits: int) -> None:
        self.evaluated, self.exited = np.zeros(num_exits + 1, np.int64), np.zeros(num_exits + 1, np.int64)

    def record(self, exit_index: int, leave_B: np.ndarray) -> None:
        """Add one batch evaluated at `exit_index`; `leave_B` marks the rows that exit."""
        self.evaluated[exit_index] += len(leave_B)
        self.exited[exit_index] += int(leave_B.sum())

    def likely_empties(self, exit_index: int, num_rows: int) -> bool:
        """Return whether all `num_rows` rows exit at `exit_index` with estimated probability above 0.5."""
        evaluated = self.evaluated[exit_index]
        return bool(evaluated >= MIN_OBSERVATIONS and 2 * (self.exited[exit_index] / evaluated) ** num_rows > 1)

    def expected_layers(self, exit_index: int, last_exit: int, num_rows: int) -> float:
        """Return the expected number of further layers that a batch of `num_rows` rows executes after `exit_index`.

        A batch executes a layer while at least one of its rows remains.
        """
        layers, remaining = 0.0, 1.0
        for index in range(exit_index + 1, last_exit + 1):
            layers += 1 - (1 - remaining) ** num_rows
            if self.evaluated[index]:
                remaining *= 1 - float(self.exited[index] / self.evaluated[index])
        return layers
