"""Training of heads on a frozen model: the pooled hidden states of each row are computed once and cached on disk.

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

from offramp.checkpoints.checkpoint import WithExits, pooled_windows
from offramp.checkpoints.inputs import AnyRows


@dataclass(frozen=True, eq=False)
class PooledRows:
    """Head inputs of N rows, memory-mapped from a file."""

    pooled_NKH: np.ndarray
    """Input of each head, [N, K - 1, H]."""
    labels_N: np.ndarray
    """Label id or value of each row."""

    def __len__(self) -> int:
        return len(self.labels_N)

    @property
    def lengths_N(self) -> np.ndarray:
        """Ones: pooled rows have no length."""
        return np.ones(len(self), np.int64)

    def batch(self, indices: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """Return `pooled` [B, K - 1, H] and `labels` of the given rows."""
        return {"pooled": self.pooled_NKH[indices], "labels": self.labels_N[indices]}


class Heads(nn.Module):
    """The heads of a model as a module of their own, applied to pooled hidden states."""

    def __init__(self, model: WithExits) -> None:
        super().__init__()
        self.heads = model.heads
        self._classify, self._owner = model.classify, [model]  # in a list, so that it is not registered as a submodule

    def train(self, mode: bool = True) -> Heads:
        """Set the mode of the heads; their dropout follows the mode of the owner."""
        super().train(mode)
        self._owner[0].training = mode
        return self

    def forward(self, pooled: Tensor) -> list[Tensor]:
        """Return the logits [B, C] of each exit except the last, from `pooled` [B, K - 1, H]."""
        return self._classify(list(pooled.unbind(1)))


def pool_rows(model: WithExits, rows: AnyRows, batch_size: int, path: Path) -> PooledRows:
    """Return the head inputs of all rows, running the model once. A complete file of an earlier attempt is reused."""
    if not path.is_file():
        shape = (len(rows), len(model.heads), model.pooled_size)
        partial = path.with_name(path.name + ".tmp")
        pooled_NKH = open_memmap(partial, "w+", np.float32, shape)
        with partial.open("r+b") as file:  # otherwise a full disk would kill the process (SIGBUS)
            os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
        for start, window_NKH in pooled_windows(model, rows, batch_size):
            pooled_NKH[start : start + len(window_NKH)] = window_NKH
        pooled_NKH.flush()
        partial.replace(path)
    return PooledRows(np.load(path, mmap_mode="r", allow_pickle=False), rows.labels_N)
