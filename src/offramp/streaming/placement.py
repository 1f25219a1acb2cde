"""Weights of a module in changing memory: parameters are views of a slot, or placeholders while not in memory.

Setting an entry of `_parameters` takes a microsecond, a hundredth of `functional_call` or `load_state_dict`. Code that
keeps a reference to a weight after its stage would read another weight later, so references are counted when a shard is
removed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Set
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from offramp.program import dtypes
from offramp.runtime.slots import Slot
from offramp.store import Shard
from offramp.store import Tensor as Entry
from offramp.streaming.placeholders import Fetch, Placeholder, SlicedPlaceholder, Substitute, Weight

DTYPES = {dtype.name: getattr(torch, dtype.torch) for dtype in dtypes.DTYPES.values()}
"""Name in safetensors -> dtype of torch."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT_BYTES = 64


class _View:
    """A weight in a slot, or copied out of it if it does not start on a multiple of 64 bytes there, since alignment
    changes the last bits of results.
    """

    def __init__(self, entry: Entry, raw: np.ndarray, requires_grad: bool) -> None:
        """`raw` are the bytes of the weight in the slot."""
        self.name, self._entry, self._raw, self._requires_grad = entry.name, entry, raw, requires_grad
        self._tensor = None if is_copied(entry) else self._made(torch.from_numpy(raw))
        self._baseline = (0, 0) if self._tensor is None else self._count()

    def tensor(self) -> nn.Parameter:
        """Return the weight with the current content of the slot."""
        if is_copied(self._entry):
            self._tensor = self._made(torch.empty(len(self._raw), dtype=torch.uint8).copy_(torch.from_numpy(self._raw)))
            self._baseline = self._count()
        assert self._tensor is not None
        return self._tensor

    def leave(self) -> bool:
        """Return whether other code holds the weight or a view of it, after it was taken out of the module."""
        is_held = any(now > before for now, before in zip(self._count(), self._baseline, strict=True))
        if is_copied(self._entry):
            self._tensor = None
        return is_held

    def _made(self, data: Tensor) -> nn.Parameter:
        typed = data.view(DTYPES[self._entry.dtype]).view(self._entry.shape)
        return nn.Parameter(typed, requires_grad=self._requires_grad)

    def _count(self) -> tuple[int, int]:
        assert self._tensor is not None
        return sys.getrefcount(self._tensor), torch._C._storage_Use_Count(self._tensor.untyped_storage()._cdata)


def is_copied(entry: Entry) -> bool:
    """Return whether a tensor of a shard is copied out of the slot."""
    return entry.offset % ALIGNMENT_BYTES != 0


class Placement:
    """Puts the weights of a module into slots and takes them out."""

    def __init__(
        self, weights: Mapping[str, Weight], fetch: Fetch, substitute: Substitute, sliced: Set[str] = frozenset()
    ) -> None:
        """Release the weights of the module. `sliced`: weights that are read some rows at a time."""
        self._weights = {}
        for name, weight in weights.items():
            if not weight.is_buffer:
                kind = SlicedPlaceholder if name in sliced else Placeholder
                self._weights[name] = replace(weight, tensor=kind(name, weight.tensor, fetch, substitute))
        self.clear()

    def put(self, shard: Shard, slot: Slot) -> None:
        """Put the weights of a shard, which a slot holds, into the module."""
        views = slot.notes.get(shard.name)
        if views is None:
            views = slot.notes[shard.name] = [self._view(shard, slot, entry) for entry in shard.tensors]
        for view in views:
            self._weights[view.name].put(view.tensor())

    def remove(self, shard: Shard, slot: Slot) -> tuple[str, ...]:
        """Take the weights of a shard out of the module. Return those that other code still refers to."""
        views = slot.notes[shard.name]
        for view in views:
            self._weights[view.name].put(self._weights[view.name].tensor)
        return tuple([view.name for view in views if view.leave()])

    def clear(self) -> None:
        """Take all weights out of the module, whatever its state."""
        for weight in self._weights.values():
            weight.put(weight.tensor)

    def _view(self, shard: Shard, slot: Slot, entry: Entry) -> _View:
        start = shard.data_start + entry.offset
        raw = slot.array[start : start + entry.num_bytes]  # a storage for each weight, so that its uses can be counted
        return _View(entry, raw, self._weights[entry.name].tensor.requires_grad)


def tensor_of(entry: Entry, raw: bytearray) -> Tensor:
    """Return a tensor with a copy of its bytes."""
    data = torch.empty(len(raw), dtype=torch.uint8)
    data.copy_(torch.frombuffer(raw, dtype=torch.uint8) if raw else data)
    return data.view(DTYPES[entry.dtype]).view(entry.shape)
