"""Any divided module, run in PyTorch as it runs by itself, with no more weights in memory than a limit holds.

The module's own code computes; at each stage boundary weights are put into it and taken out. Correctness does not rest
on the plan: a weight that is touched and not there is noticed, and read at once, or refused where `strict`.

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
from torch.nn import functional
from torch.utils import _pytree as pytree

from offramp.errors import StageError, UsageError
from offramp.measure import TRACED_PASSES, Trace
from offramp.runtime.arena import Arena
from offramp.runtime.planner import page_rounded
from offramp.runtime.ring import Ring, Turn
from offramp.runtime.slots import Slot
from offramp.runtime.weight_plan import WeightPlan, reading_order
from offramp.store import Store
from offramp.streaming.capture import Around, surround, tensors_of
from offramp.streaming.placeholders import ADDMM, LOOK_UP, MM, Placeholder, weights_of
from offramp.streaming.placement import DTYPES, Placement, tensor_of

READ_AHEAD = 64
"""Shards; the room is what bounds them."""
_STREAMED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass
class Counts:
    """What a stream did beside its plan, and how many bytes of weights it had at most."""

    passes: int = 0
    unplanned_loads: int = 0
    """How often weights were touched outside their stages, and read for that alone."""
    unplanned: set[str] = field(default_factory=set)
    """Which."""
    held: set[str] = field(default_factory=set)
    """Weights that the code kept references to beyond their stage: their memory was not reused."""
    disorders: int = 0
    """Stages that did not follow the one before them."""
    peak_weight_bytes: int = 0
    gathered_bytes: int = 0


def streamed_shards(store: Store) -> list[list[str]]:
    """The shards that each stage has in memory as a whole, if they fit; of the others rows are gathered."""
    shards, sliced = store.module.shards, set(store.module.program.sliced)
    whole = {n for n, shard in shards.items() if shard.blocks is None or shard.tensors[0].name in sliced}
    return [[name for name in stage.steps[0].shards if name in whole] for stage in store.module.stages]


@contextmanager
def _no_cast_is_kept() -> Iterator[None]:
    """Autocast would keep weights in the other dtype to the end of the pass."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class Stream:
    """A module whose weights come from a store as they are needed. A context manager, callable like the module.

    `module` is the module itself; its other attributes are reached through this. One pass at a time.
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
        """`sizes`: what each shard counts, as the plan has it."""
        contents, self._sizes = store.module, sizes
        self.module, self.store, self.plan, self.strict, self._direct = module, store, plan, strict, direct
        self.counts, self.trace = Counts(), Trace(num_passes=TRACED_PASSES)
        self._shards, self._program = contents.shards, contents.program
        self._stages = [stage.steps[0].shards for stage in contents.stages]
        self._names = [stage.name for stage in contents.stages]
        self._needs = [[n for n in shards if n not in plan.sliced] for shards in streamed_shards(store)]
        self._needs[0] = list(dict.fromkeys((*contents.program.pinned, *self._needs[0])))  # from the first touch on
        self._starts = {
            (flow.start.module, flow.start.number): index
            for index, flow in enumerate(contents.program.flows) if flow.start is not None
        }  # fmt: skip
        self._entries = {
            entry.name: (shard, entry) for shard in contents.shards.values() for entry in shard.tensors
        }  # fmt: skip
        self._stage, self._first, self._next_first = -1, 0, 0
        self._calls: dict[str, int] = defaultdict(int)
        self._there: dict[str, Slot] = {}
        self._paged: dict[str, Tensor] = {}
        self._lost: list[tuple[weakref.ref[np.ndarray], int]] = []
        self._undo: list[Callable[[], None]] = []
        self._lock, self._running = threading.RLock(), 0
        self._placement: Placement | None = None
        self._closed_bytes = 0
        self._ring: Ring | None = None

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
        weights = weights_of(self.module)
        self._load_buffers(weights)
        sliced = {entry.name for name in self.plan.sliced for entry in self._shards[name].tensors}
        self._placement = Placement(weights, self._fetch, self._substitute, sliced)
        buffers = {name: page_rounded(shard.bytes) for name, shard in self._shards.items()}
        streamed = [[name for name in shards if name not in self.plan.residents] for shards in self._needs]
        self._room = Arena(streamed, buffers, self._sizes, self.plan.pool_bytes)
        residents = {name: Slot(buffers[name]) for name in sorted(self.plan.residents)}
        self._ring = Ring(self._read, self._room, residents, depth=READ_AHEAD, on_read=self._on_read)
        self._undo = [surround(self.module, self._pass)]
        starts = {module for module, _ in self._starts}
        for path, module in self.module.named_modules():
            if path in starts:
                self._undo.append(surround(module, self._passing(path)))

    def close(self) -> None:
        """Stop the reader and free all weights; the module cannot run afterwards."""
        with self._lock:
            for undo in self._undo:
                undo()
            if self._placement is not None:
                self._placement.clear()
            self._there.clear()
            self._paged.clear()
            if self._ring is not None:
                self._ring.close()
                self._closed_bytes += self._ring.bytes_read
            self._ring = None
            self.store.close()
            _STREAMED.discard(self.module)

    def __enter__(self) -> Stream:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One pass, without gradients."""
        if self._ring is None:
            raise ValueError("the stream is not open: use it in a `with` block, or call open()")
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Of the module."""
        return getattr(self.__dict__["module"], name)

    def record(self) -> dict[str, Any]:
        """One JSON object about the run so far."""
        counts = {**vars(self.counts), "unplanned": sorted(self.counts.unplanned), "held": sorted(self.counts.held)}
        return {
            **counts,
            "store_sha256": self.store.digest,
            "resident_bytes": self.plan.resident_bytes,
            "room_bytes": self.plan.pool_bytes,
            "sliced": sorted(self.plan.sliced),
            "bytes_read_total": self._bytes_read() + self.counts.gathered_bytes,
            "reads": "direct" if self._direct else "buffered",
        }

    def _bytes_read(self) -> int:
        return self._closed_bytes + (0 if self._ring is None else self._ring.bytes_read)

    def _pass(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any], first: int = 0) -> Any:
        """One pass, of the module or of the part that stage `first` begins with, without gradients."""
        if self._running == threading.get_ident():  # the module calls itself
            return forward(*args, **kwargs)
        if self.module.training:
            raise UsageError("the module is in training mode, and weights that come and go learn nothing", None,
                             "call eval() on it")  # fmt: skip
        with self._lock, torch.no_grad(), _no_cast_is_kept():
            try:
                self._running = threading.get_ident()
                self._begin(first)
                output = self._whole(forward(*args, **kwargs))
                self._require_released(self._leave(()))
                return output
            finally:
                self._running = 0
                self._end()

    def _begin(self, first: int) -> None:
        assert self._ring is not None and self._placement is not None
        if self._stage >= 0:  # an interrupt has stopped the end of the pass before
            self._leave(())
            self._placement.clear()
            self._there.clear()
        self._calls.clear()
        if first != self._next_first:
            self._ring.end_pass()
        self._ring.begin_pass(self._turns(first))
        self._first, self._stage = first, first - 1
        if not first:
            self._enter(0)

    def _end(self) -> None:
        """Also after whatever was raised in the module."""
        assert self._ring is not None
        self._leave(())
        self._paged.clear()
        self.counts.passes += 1
        self._next_first = (self._first + 1) % len(self._needs) if self._first else 0
        self._ring.end_pass(self._turns(self._next_first))
        self._stage = -1

    def _turns(self, first: int) -> list[Turn]:
        return [Turn(name) for shards in reading_order(self._needs[first:]) for name in shards]

    def _whole(self, output: Any) -> Any:
        """An output without placeholders: they would be empty when the stream is closed."""
        if not any(isinstance(tensor, Placeholder) for tensor in tensors_of(output)):
            return output
        return pytree.tree_map_only(Placeholder, lambda leaf: self._fetch(leaf.weight_name, "the result"), output)

    def _passing(self, path: str) -> Around:
        def around(forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
            if self._running != threading.get_ident():  # a part is called by itself, as an encoder is for generation
                first = self._starts.get((path, 1), 0)
                return self._pass(lambda *a, **named: around(forward, a, named), args, kwargs, first)
            self._calls[path] += 1
            index = self._starts.get((path, self._calls[path]))
            if index is not None:
                self._go_to(index)
            return forward(*args, **kwargs)

        return around

    def _go_to(self, index: int) -> None:
        if index != self._stage + 1:
            self.counts.disorders += 1
            if self.strict:
                what = (
                    f"stage {self._names[index]} began after {self._names[self._stage]}: another path than when divided"
                )
                raise StageError(what, self.store.path, "divide with this input as an example, or without strict")
            self._leave(())
            assert self._ring is not None
            self._ring.begin_pass(self._turns(index))
        self._enter(index)

    def _enter(self, index: int) -> None:
        """Take out what this stage does not need, put in what it does."""
        assert self._ring is not None and self._placement is not None
        needs = self._needs[index]
        self._require_released(self._leave(needs))
        self._paged.clear()
        self._stage = index
        for name in needs:
            if name not in self._there:
                acquired = self._ring.acquire(name)
                assert acquired is not None
                self._there[name] = acquired.slot
                self._placement.put(self._shards[name], acquired.slot)
        self._look()

    def _leave(self, keeping: Collection[str]) -> list[str]:
        """Take out all that streams, but for what the next stage needs as well. Returns what somebody still has."""
        assert self._ring is not None and self._placement is not None
        all_held: list[str] = []
        for name in [name for name in self._there if name not in keeping and name not in self.plan.residents]:
            slot = self._there[name]
            held = self._placement.remove(self._shards[name], slot)
            self._ring.release(name, discard=bool(held))
            del self._there[name]
            if held:
                self._lost.append((weakref.ref(slot.array), self._sizes[name]))
                self.counts.held.update(held)
                all_held += held
        return all_held

    def _require_released(self, held: list[str]) -> None:
        if held and self.strict:
            what = f"{held[0]} is still referred to after stage {self._names[self._stage]}"
            raise StageError(what, self.store.path, "divide with this input as an example, or without strict")

    def _fetch(self, name: str, operation: Any) -> Tensor:
        """A weight that is touched and not there."""
        if self._ring is None:
            raise StageError(f"{operation} touches {name}, and its stream is closed", None, "open the store again")
        if name in self._paged:
            return self._paged[name]
        shard, entry = self._entries[name]
        if self.strict:
            homes = [self._names[i] for i, shards in enumerate(self._stages) if shard.name in shards]
            where = f"in stage {self._names[self._stage]}" if self._stage >= 0 else "outside of a pass"
            what = f"{operation} touches {name} {where}"
            raise StageError(f"{what}; it is planned for {', '.join(homes) or 'none'}", self.store.path,
                             "divide with this input as an example, or run without strict")  # fmt: skip
        tensor = tensor_of(entry, self.store.read_tensor(shard.name, entry))
        self.counts.unplanned_loads += 1
        self.counts.unplanned.add(name)
        self._paged[name] = tensor
        self._look()
        return tensor

    def _substitute(self, weight: Placeholder, function: Any, args: tuple, kwargs: dict) -> Any:
        """Rows of a weight instead of the weight."""
        shard, entry = self._entries[weight.weight_name]
        if function is LOOK_UP and shard.blocks is not None:
            indices = args[1]
            rows_NW = self._rows(weight.weight_name, indices.reshape(-1).numpy())
            return rows_NW.view(*indices.shape, entry.shape[1])
        if function is functional.linear and shard.name in self.plan.sliced:
            return self._sliced_linear(weight.weight_name, *args, **kwargs)
        if function in (MM, ADDMM) and shard.name in self.plan.sliced and not kwargs:
            *start, left, _ = args
            return self._sliced_product(weight.weight_name, left, *start)
        return NotImplemented

    def _sliced_linear(self, name: str, input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """Some outputs at a time. Other products of matrices than the whole one: the last bits may differ."""
        parts = [
            functional.linear(input, rows, None if bias is None else bias[start:end])
            for start, end, rows in self._slices(name)
        ]
        return torch.cat(parts, -1)

    def _sliced_product(self, name: str, left: Tensor, total: Tensor | None = None) -> Tensor:
        """Some columns of the left matrix at a time, with the rows of the weight that they meet, summed up."""
        for start, end, rows in self._slices(name):
            part = left[:, start:end]
            total = part @ rows if total is None else torch.addmm(total, part, rows)
        assert total is not None, "a weight has rows"
        return total

    def _slices(self, name: str) -> Iterator[tuple[int, int, Tensor]]:
        """Rows of a weight, as many at a time as there is room for: (first, end, rows)."""
        entry = self._entries[name][1]
        height = max(self.plan.slice_bytes * entry.shape[0] // max(entry.num_bytes, 1), 1)
        for start in range(0, entry.shape[0], height):
            end = min(start + height, entry.shape[0])
            yield start, end, self._rows(name, np.arange(start, end))

    def _rows(self, name: str, rows_N: np.ndarray) -> Tensor:
        shard, entry = self._entries[name]
        rows_NW, num_bytes = self.store.gather(shard.name, entry.role, rows_N)
        self.counts.gathered_bytes += num_bytes
        return torch.from_numpy(rows_NW.view(np.uint8)).view(DTYPES[entry.dtype]).view(len(rows_N), entry.shape[1])

    def _look(self) -> None:
        """Take note of the bytes of weights that are in memory."""
        paged = sum(tensor.nbytes for tensor in self._paged.values())
        self._lost = [(array, num_bytes) for array, num_bytes in self._lost if array() is not None]
        held = sum(num_bytes for _, num_bytes in self._lost)
        weights = self._room.peak_bytes + self.plan.resident_bytes + self.plan.slice_bytes + paged + held
        self.counts.peak_weight_bytes = max(self.counts.peak_weight_bytes, weights)

    def _load_buffers(self, weights: Any) -> None:
        for name in self._program.buffers:
            shard, entry = self._entries[name]
            weights[name].put(tensor_of(entry, self.store.read_tensor(shard.name, entry)))

    def _read(self, shard: str, view: memoryview, cancelled: Callable[[], bool]) -> tuple[int, bool]:
        """By halves: PyTorch's threads wait for the one that a single reader keeps from computing. ONNX Runtime's gain
        nothing by it.
        """
        return self.store.read_shard(shard, view, direct=self._direct, halves=True, cancelled=cancelled)

    def _on_read(self, shard: str, started: float, ended: float, num_bytes: int, idle: bool) -> None:
        kind = "idle_read" if idle else "read"
        self.trace.add(shard, max(self._stage, 0), kind, started, ended, num_bytes, "reader", self.counts.passes)
