"""Decision whether to gather the remaining rows after others have left (F7 in docs/cost-function.md).

Gathering pays if computing the departed rows through the expected further layers would take longer. Both times are
learned from measurements that are passed in; no clock is read. Answers do not depend on the decision: rows that have
left are computed but ignored.
"""

from __future__ import annotations

from typing import Dict, Tuple

_RATE = 0.2
"""Weight of a new measurement in the exponential moving average."""
_DECAY = 0.98
"""Factor per decision applied to the time of gathering. A shape that was slow once is tried again after some hundred
decisions."""
Shape = Tuple[int, int]
"""Logarithmic size classes of rows and tokens."""


class Gathering:
    """Decides for batches of all shapes. Shapes in the same size class share their measurements."""

    def __init__(self) -> None:
        self._row_seconds: Dict[Shape, float] = {}
        self._gather_seconds: Dict[Shape, float] = {}
        self.always = False
        """Gather regardless of the estimate, to measure the cost of gathering."""

    def record_layer(self, num_rows: int, length: int, seconds: float) -> None:
        """Record the seconds of one layer for `num_rows` rows, including rows that have left."""
        _update_mean(self._row_seconds, _shape(num_rows, length), seconds / num_rows)

    def record_gathering(self, num_kept: int, length: int, seconds: float) -> None:
        """Record the seconds of gathering `num_kept` rows."""
        _update_mean(self._gather_seconds, _shape(num_kept, length), seconds)

    def pays(self, num_rows: int, num_kept: int, length: int, num_layers: float) -> bool:
        """Return whether to gather `num_kept` rows of a batch that is expected to execute `num_layers` further layers.

        Shapes without measurements return True.
        """
        here, kept = _shape(num_rows, length), _shape(num_kept, length)
        if self.always or here not in self._row_seconds or kept not in self._gather_seconds:
            return True
        if (num_rows - num_kept) * self._row_seconds[here] * num_layers > self._gather_seconds[kept]:
            return True
        self._gather_seconds[kept] *= _DECAY
        return False


def _shape(num_rows: int, length: int) -> Shape:
    return num_rows.bit_length(), length.bit_length()


def _update_mean(means: Dict[Shape, float], shape: Shape, seconds: float) -> None:
    before = means.get(shape, seconds)
    means[shape] = before + _RATE * (seconds - before)
