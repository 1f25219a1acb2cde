"""What it costs to leave at each exit, by the tokens of a row: measured elsewhere, plain numbers here.

Shapes: L lengths, K exits, B rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Tuple

import numpy as np


@dataclass(frozen=True)
class Costs:
    """Seconds from the start of a row to its answer at each exit."""

    lengths: Tuple[int, ...]
    """Tokens, growing."""
    seconds: Tuple[Tuple[float, ...], ...]
    """[L, K], growing from exit to exit."""

    def __post_init__(self) -> None:
        rows = {len(row) for row in self.seconds}
        if not self.lengths or len(self.seconds) != len(self.lengths) or len(rows) != 1 or 0 in rows:
            raise ValueError(f"expected seconds [L, K] for {len(self.lengths)} lengths, L >= 1, K >= 1")
        if list(self.lengths) != sorted({*self.lengths}) or self.lengths[0] < 1:
            raise ValueError(f"expected lengths that grow from 1 on, got {self.lengths}")
        for row in self.seconds:
            if not all(0 <= low < high < math.inf for low, high in zip((0.0, *row), (*row, row[-1] + 1))):
                raise ValueError(f"expected seconds that grow from exit to exit, got {row}")

    @property
    def num_exits(self) -> int:
        """K."""
        return len(self.seconds[0])

    def at(self, lengths_B: np.ndarray) -> np.ndarray:
        """Seconds [B, K] for rows of so many tokens: linear between lengths, the nearest beyond them."""
        columns = zip(*self.seconds)
        return np.stack([np.interp(lengths_B, self.lengths, column) for column in columns], axis=1)


def as_tuples(value: Any) -> Any:
    """What JSON made a list, as a tuple, at every depth."""
    return tuple(as_tuples(each) for each in value) if isinstance(value, (list, tuple)) else value
