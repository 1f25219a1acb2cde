"""Latency of exiting at each exit as a function of sequence length.

Holds measured values; measuring is done by `offramp.profiling`.

Shapes: L lengths, K exits, B rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Tuple

import numpy as np


@dataclass(frozen=True)
class Costs:
    """Measured latency from the start of a row to its answer at each exit."""

    lengths: Tuple[int, ...]
    """Sequence lengths in tokens, strictly increasing [L]."""
    seconds: Tuple[Tuple[float, ...], ...]
    """Latency in seconds from the start of a row to its answer [L, K], strictly increasing along K."""

    def __post_init__(self) -> None:
        rows = {len(row) for row in self.seconds}
        if not self.lengths or len(self.seconds) != len(self.lengths) or len(rows) != 1 or 0 in rows:
            raise ValueError(f"seconds must have shape [L, K] for {len(self.lengths)} lengths, L >= 1, K >= 1")
        if list(self.lengths) != sorted({*self.lengths}) or self.lengths[0] < 1:
            raise ValueError(f"lengths must be strictly increasing and >= 1, got {self.lengths}")
        for row in self.seconds:
            if not all(0 <= low < high < math.inf for low, high in zip((0.0, *row), (*row, row[-1] + 1))):
                raise ValueError(f"seconds must be finite, >= 0 and strictly increasing from exit to exit, got {row}")

    @property
    def num_exits(self) -> int:
        """Number of exits, K."""
        return len(self.seconds[0])

    def at(self, lengths_B: np.ndarray) -> np.ndarray:
        """Return the latency in seconds [B, K] for rows of the given lengths in tokens [B].

        Interpolates linearly between lengths; clamps outside the measured range.
        """
        lengths_L, seconds_LK = np.array(self.lengths, np.float64), np.array(self.seconds, np.float64)
        return np.stack([np.interp(lengths_B, lengths_L, seconds_L) for seconds_L in seconds_LK.T], axis=1)


def as_tuples(value: Any) -> Any:
    """Convert nested lists to nested tuples (JSON has no tuples)."""
    return tuple(as_tuples(each) for each in value) if isinstance(value, (list, tuple)) else value
