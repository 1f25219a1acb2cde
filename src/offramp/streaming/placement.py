"""The weights of a module as they come and go: parameters that are views of a slot, and placeholders when they are not
there.

Setting an entry of `_parameters` takes a microsecond, a hundredth of `functional_call` or `load_state_dict`. Whoever
keeps a reference to a weight beyond its stage would read another one later: so references are counted when a shard is
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
    """A weight in a slot, or beside it where its bytes do not begin on a multiple of 64 there: alignment changes the
    last bits of a result.
    """

    def __init__(self, entry: Entry, raw: np.ndarray, requires_grad: bool) -> None:
        """`raw`: its bytes in the slot."""
        self.name, self._entry, self._raw, self._requires_grad = entry.name, entry, raw, requires_grad
        self._tensor = None if is_copied(entry) else self._made(torch.from_numpy(raw))
        self._baseline = (0, 0) if self._tensor is None else self._count()

    def tensor(self) -> nn.Parameter:
        """The weight, as it is in the slot now."""
        if is_copied(self._entry):
            self._tensor = self._made(torch.empty(len(self._raw), dtype=torch.uint8).copy_(torch.from_numpy(self._raw)))
            self._baseline = self._count()
        assert self._tensor is not None
        return self._tensor

    def leave(self) -> bool:
        """It is in no module any more. Whether anybody else has it, or a view of it."""
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
    """Whether a tensor of a shard is used in memory of its own, beside the slot."""
    return entry.offset % ALIGNMENT_BYTES != 0


class Placement:
    """Where each weight of a module is: nowhere, or in a slot."""

    def __init__(
        self, weights: Mapping[str, Weight], fetch: Fetch, substitute: Substitute, sliced: Set[str] = frozenset()
    ) -> None:
        """Lets go of what the module has. `sliced`: weights that are read some rows at a time."""
        self._weights = {}
        for name, weight in weights.items():
            if not weight.is_buffer:
                kind = SlicedPlaceholder if name in sliced else Placeholder
                self._weights[name] = replace(weight, tensor=kind(name, weight.tensor, fetch, substitute))
        self.clear()

    def put(self, shard: Shard, slot: Slot) -> None:
        """The weights of a shard are in a slot now."""
        views = slot.notes.get(shard.name)
        if views is None:
            views = slot.notes[shard.name] = [self._view(shard, slot, entry) for entry in shard.tensors]
        for view in views:
            self._weights[view.name].put(view.tensor())

    def remove(self, shard: Shard, slot: Slot) -> tuple[str, ...]:
        """They are not any more. Returns those that somebody still has, himself or as a view of the slot."""
        views = slot.notes[shard.name]
        for view in views:
            self._weights[view.name].put(self._weights[view.name].tensor)
        return tuple([view.name for view in views if view.leave()])

    def clear(self) -> None:
        """Nothing is there any more, however it came to be there."""
        for weight in self._weights.values():
            weight.put(weight.tensor)

    def _view(self, shard: Shard, slot: Slot, entry: Entry) -> _View:
        start = shard.data_start + entry.offset
        raw = slot.array[start : start + entry.num_bytes]  # each a memory of its own to PyTorch, so that uses are told
        return _View(entry, raw, self._weights[entry.name].tensor.requires_grad)


def tensor_of(entry: Entry, raw: bytearray) -> Tensor:
    """A tensor of its bytes, on memory of its own."""
    data = torch.empty(len(raw), dtype=torch.uint8)
    data.copy_(torch.frombuffer(raw, dtype=torch.uint8) if raw else data)
    return data.view(DTYPES[entry.dtype]).view(entry.shape)
