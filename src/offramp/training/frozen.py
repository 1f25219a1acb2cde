"""Heads on a model that stays as it is: what they see of each row is computed once and kept on disk.

Shapes: N rows, B rows of a batch, H hidden, C labels; K exits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from offramp.checkpoints.checkpoint import WithExits
from offramp.checkpoints.predict import AnyRows, pooled_windows


@dataclass(frozen=True, eq=False)
class PooledRows:
    """What the heads see of N rows, from a file that is read as batches need it."""

    pooled_NKH: np.ndarray
    labels_N: np.ndarray

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def lengths_N(self) -> np.ndarray:
        """All alike."""
        return np.ones(len(self), np.int64)

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """`pooled` [B, K - 1, H] and `labels`."""
        return {"pooled": self.pooled_NKH[indices], "labels": self.labels_N[indices]}


class Heads(nn.Module):
    """The heads of a model alone, on what they see."""

    def __init__(self, model: WithExits) -> None:
        super().__init__()
        self.heads = model.heads
        self._classify, self._owner = model.classify, [model]  # in a list: not a part of this module

    def train(self, mode: bool = True) -> Heads:
        """Dropout of the heads follows the owner's mode."""
        super().train(mode)
        self._owner[0].training = mode
        return self

    def forward(self, pooled: Tensor) -> list[Tensor]:
        """Logits [B, C] of each exit but the last, from `pooled` [B, K - 1, H]."""
        return self._classify(list(pooled.unbind(1)))


def pool_rows(model: WithExits, rows: AnyRows, batch_size: int, path: Path) -> PooledRows:
    """Run the model once over the rows; a whole file of an earlier attempt is used again."""
    if not path.is_file():
        shape = (len(rows), len(model.heads), model.pooled_size)
        partial = path.with_name(path.name + ".tmp")
        pooled_NKH = open_memmap(partial, "w+", np.float32, shape)
        with partial.open("r+b") as file:  # else a full disk would end the process where it writes
            os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        for start, window_NKH in pooled_windows(model, rows, batch_size):
            pooled_NKH[start : start + len(window_NKH)] = window_NKH
        pooled_NKH.flush()
        partial.replace(path)
    return PooledRows(np.load(path, mmap_mode="r", allow_pickle=False), rows.labels_N)
