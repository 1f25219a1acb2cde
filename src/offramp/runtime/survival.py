"""Where rows have left so far, and what that says of those to come. Counts, no clock.

Shapes: B rows that came to an exit.
"""

from __future__ import annotations

import numpy as np

GATE_AFTER_ROWS = 8
"""Look-ahead stops at a likely exit once this many rows have been seen to get there."""


class Survival:
    """How many rows were asked at each exit, from 1, and how many left there."""

    def __init__(self, num_exits: int) -> None:
        self.reached, self.left = np.zeros(num_exits + 1, np.int64), np.zeros(num_exits + 1, np.int64)

    def saw(self, exit_index: int, leave_B: np.ndarray) -> None:
        """These rows came to an exit, and some left."""
        self.reached[exit_index] += len(leave_B)
        self.left[exit_index] += int(leave_B.sum())

    def ends_at(self, exit_index: int, num_rows: int) -> bool:
        """Whether so many rows that come to this exit are more likely than not to leave there all; independently."""
        reached = self.reached[exit_index]
        return bool(reached >= GATE_AFTER_ROWS and 2 * (self.left[exit_index] / reached) ** num_rows > 1)

    def layers_ahead(self, exit_index: int, last_exit: int, num_rows: int) -> float:
        """How many layers a batch of rows that go on after this exit is expected to go through yet.

        It goes through a layer as long as one of them is still there; rows are taken to leave independently.
        """
        layers, stays = 0.0, 1.0
        for index in range(exit_index + 1, last_exit + 1):
            layers += 1 - (1 - stays) ** num_rows
            if self.reached[index]:
                stays *= 1 - float(self.left[index] / self.reached[index])
        return layers
