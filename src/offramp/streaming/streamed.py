"""A divided module that runs its own code in PyTorch with at most a budget of its weights in memory.

At each module call that starts a part, weights are put into the module and taken out. Correctness does not depend on
the plan: a weight that is used while it is not in memory is noticed and read at once, or refused if `strict`.

It runs forward passes. Generation calls the module once a step, and each call is a pass.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from offramp.errors import StageError, UsageError
from offramp.measure import TRACED_PASSES, Trace
from offramp.runtime.feed import Buffers, WeightFeed
from offramp.runtime.planner import page_rounded
from offramp.runtime.slots import Arena, Slot
from offramp.runtime.weight_plan import WeightPlan
from offramp.store import Store
from offramp.streaming.capture import Around, surround, tensors_of
from offramp.streaming.parts import Parts, module_of
from offramp.streaming.placeholders import Placeholder, Weight, weights_of
from offramp.streaming.placement import Placement, tensor_of
from offramp.streaming.rows import WeightRows

READ_AHEAD = 64
"""Most shards that are read ahead; in practice the memory for streamed shards is the limit."""
_STREAMED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules that a stream holds."""


@dataclass
class Counts:
    """Deviations of a stream from its plan, and the most weights it had in memory."""

    passes: int = 0
    unplanned_loads: int = 0
    """Reads of weights that were used outside their parts."""
    unplanned: set[str] = field(default_factory=set)
    """Names of these weights."""
    held: set[str] = field(default_factory=set)
    """Weights that the code still referred to after their part: their memory was not reused."""
    disorders: int = 0
    """Parts that did not follow the previous one."""
    peak_weight_bytes: int = 0


