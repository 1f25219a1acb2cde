"""Weights of a module in changing memory: parameters are views of a slot, or placeholders while not in memory. Some
operations on a placeholder need only some rows at a time, which are read from the store when they run.

Setting an entry of `_parameters` takes a microsecond, a hundredth of `functional_call` or `load_state_dict`. Code that
keeps a reference to a weight after its stage would read another weight later, so references are counted when a shard is
removed.

Shapes: N rows of a table or matrix, W its width.
"""

import sys
from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.errors import StoreError
from offramp.program import dtypes
from offramp.program.program import Module
from offramp.runtime.planner import page_rounded
from offramp.runtime.slots import Slot
from offramp.runtime.weight_plan import WeightPlan, plan_weights, smallest_bytes
from offramp.store import Shard, Store
from offramp.store import Tensor as Entry
from offramp.store.manifest import INT8
from offramp.streaming import placeholders
from offramp.streaming.layouts import Layout, layouts_of
from offramp.streaming.placeholders import Placeholder, SlicedPlaceholder, Weight

DTYPES = {dtype.name: getattr(torch, dtype.torch) for dtype in dtypes.DTYPES.values() if hasattr(torch, dtype.torch)}
"""Name in safetensors -> dtype of torch."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CONSTANTS = "constants"
"""Name of the shard of tensors that graphs take in addition to weights and saved buffers."""
_INDICES = (torch.int32, torch.int64)
"""Dtypes of indices that a look-up takes."""


class _View:
    """A weight in a slot, or copied out of it if it does not start on a multiple of 64 bytes there or has a layout,
    since both change the last bits of results.
    """

    def __init__(self, entry: Entry, raw: np.ndarray, like: Placeholder, layout: Layout | None) -> None:
        """`raw` are the bytes of the weight in the slot, `like` what stands for it while it is not in memory."""
        self.name, self._entry, self._raw, self._like, self._layout = entry.name, entry, raw, like, layout
        self._tensor: nn.Parameter | None = None
        self._baseline = (0, 0)

    def tensor(self) -> nn.Parameter:
        """Return the weight with the current content of the slot."""
        if self._tensor is None:
            with torch.inference_mode(False):  # the next pass may record operations for gradients
                self._tensor = self._made()
            vars(self._tensor)[_VERSION] = _version(self._tensor)
            self._baseline = self._count()
        return self._tensor

    def is_written(self) -> bool:
        """Return whether an operation has written to the weight since it was read."""
        return self._tensor is not None and not _is_unwritten(self._tensor)

    def leave(self) -> bool:
        """Return whether other code holds the weight or a view of it, after it was taken out of the module."""
        is_held = any(now > before for now, before in zip(self._count(), self._baseline, strict=True))
        if is_copied(self._entry, self._layout):
            self._tensor = None
        return is_held

    def _made(self) -> nn.Parameter:
        data = torch.from_numpy(self._raw)
        if is_copied(self._entry, self._layout):
            data = tensor_of(self._entry, data, self._layout)
        else:
            data = data.view(DTYPES[self._entry.dtype]).view(self._entry.shape)
        made = self._like.weight_class(data, self._like.requires_grad)
        vars(made).update(self._like.attributes)
        return made

    def _count(self) -> tuple[int, int]:
        assert self._tensor is not None
        return sys.getrefcount(self._tensor), torch._C._storage_Use_Count(self._tensor.untyped_storage()._cdata)


_VERSION = "streamed_version"
"""Attribute of a weight that was read from a store: its version then."""


def _is_of_store(tensor: Tensor | None) -> bool:
    """Return whether a tensor is a placeholder or a weight of a store."""
    return tensor is not None and (isinstance(tensor, Placeholder) or _VERSION in vars(tensor))


def _is_unwritten(tensor: Tensor | None) -> bool:
    """Return whether a tensor is a placeholder or a weight of a store, and no operation has written to it.

    A view of a placeholder, such as its attribute `data`, counts what is written to it there.
    """
    if tensor is None or not _is_of_store(tensor):
        return False
    return _version(tensor) == (0 if isinstance(tensor, Placeholder) else vars(tensor).get(_VERSION))


def _version(tensor: Tensor) -> int:
    """Return the number of operations that have written to a tensor; 0 for one made in inference mode, without it."""
    return 0 if tensor.is_inference() else tensor._version


def is_copied(entry: Entry, layout: Layout | None) -> bool:
    """Return whether a tensor of a shard is copied out of the slot."""
    return layout is not None or entry.offset % dtypes.ALIGNMENT_BYTES != 0


def module_of(store: Store) -> Module:
    """Return the module that a store was divided from.

    Raises StoreError for an encoder divided by tensor names, and for weights that are stored as integers.
    """
    if store.program.module is None:
        what = f"this is the store of a {store.manifest.source.architecture} that was divided by its names"
        raise StoreError(what, store.path, "run it with offramp.load, or divide with --method eager")
    if store.manifest.precision == INT8:
        what = "the weights of this store are integers, and the module's own code takes floats"
        raise StoreError(what, store.path, "run it with offramp.load, or divide with --dtype fp32")
    return store.program.module


def streamed_shards(store: Store) -> list[list[str]]:
    """Return the shards that each part has in memory as a whole, if they fit. Rows of the others are gathered."""
    module, shards = module_of(store), store.manifest.shards
    whole = {n for n, shard in shards.items() if shard.blocks is None or shard.tensors[0].name in module.sliced}
    return [[name for name in part.shards if name in whole] for part in module.parts]


def sliceable_shards(store: Store) -> list[str]:
    """Return the shards that may be read some rows at a time."""
    sliced = set(module_of(store).sliced)
    return [name for name, shard in store.manifest.shards.items() if shard.tensors and shard.tensors[0].name in sliced]


def data_bytes(store: Store) -> dict[str, int]:
    """Return the bytes of weights of each shard."""
    layouts = layouts_of(store)
    return {name: shard.data_bytes + _copied_bytes(shard, layouts) for name, shard in store.manifest.shards.items()}


def slot_bytes(store: Store) -> dict[str, int]:
    """Return the memory that each shard takes: its file in whole pages, and tensors that are copied out of it."""
    shards, layouts = store.manifest.shards, layouts_of(store)
    return {name: page_rounded(shard.bytes) + _copied_bytes(shard, layouts) for name, shard in shards.items()}


def smallest_weights(store: Store, sizes: Mapping[str, int], sliceable: Collection[str] | None = None) -> int:
    """Return the fewest bytes of weights, by the `sizes` of shards, that the module can run with.

    `sliceable`: shards that may be read some rows at a time; None: all that can be.
    """
    slices = sliceable_shards(store) if sliceable is None else sliceable
    return smallest_bytes(streamed_shards(store), sizes, module_of(store).pinned, slices)


def plan_within(
    store: Store, sizes: Mapping[str, int], limit_bytes: int, sliceable: Collection[str] | None = None
) -> WeightPlan:
    """Return the plan with at most `limit_bytes` of weights in memory. Raises BudgetError."""
    slices = sliceable_shards(store) if sliceable is None else sliceable
    return plan_weights(streamed_shards(store), sizes, module_of(store).pinned, limit_bytes, slices)


def _copied_bytes(shard: Shard, layouts: Mapping[str, Layout]) -> int:
    """Return the memory of the tensors that are copied out of a slot."""
    found = [(entry, layouts.get(entry.name)) for entry in shard.tensors if is_copied(entry, layouts.get(entry.name))]
    spans = [entry.num_bytes if layout is None else _span_bytes(entry, layout) for entry, layout in found]
    return sum(spans)


def _span_bytes(entry: Entry, layout: Layout) -> int:
    return layout.span(entry.shape) * dtypes.DTYPES[entry.dtype].item_bytes


class WeightRows:
    """Computes look-ups and linear layers from rows of their weights."""

    def __init__(self, store: Store, sliced: Set[str], slice_bytes: int) -> None:
        """`sliced` shards are read `slice_bytes` at a time."""
        self._store, self._sliced, self._slice_bytes = store, sliced, slice_bytes
        self._tensors = store.manifest.tensors()
        self.sliced_weights = {tensor.name for name in sliced for tensor in store.manifest.shards[name].tensors}
        self.bytes_read = 0

    def substitute(self, weight: Placeholder, function: Any, args: tuple, kwargs: dict) -> Any:
        """Return the result of an operation on a weight, or NotImplemented if it needs the whole weight."""
        name = weight.weight_name
        shard, tensor = self._tensors[name]
        if function is placeholders.LOOK_UP and shard.blocks is not None and args[1].dtype in _INDICES:
            indices = args[1]
            if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= tensor.shape[0]):
                raise IndexError("index out of range in self")  # in the words of PyTorch
            return self._rows(name, indices.reshape(-1).numpy()).view(*indices.shape, tensor.shape[1])
        if function is functional.linear and shard.name in self._sliced:
            return self._linear(name, *args, **kwargs)
        if function in (placeholders.MM, placeholders.ADDMM) and shard.name in self._sliced and not kwargs:
            *start, left, _ = args
            return self._product(name, left, *start)
        return NotImplemented

    def _linear(self, name: str, input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """Compute some outputs at a time. The last bits may differ from those of the whole product."""
        parts = [
            functional.linear(input, rows, bias if bias is None else bias[part]) for part, rows in self._slices(name)
        ]
        return torch.cat(parts, -1)

    def _product(self, name: str, left: Tensor, total: Tensor | None = None) -> Tensor:
        """Sum products of some columns of the left matrix with the matching rows of the weight."""
        for part, rows in self._slices(name):
            total = left[:, part] @ rows if total is None else torch.addmm(total, left[:, part], rows)
        assert total is not None, "a weight has rows"
        return total

    def _slices(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Yield places of rows and the rows, as many at a time as a slice holds."""
        tensor = self._tensors[name][1]
        height = max(self._slice_bytes * tensor.shape[0] // max(tensor.num_bytes, 1), 1)
        for start in range(0, tensor.shape[0], height):
            end = min(start + height, tensor.shape[0])
            yield slice(start, end), self._rows(name, np.arange(start, end))

    def _rows(self, name: str, rows_N: np.ndarray) -> Tensor:
        shard, tensor = self._tensors[name]
        rows_NW, num_bytes = self._store.gather(shard.name, tensor.role, rows_N)
        self.bytes_read += num_bytes
        return torch.from_numpy(rows_NW.view(np.uint8)).view(DTYPES[tensor.dtype]).view(len(rows_N), tensor.shape[1])


class Placement:
    """Puts the weights of a module into slots and takes them out."""

    def __init__(
        self,
        weights: Mapping[str, Weight],
        fetch: placeholders.Fetch,
        rows: WeightRows,
        layouts: Mapping[str, Layout],
    ) -> None:
        """Release the weights of the module. `fetch` gives one that is used as a whole while it is not in memory."""
        sliced, self._weights, self._layouts = rows.sliced_weights, {}, layouts
        for name, weight in weights.items():
            if not weight.is_buffer:
                kind = SlicedPlaceholder if name in sliced else Placeholder
                self._weights[name] = replace(weight, tensor=kind(name, weight.tensor, fetch, rows.substitute))
        self._written: set[str] = set()
        """Weights that operations wrote to while they were in memory, and `replaced`."""
        self.replaced: str | None = None
        """A weight in whose place code has put another tensor, which is lost."""
        self.clear()

    def put(self, shard: Shard, slot: Slot) -> None:
        """Put the weights of a shard, which a slot holds, into the module."""
        if shard.name not in slot.notes:
            slot.notes[shard.name] = [self._view(shard, slot, entry) for entry in shard.tensors]
        for view in slot.notes[shard.name]:
            self._put(view.name, view.tensor())

    def remove(self, shard: Shard, slot: Slot) -> tuple[str, ...]:
        """Take the weights of a shard out of the module. Return those that other code still refers to."""
        views = slot.notes[shard.name]
        for view in views:
            self._put(view.name, self._weights[view.name].tensor)
            if view.is_written():
                self._written.add(view.name)
        return tuple([view.name for view in views if view.leave()])

    def changed(self) -> str | None:
        """Return a weight that other code has written to, or replaced in the module, or None if there is none."""
        for name, weight in self._weights.items():
            for module, attribute, is_buffer in weight.places:
                if not _is_unwritten((module._buffers if is_buffer else module._parameters).get(attribute)):
                    return name
        return min(self._written, default=None)

    def loaded(self, name: str) -> Tensor | None:
        """Return the weight if it is in the module; None while a placeholder, or a tensor of other code, is there."""
        module, attribute, is_buffer = self._weights[name].places[0]
        now = (module._buffers if is_buffer else module._parameters).get(attribute)
        return None if isinstance(now, Placeholder) or not _is_of_store(now) else now

    def clear(self) -> None:
        """Take all weights out of the module, whatever its state."""
        for weight in self._weights.values():
            weight.put(weight.tensor)

    def _put(self, name: str, tensor: Tensor) -> None:
        """Set a tensor in every place of a weight, and note if another one than those of the store is lost by that."""
        weight = self._weights[name]
        for module, attribute, is_buffer in weight.places:
            if not _is_of_store((module._buffers if is_buffer else module._parameters).get(attribute)):
                self._written.add(name)
                self.replaced = name
        weight.put(tensor)

    def _view(self, shard: Shard, slot: Slot, entry: Entry) -> _View:
        start = shard.data_start + entry.offset
        raw = slot.array[start : start + entry.num_bytes]  # a storage for each weight, so that its uses can be counted
        like: Any = self._weights[entry.name].tensor
        return _View(entry, raw, like, self._layouts.get(entry.name))


def tensor_of(entry: Entry, raw: Tensor, layout: Layout | None) -> Tensor:
    """Return a tensor with a copy of its bytes."""
    if layout is None or raw.data_ptr() % dtypes.ALIGNMENT_BYTES:  # no view of another dtype begins anywhere
        raw = torch.empty_like(raw).copy_(raw)
    data = raw.view(DTYPES[entry.dtype]).view(entry.shape)
    return data if layout is None else layout.apply(data)


def read_tensor(store: Store, name: str, layouts: Mapping[str, Layout]) -> Tensor:
    """Return one tensor of a store."""
    shard, entry = store.manifest.tensors()[name]
    raw = store.read_tensor(shard.name, entry)
    data = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    return tensor_of(entry, data, layouts.get(name))
