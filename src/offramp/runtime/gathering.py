"""Whether the rows that stay are gathered when others leave (F7 of the cost function): if going on with those that have
left, through the layers that are still to come, would take longer than the gathering.

It learns both from what it sees, and reads no clock: times are given to it. It moves no row, and no answer depends on
what it says: rows that have left are carried and not looked at.
"""

from __future__ import annotations

from typing import Dict, Tuple

_RATE = 0.2
"""Of a new measurement in the mean."""
_FORGET = 0.98
"""A decision. What was slow to gather once is tried again after some hundred decisions at the latest."""
Shape = Tuple[int, int]


class Gathering:
    """Decides for batches of all shapes; rows and tokens that are alike share what was seen."""

    def __init__(self) -> None:
        self._row_seconds: Dict[Shape, float] = {}
        self._gather_seconds: Dict[Shape, float] = {}
        self.always = False
        """Gather whether it pays or not, to see what it takes."""

    def saw_layer(self, num_rows: int, length: int, seconds: float) -> None:
        """A layer computed so many rows in so many seconds, those that have left included."""
        _learn(self._row_seconds, _shape(num_rows, length), seconds / num_rows)

    def saw_gathering(self, num_kept: int, length: int, seconds: float) -> None:
        """So many rows were gathered in so many seconds."""
        _learn(self._gather_seconds, _shape(num_kept, length), seconds)

    def pays(self, num_rows: int, num_kept: int, length: int, num_layers: float) -> bool:
        """Whether to keep only some of the rows of a batch that is expected to go through so many layers yet.

        What was never seen is tried.
        """
        here, kept = _shape(num_rows, length), _shape(num_kept, length)
        if self.always or here not in self._row_seconds or kept not in self._gather_seconds:
            return True
        if (num_rows - num_kept) * self._row_seconds[here] * num_layers > self._gather_seconds[kept]:
            return True
        self._gather_seconds[kept] *= _FORGET
        return False


def _shape(num_rows: int, length: int) -> Shape:
    return num_rows.bit_length(), length.bit_length()


def _learn(means: Dict[Shape, float], shape: Shape, seconds: float) -> None:
    before = means.get(shape, seconds)
    means[shape] = before + _RATE * (seconds - before)