@contextmanager
def _no_cast_is_kept() -> Iterator[None]:
    """Disable the cache of autocast, which keeps weights in the other dtype to the end of a pass."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class Stream:
    """A module whose weights come from a store as they are needed. A context manager, callable like the module.

    `module` is the module itself; its other attributes are reached through the stream. One pass at a time.
    """

    def __init__(
        self,
        module: nn.Module,
        store: Store,
        plan: WeightPlan,
        sizes: Mapping[str, int],
        *,
        strict: bool = False,
        direct: bool = False,
    ) -> None:
        """`sizes`: bytes that each shard counts against the budget of the plan."""
        self._sizes = sizes
        self.module, self.store, self.plan, self.strict, self._direct = module, store, plan, strict, direct
        self.counts, self.trace = Counts(), Trace(num_passes=TRACED_PASSES)
        self._shards, self._tensors, self._parts = store.manifest.shards, store.manifest.tensors(), Parts(store, plan)
        self._rows = WeightRows(store, plan.sliced, plan.slice_bytes)
        self._part, self._first, self._next_first = -1, 0, 0
        self._calls: dict[str, int] = defaultdict(int)
        self._slots: dict[str, Slot] = {}
        self._paged: dict[str, Tensor] = {}
        self._lost: list[tuple[weakref.ref[np.ndarray], int]] = []
        self._undo: list[Callable[[], None]] = []
        self._lock, self._running = threading.RLock(), 0
        self._placement: Placement | None = None
        self._feed: WeightFeed | None = None
        self._bytes_before = 0

    def open(self) -> Stream:
        """Take the weights out of the module, load its buffers, start to read."""
        if self.module in _STREAMED:
            raise UsageError("the module is streamed already", self.store.path, "close the other stream first")
        _STREAMED.add(self.module)
        try:
            self._open()
        except BaseException:
            self.close()
            raise
        return self

    def _open(self) -> None:
        weights, parts = weights_of(self.module), self._parts
        _load_buffers(self.store, weights)
        sliced = {tensor.name for name in self.plan.sliced for tensor in self._shards[name].tensors}
        self._placement = Placement(weights, self._fetch, self._rows.substitute, sliced)
        sizes = {name: page_rounded(shard.bytes) for name, shard in self._shards.items()}
        streamed = [[name for name in shards if name not in self.plan.residents] for shards in parts.needs]
        self._arena = Arena(streamed, sizes, self._sizes, self.plan.pool_bytes)
        residents = {name: Slot(sizes[name]) for name in sorted(self.plan.residents)}
        buffers = Buffers(self._arena, residents, READ_AHEAD)
        # By halves: the threads of PyTorch would wait for the core that a single reader takes.
        self._feed = WeightFeed(self.store, buffers, parts.stage_of, self.trace, direct=self._direct, halves=True)
        self._undo = [surround(self.module, self._run_pass)]
        starts = {module for module, _ in parts.starts}
        for path, module in self.module.named_modules():
            if path in starts:
                self._undo.append(surround(module, self._around(path)))

    def close(self) -> None:
        """Stop the reader and free all weights; the module cannot run afterwards."""
        with self._lock:
            for undo in self._undo:
                undo()
            if self._placement is not None:
                self._placement.clear()
            self._slots.clear()
            self._paged.clear()
            if self._feed is not None:
                self._feed.close()
                self._bytes_before += self._feed.bytes_read
            self._feed = None
            self.store.close()
            _STREAMED.discard(self.module)

    def __enter__(self) -> Stream:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one pass without gradients."""
        if self._feed is None:
            raise ValueError("the stream is not open: use it in a `with` block, or call open()")
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Forward attribute access to the module."""
        return getattr(self.__dict__["module"], name)

    def record(self) -> dict[str, Any]:
        """Return one JSON object about the run so far."""
        counts = {**vars(self.counts), "unplanned": sorted(self.counts.unplanned), "held": sorted(self.counts.held)}
        bytes_read = self._bytes_before + (0 if self._feed is None else self._feed.bytes_read)
        return {
            **counts,
            "gathered_bytes": self._rows.bytes_read,
            "store_sha256": self.store.digest,
            "resident_bytes": self.plan.resident_bytes,
            "room_bytes": self.plan.pool_bytes,
            "sliced": sorted(self.plan.sliced),
            "bytes_read_total": bytes_read + self._rows.bytes_read,
            "reads": "direct" if self._direct else "buffered",
        }

    def _run_pass(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any], first: int = 0) -> Any:
        """Run one pass without gradients: of the module, or of the submodule that part `first` starts with."""
        if self._running == threading.get_ident():  # the module calls itself
            return forward(*args, **kwargs)
        if self.module.training:
            raise UsageError("the module is in training mode, and streamed weights cannot be trained", None,
                             "call eval() on it")  # fmt: skip
        with self._lock, torch.no_grad(), _no_cast_is_kept():
            try:
                self._running = threading.get_ident()
                self._begin(first)
                output = self._without_placeholders(forward(*args, **kwargs))
                self._require_released(self._leave(()))
                return output
            finally:
                self._running = 0
                self._end()

    def _begin(self, first: int) -> None:
        assert self._feed is not None and self._placement is not None
        if self._part >= 0:  # an interrupt has stopped the end of the previous pass
            self._leave(())
            self._placement.clear()
            self._slots.clear()
        self._calls.clear()
        self._feed.begin_pass(self._parts.turns(first), restart=first != self._next_first)
        self._first, self._part = first, first - 1
        if not first:
            self._enter(0)

    def _end(self) -> None:
        """End a pass, whatever the module raised."""
        assert self._feed is not None
        self._leave(())
        self._paged.clear()
        self.counts.passes += 1
        self._next_first = (self._first + 1) % len(self._parts.needs) if self._first else 0
        self._feed.end_pass(self._parts.turns(self._next_first))
        self._part = -1

    def _without_placeholders(self, output: Any) -> Any:
        """Return an output with weights in place of placeholders, which would be empty when the stream is closed."""
        if not any(isinstance(tensor, Placeholder) for tensor in tensors_of(output)):
            return output
        return pytree.tree_map_only(Placeholder, lambda leaf: self._fetch(leaf.weight_name, "the result"), output)

    def _around(self, path: str) -> Around:
        def around(forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
            if self._running != threading.get_ident():  # a submodule is called alone, such as an encoder by generation
                first = self._parts.starts.get((path, 1), 0)
                return self._run_pass(lambda *a, **named: around(forward, a, named), args, kwargs, first)
            self._calls[path] += 1
            index = self._parts.starts.get((path, self._calls[path]))
            if index is not None:
                self._go_to(index)
            return forward(*args, **kwargs)

        return around

    def _go_to(self, index: int) -> None:
        if index != self._part + 1:
            self.counts.disorders += 1
            if self.strict:
                found, before = self._parts.name(index), self._parts.name(self._part)
                what = f"stage {found} began after {before}: another path than when divided"
                raise StageError(what, self.store.path, "divide with this input as an example, or without strict")
            self._leave(())
            assert self._feed is not None
            self._feed.begin_pass(self._parts.turns(index))
        self._enter(index)

    def _enter(self, index: int) -> None:
        """Take out the weights that a part does not need, and put in those that it does."""
        assert self._feed is not None and self._placement is not None
        needs = self._parts.needs[index]
        self._require_released(self._leave(needs))
        self._paged.clear()
        self._part = index
        for name in needs:
            if name not in self._slots:
                loaded = self._feed.acquire(name)
                assert loaded is not None, "without a deadline it waits"
                self._slots[name] = loaded.slot
                self._placement.put(self._shards[name], loaded.slot)
        self._update_peak()

    def _leave(self, keeping: Collection[str]) -> list[str]:
        """Take out all streamed shards except `keeping`. Return the weights that the code still refers to."""
        assert self._feed is not None and self._placement is not None
        all_held: list[str] = []
        for name in [name for name in self._slots if name not in keeping and name not in self.plan.residents]:
            slot = self._slots[name]
            held = self._placement.remove(self._shards[name], slot)
            self._feed.release(name, discard=bool(held))
            del self._slots[name]
            if held:
                self._lost.append((weakref.ref(slot.array), self._sizes[name]))
                self.counts.held.update(held)
                all_held += held
        return all_held

    def _require_released(self, held: list[str]) -> None:
        if held and self.strict:
            what = f"{held[0]} is still referred to after stage {self._parts.name(self._part)}"
            raise StageError(what, self.store.path, "divide with this input as an example, or without strict")

    def _fetch(self, name: str, operation: Any) -> Tensor:
        """Return a weight that is used while it is not in memory."""
        if self._feed is None:
            raise StageError(f"{operation} touches {name}, and its stream is closed", None, "open the store again")
        if name in self._paged:
            return self._paged[name]
        shard, entry = self._tensors[name]
        if self.strict:
            where = f"in stage {self._parts.name(self._part)}" if self._part >= 0 else "outside of a pass"
            homes = ", ".join(self._parts.homes(shard.name)) or "none"
            remedy = "divide with this input as an example, or run without strict"
            raise StageError(f"{operation} touches {name} {where}; it is planned for {homes}", self.store.path, remedy)
        tensor = tensor_of(entry, self.store.read_tensor(shard.name, entry))
        self.counts.unplanned_loads += 1
        self.counts.unplanned.add(name)
        self._paged[name] = tensor
        self._update_peak()
        return tensor

    def _update_peak(self) -> None:
        """Count the bytes of weights that are in memory now."""
        paged = sum(tensor.nbytes for tensor in self._paged.values())
        self._lost = [(array, num_bytes) for array, num_bytes in self._lost if array() is not None]
        held = sum(num_bytes for _, num_bytes in self._lost)
        weights = self._arena.peak_bytes + self.plan.resident_bytes + self.plan.slice_bytes + paged + held
        self.counts.peak_weight_bytes = max(self.counts.peak_weight_bytes, weights)


def _load_buffers(store: Store, weights: Mapping[str, Weight]) -> None:
    """Put the saved buffers of a store into a module."""
    tensors = store.manifest.tensors()
    for name in module_of(store).buffers:
        shard, entry = tensors[name]
        weights[name].put(tensor_of(entry, store.read_tensor(shard.name, entry)))
