"""The weights of a module as they come and go: parameters that are views of a slot, and placeholders when they are not
there.

Setting an entry of `_parameters` takes a microsecond, a hundredth of `functional_call` or `load_state_dict`. Whoever
keeps a reference to a weight beyond its stage would read another one later: so references are counted when a shard is
removed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from offramp.division.placeholders import Fetch, Placeholder, Substitute, Weight
from offramp.runtime.slots import Slot
from offramp.store import Shard
from offramp.store import Tensor as Entry

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64, "C64": torch.complex64,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
"""safetensors -> torch."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT_BYTES = 64


class _View:
    """A weight in a slot, or beside it where its bytes do not begin on a multiple of 64 there: alignment changes the
    last bits of a result.
    """

    def __init__(self, entry: Entry, raw: Tensor) -> None:
        """`raw`: its bytes in the slot."""
        self.name, dtype = entry.name, DTYPES[entry.dtype]
        self.source = raw if raw.data_ptr() % ALIGNMENT_BYTES else None
        self.bytes = raw if self.source is None else torch.empty_like(raw)
        self.tensor = nn.Parameter(self.bytes.view(dtype).view(entry.shape), requires_grad=False)
        self.references = self.uses = 0

    def refresh(self) -> None:
        """Another load of the shard has come."""
        if self.source is not None:
            self.bytes.copy_(self.source)

    def settle(self) -> None:
        """Nobody else has it now."""
        self.references, self.uses = self._count()

    def is_held(self) -> bool:
        """Whether anybody else has it, or a view of it."""
        references, uses = self._count()
        return references > self.references or uses > self.uses

    def _count(self) -> tuple[int, int]:
        return sys.getrefcount(self.tensor), torch._C._storage_Use_Count(self.tensor.untyped_storage()._cdata)


class Placement:
    """Where each weight of a module is: nowhere, or in a slot."""

    def __init__(self, weights: Mapping[str, Weight], fetch: Fetch, substitute: Substitute) -> None:
        self._weights = {name: weight for name, weight in weights.items() if not weight.is_buffer}
        self._placeholders = {
            name: Placeholder(name, weight.tensor, fetch, substitute) for name, weight in self._weights.items()
        }
        for name in self._weights:
            self._clear(name)

    def put(self, shard: Shard, slot: Slot) -> None:
        """The weights of a shard are in a slot now."""
        views = slot.notes.get(shard.name)
        if views is None:
            views = slot.notes[shard.name] = _views(shard, slot)
        for view in views:
            view.refresh()
            self._weights[view.name].put(view.tensor)

    def remove(self, shard: Shard, slot: Slot) -> tuple[str, ...]:
        """They are not any more. Returns those that somebody still has, himself or as a view of the slot."""
        for entry in shard.tensors:
            self._clear(entry.name)
        return tuple(view.name for view in slot.notes[shard.name] if view.is_held())

    def _clear(self, name: str) -> None:
        self._weights[name].put(self._placeholders[name])


def tensor_of(entry: Entry, raw: bytearray) -> Tensor:
    """A tensor of its bytes, on memory of its own."""
    data = torch.empty(len(raw), dtype=torch.uint8)
    data.copy_(torch.frombuffer(raw, dtype=torch.uint8) if raw else data)
    return data.view(DTYPES[entry.dtype]).view(entry.shape)


def _views(shard: Shard, slot: Slot) -> list[_View]:
    data = torch.from_numpy(slot.array)
    starts = [shard.data_start + entry.offset for entry in shard.tensors]
    views = [
        _View(entry, data[start : start + entry.num_bytes]) for entry, start in zip(shard.tensors, starts, strict=True)
    ]
    del data
    for view in views:
        view.settle()
    return views
