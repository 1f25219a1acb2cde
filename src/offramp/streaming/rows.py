"""Operations that need only some rows of a weight at a time, read from the store when they run.

Shapes: N rows of a table or matrix, W its width.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from offramp.store import Store
from offramp.streaming.placeholders import ADDMM, LOOK_UP, MM, Placeholder
from offramp.streaming.placement import DTYPES


class WeightRows:
    """Computes look-ups and linear layers from rows of their weights."""

    def __init__(self, store: Store, sliced: Set[str], slice_bytes: int) -> None:
        """`sliced` shards are read `slice_bytes` at a time."""
        self._store, self._sliced, self._slice_bytes = store, sliced, slice_bytes
        self._tensors = store.manifest.tensors()
        self.bytes_read = 0

    def substitute(self, weight: Placeholder, function: Any, args: tuple, kwargs: dict) -> Any:
        """Return the result of an operation on a weight, or NotImplemented if it needs the whole weight."""
        name = weight.weight_name
        shard, tensor = self._tensors[name]
        if function is LOOK_UP and shard.blocks is not None:
            indices = args[1]
            return self._rows(name, indices.reshape(-1).numpy()).view(*indices.shape, tensor.shape[1])
        if function is functional.linear and shard.name in self._sliced:
            return self._linear(name, *args, **kwargs)
        if function in (MM, ADDMM) and shard.name in self._sliced and not kwargs:
            *start, left, _ = args
            return self._product(name, left, *start)
        return NotImplemented

    def _linear(self, name: str, input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """Compute some outputs at a time. The last bits may differ from those of the whole product."""
        parts = [
            functional.linear(input, rows, None if bias is None else bias[start:end])
            for start, end, rows in self._slices(name)
        ]
        return torch.cat(parts, -1)

    def _product(self, name: str, left: Tensor, total: Tensor | None = None) -> Tensor:
        """Sum products of some columns of the left matrix with the matching rows of the weight."""
        for start, end, rows in self._slices(name):
            part = left[:, start:end]
            total = part @ rows if total is None else torch.addmm(total, part, rows)
        assert total is not None, "a weight has rows"
        return total

    def _slices(self, name: str) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (first row, end, rows), as many rows at a time as a slice holds."""
        tensor = self._tensors[name][1]
        height = max(self._slice_bytes * tensor.shape[0] // max(tensor.num_bytes, 1), 1)
        for start in range(0, tensor.shape[0], height):
            end = min(start + height, tensor.shape[0])
            yield start, end, self._rows(name, np.arange(start, end))

    def _rows(self, name: str, rows_N: np.ndarray) -> Tensor:
        shard, tensor = self._tensors[name]
        rows_NW, num_bytes = self._store.gather(shard.name, tensor.role, rows_N)
        self.bytes_read += num_bytes
        return torch.from_numpy(rows_NW.view(np.uint8)).view(DTYPES[tensor.dtype]).view(len(rows_N), tensor.shape[1])
