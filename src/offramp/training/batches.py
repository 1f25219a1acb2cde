"""Composition and order of training batches, determined by the seed and the epoch alone.

Shapes: N rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

MEGABATCH = 50
"""Number of batches whose rows are sorted by length together."""


class LengthGroupedBatches(Sampler[list[int]]):
    """Batches of rows of similar length, in a random order that differs between epochs.

    The order depends only on the seed and the epoch number, so a resumed training sees the same batches.
    """

    drop_last = False  # accelerate reads this attribute

    def __init__(self, lengths_N: np.ndarray, batch_size: int, seed: int) -> None:
        self.lengths_N, self.batch_size, self.seed, self.epoch = lengths_N, batch_size, seed, 0

    def __len__(self) -> int:
        return math.ceil(len(self.lengths_N) / self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch number; the Trainer calls this before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order_N = generator.permutation(len(self.lengths_N))
        size = MEGABATCH * self.batch_size
        megabatches = [order_N[start : start + size] for start in range(0, len(order_N), size)]
        batches = []
        for rows in megabatches:
            rows = rows[np.argsort(self.lengths_N[rows], kind="stable")]
            batches += [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        num_full = len(order_N) // self.batch_size  # a short batch comes last: accelerate distributes only full ones
        for index in (*generator.permutation(num_full), *range(num_full, len(batches))):
            yield batches[index].tolist()
