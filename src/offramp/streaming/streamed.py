"""A divided module that runs its own code in PyTorch with at most a budget of its weights in memory.

At each module call that starts a part, weights are put into the module and taken out. Correctness does not depend on
the plan: a weight that is used while it is not in memory is noticed and read at once, or refused if `strict`.

It runs forward passes. Generation calls the module once a step, and each call is a pass.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from offramp.errors import BudgetError, RefusedError, StageError, UsageError
from offramp.measure import TRACED_PASSES, PeakMeter, Trace, available_bytes, read_memory
from offramp.program.checks import require_known
from offramp.program.program import Call
from offramp.runtime.config import AUTO
from offramp.runtime.feed import Buffers, WeightFeed
from offramp.runtime.footprint import free_heap
from offramp.runtime.ledger import BUDGET, LEDGER, MEMORY, Limit, Share, least_limit
from offramp.runtime.memory_model import HEADROOM_BYTES, stream_bytes
from offramp.runtime.planner import page_rounded, too_small
from offramp.runtime.ring import Turn
from offramp.runtime.run_plan import choose_reads, reads_by_now
from offramp.runtime.slots import Arena, Slot
from offramp.runtime.weight_plan import WeightPlan, reading_order
from offramp.store import Store
from offramp.streaming import placement
from offramp.streaming.capture import Arguments, surround, tensors_of, with_data
from offramp.streaming.first_pass import FirstPass
from offramp.streaming.layouts import layouts_of
from offramp.streaming.matching import matching_module
from offramp.streaming.outside import Outside
from offramp.streaming.passes import Passes
from offramp.streaming.placeholders import Placeholder, weights_of
from offramp.units import format_size, parse_size

RESULT = "the result"
"""Name used instead of an operation where the module returns a weight."""
READ_AHEAD = 64
"""Most shards that are read ahead; in practice the memory for streamed shards is the limit."""
_STREAMED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules that streams hold, and their parts that have weights of their own."""


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
    outside_bytes: int = 0
    """Bytes of tensors that are no weights of the store and count as weights: those that hooks compute, buffers and
    packed weights where they are many, and what passes have added, such as a cache. The last are looked for after
    passes 1, 2, 4, 8, ..."""
    peak_weight_bytes: int = 0
    """The most weights in memory, `outside_bytes` among them."""


class Bounds(NamedTuple):
    """Facts about a stream that bound its memory, beside its plan of weights."""

    outside: Outside | None = None
    """Tensors of the module beside its weights. None: they are not counted, and a weight that is used outside its part
    is read beside the others."""
    limited_by: str = "weight budget"
    budget_bytes: int | None = None
    """Budget of the whole process, if one was given."""
    activation_bytes: int = 0
    process_bytes: int | None = None
    """Most memory of the process, without what other engines reserve; None: weights alone are bounded."""


UNCOUNTED = Bounds()
"""Bounds of a proof or a trial."""


@dataclass(frozen=True)
class StreamConfig:
    """Options of a stream that do not change how much memory it may take."""

    strict: bool = False
    """Refuse deviations from the plan (a weight used outside its stage, another order of stages) instead of reading the
    weights when they are used."""
    reads: str = "auto"
    """Way to read shards, as for `load`."""
    verify: str = "first"
    """Time of hashing shards, as for `load`."""


@contextmanager
def _no_cast_is_kept() -> Iterator[None]:
    """Disable the cache of autocast, which keeps weights in the other dtype to the end of a pass."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _deviation(what: str, store: Store) -> StageError:
    return StageError(what, store.path, "divide with this input as an example, or run without strict")


@contextmanager
def _of_another_thread() -> Iterator[None]:
    """Disable, in a thread that calls a part of a pass, what is disabled in the thread of the pass."""
    with torch.no_grad(), _no_cast_is_kept():
        yield


class Stream:
    """A module whose weights come from a store as they are needed. A context manager, callable like the module.

    `module` is the module itself; its other attributes are reached through the stream. One pass at a time: another call
    of the module waits, and a part that another thread calls during a pass belongs to that pass. In the child of a fork
    it starts a reader of its own, and uses one thread of PyTorch, whose other threads are not there.
    """

    def __init__(
        self,
        module: nn.Module,
        store: Store,
        plan: WeightPlan,
        sizes: Mapping[str, int],
        config: StreamConfig,
        bounds: Bounds = UNCOUNTED,
    ) -> None:
        """`sizes`: bytes that each shard counts against the budget of the plan."""
        self.module, self.store, self.plan, self.strict, self._sizes = module, store, plan, config.strict, sizes
        grows = min(plan.resident_bytes + plan.pool_bytes, sum(sizes.values()))
        self.counts, self.trace = Counts(), Trace(num_passes=TRACED_PASSES)
        self._divided = placement.module_of(store)
        self._shards, self._tensors = store.manifest.shards, store.manifest.tensors()
        first, *others = placement.streamed_shards(store)
        needs = [dict.fromkeys((*self._divided.pinned, *first)), *others]  # pinned ones stay from the first use on
        self._needs = [[name for name in shards if name not in plan.sliced] for shards in needs]
        """Shards that each part has in memory as a whole."""
        self._looked_up = _without_tied_tables(self._needs, module, store, plan)
        """Tied tables that a part does not have in memory, because it is taken to read rows of them only."""
        self._starts = {part.start: index for index, part in enumerate(self._divided.parts) if part.start is not None}
        self._rows, self._layouts = placement.WeightRows(store, plan.sliced, plan.slice_bytes), layouts_of(store)
        self._part, self._first, self._next_first = -1, 0, 0
        self._calls: Counter[str] = Counter()
        self._slots: dict[str, Slot] = {}
        self._paged: dict[str, Tensor] = {}
        self._lost: list[tuple[weakref.ref[np.ndarray], int]] = []
        self._passes = Passes()
        self._is_open, self._closing, self._bytes_before = False, ExitStack(), 0
        self.bounds, self._outside = bounds, bounds.outside
        self._first_pass: FirstPass | None = None
        if bounds.process_bytes is not None:
            self._first_pass = FirstPass(store, sizes, plan, bounds.process_bytes)
            self.plan = self._first_pass.smallest
        names = [*dict.fromkeys(name for shards in _streamed(self._needs, self.plan) for name in shards)]
        self._reads = choose_reads(store, config.reads, names, grows, available_bytes())
        self.counts.outside_bytes = 0 if bounds.outside is None else bounds.outside.counted_bytes

    def open(self) -> Stream:
        """Take the weights out of the module, load its buffers, start to read."""
        parts = {path: part for path, part in self.module.named_modules() if not path or part._parameters}
        streamed = next((path for path, part in parts.items() if part in _STREAMED), None)
        if streamed is not None:
            what = f"{streamed or 'the module'} is streamed already"
            raise UsageError(what, self.store.path, "close the other stream first")
        with ExitStack() as closing:
            _STREAMED.update(parts.values())
            closing.callback(_STREAMED.difference_update, [*parts.values()])
            closing.callback(self.store.close)
            weights = weights_of(self.module)
            for name in self._divided.buffers:
                weights[name].put(placement.read_tensor(self.store, name, self._layouts))
            self._placement = placement.Placement(weights, _fetch_of(self), self._rows, self._layouts)
            closing.callback(self._placement.clear)
            if self._outside is not None:
                self._outside.free()
            del weights
            free_heap()  # else small weights that the module has released count on
            self._feed = self._open_feed({})
            closing.callback(_close_feed, self)
            LEDGER.reserve(self, _share(self, self._feed))
            closing.callback(LEDGER.release, self)
            closing.callback(surround(self.module, self._run_pass))
            starts = {call.module for call in self._starts}
            for path, module in self.module.named_modules():
                if path in starts:
                    closing.callback(surround(module, partial(self._call, path)))
            self._is_open, self._closing = True, closing.pop_all()
        return self

    __enter__ = open

    def _open_feed(self, kept: Mapping[str, Slot]) -> WeightFeed:
        """Start to read; `kept` are slots of residents that the module refers to."""
        sizes = {name: page_rounded(shard.bytes) for name, shard in self._shards.items()}
        # A table that is taken to be looked up only may be needed as a whole after all: it has a place of its own.
        places = [[*names, *self._looked_up.get(index, ())] for index, names in enumerate(self._needs)]
        streamed, is_aligned = _streamed(places, self.plan), self._reads.name == "mapped"
        self._arena = Arena(streamed, sizes, self._sizes, self.plan.pool_bytes, is_aligned=is_aligned)
        residents = {name: kept.get(name) or Slot(sizes[name]) for name in sorted(self.plan.residents)}
        buffers = Buffers(self._arena, residents, READ_AHEAD)
        first_use = {name: index for index, names in reversed([*enumerate(self._needs)]) for name in names}
        # By halves: the threads of PyTorch would wait for the core that a single reader takes.
        return WeightFeed(self.store, buffers, first_use, self.trace, halves=True, **self._reads.options)

    def close(self) -> None:
        """Stop the reader and free all weights; the module cannot run afterwards."""
        with self._passes.begin(), self._passes.changing:
            self._closing.close()
            self._slots.clear()
            self._paged.clear()
            self.store.close()
            if self._is_open:
                self._is_open = False
                self._bytes_before += self._feed.bytes_read

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        what = "a stream cannot be pickled: its weights are in the memory of this process"
        raise UsageError(what, self.store.path, "call offramp.stream(module, store) in the other process")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one pass without gradients."""
        if not self._is_open:
            raise ValueError("the stream is not open: use it in a `with` block, or call open()")
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Forward attribute access to the module."""
        return getattr(self.__dict__["module"], name)

    def record(self) -> dict[str, Any]:
        """Return one JSON object about the run so far."""
        bytes_read = self._bytes_before + (self._feed.bytes_read if self._is_open else 0)
        reads = reads_by_now(self._reads, self._feed if self._is_open else None)
        return {
            **vars(self.counts),
            "unplanned": sorted(self.counts.unplanned),
            "held": sorted(self.counts.held),
            "gathered_bytes": self._rows.bytes_read,
            "store_sha256": self.store.digest,
            "resident_bytes": self.plan.resident_bytes,
            "limited_by": self.bounds.limited_by,
            "room_bytes": self.plan.pool_bytes,
            "sliced": sorted(self.plan.sliced),
            "bytes_read_total": bytes_read + self._rows.bytes_read,
            "reads": reads.name,
            "reads_because": reads.because,
        }

    def _run_pass(self, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any], first: int = 0) -> Any:
        """Run one pass without gradients: of the module, or of the submodule that part `first` starts with."""
        if self._passes.is_own:  # the module calls itself
            return forward(*args, **kwargs)
        if self.module.training:
            what = "the module is in training mode, and streamed weights cannot be trained"
            raise UsageError(what, None, "call eval() on it")
        with self._passes.begin() as is_next, torch.no_grad(), _no_cast_is_kept():
            if not is_next:
                return forward(*args, **kwargs)
            if not self._is_open:  # closed while this pass waited
                raise _closed("the module", "a pass")
            if self._passes.is_forked:
                torch.set_num_threads(1)  # its other threads are not in this process
            try:
                with self._passes.changing:
                    self._begin(first)
                output = forward(*args, **kwargs)
                if any(isinstance(tensor, Placeholder) for tensor in tensors_of(output)):  # empty after the stream
                    output = with_data(output, lambda weight: self._fetch(weight.weight_name, RESULT))
                with self._passes.changing:
                    self._leave(strict=self.strict)
                    if not first and not self._passes.is_shared:
                        _change_plan(self)
                return output
            finally:
                with self._passes.changing:
                    self._end()

    def _turns(self, first: int) -> list[Turn]:
        """Return the reads of a pass that begins with part `first`, in order."""
        return [Turn(name) for shards in reading_order(self._needs[first:]) for name in shards]

    def _begin(self, first: int) -> None:
        if self._part >= 0:  # an interrupt has stopped the end of the previous pass
            self._leave()
            self._placement.clear()
            self._slots.clear()
        changed = self._placement.changed()
        if changed is not None:
            what = f"the weight {changed} of a streamed module was written to or replaced since its last pass"
            raise StageError(what, None, "compute a new tensor in forward, or divide a module that has the new weights")
        self._calls.clear()
        if self._first_pass is not None:
            self._first_pass.begin()
        self._feed.begin_pass(self._turns(first), restart=first != self._next_first)
        self._first, self._part = first, first - 1
        if not first:
            self._enter(0)

    def _end(self) -> None:
        """End a pass, whatever the module raised."""
        self._leave()
        self._paged.clear()
        self.counts.passes += 1
        self._next_first = (self._first + 1) % len(self._needs) if self._first else 0
        self._feed.end_pass(self._turns(self._next_first))
        self._part = -1
        if self._outside is not None:
            self._outside.free()
            _look_outside(self.counts, self._outside, self.plan)

    def _call(self, path: str, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a submodule that a part may start with."""
        if not self._passes.thread:  # it is called alone, such as an encoder by generation
            first = self._starts.get(Call(path, 1), 0)
            return self._run_pass(lambda *a, **named: self._call(path, forward, a, named), args, kwargs, first)
        with nullcontext() if self._passes.is_own else _of_another_thread():
            with self._passes.changing:
                self._passes.is_shared |= not self._passes.is_own
                self._start_part(path)
            return forward(*args, **kwargs)

    def _start_part(self, path: str) -> None:
        """Count a call of a submodule, and exchange the weights if a part starts with it."""
        self._calls[path] += 1
        index = self._starts.get(Call(path, self._calls[path]))
        if index is None or index == self._part:  # a weight that a hook used before has brought the part
            return
        if index != self._part + 1:
            self.counts.disorders += 1
            if self.strict:
                what = f"stage {index:03d} began after {self._part:03d}: another path than when divided"
                raise _deviation(what, self.store)
            self._leave()
            self._feed.begin_pass(self._turns(index))
        self._enter(index)

    def _enter(self, index: int) -> None:
        """Take out the weights that a part does not need, and put in those that it does."""
        needs = self._needs[index]
        self._leave(needs, strict=self.strict)
        self._paged.clear()
        if self._outside is not None:
            self._outside.free()
        self._part = index
        for name in needs:
            if name not in self._slots:
                self._passes.is_reading = True
                loaded = self._feed.acquire(name)
                self._passes.is_reading = False
                assert loaded is not None, "without a deadline it waits"
                self._slots[name] = loaded.slot
                self._placement.put(self._shards[name], loaded.slot)
        if self._placement.replaced is not None:
            what = f"the module puts another tensor in the place of the weight {self._placement.replaced}"
            raise StageError(what, None, "compute with the tensor itself, or divide with this input as an example")
        self._update_peak()

    def _leave(self, keeping: Collection[str] = (), *, strict: bool = False) -> None:
        """Take out all streamed shards except `keeping`. `strict`: raise StageError for a weight still referred to."""
        all_held: list[str] = []
        for name in [name for name in self._slots if name not in keeping and name not in self.plan.residents]:
            slot = self._slots[name]
            held = self._placement.remove(self._shards[name], slot)
            # Another thread may be computing with a weight that it holds in a place where uses cannot be counted.
            self._feed.release(name, discard=bool(held) or self._passes.is_shared)
            del self._slots[name]
            if held or self._passes.is_shared:
                self._lost.append((weakref.ref(slot.array), self._sizes[name]))
                self.counts.held.update(held)
                all_held += held
        if all_held and strict:
            raise _deviation(f"{all_held[0]} is still referred to after stage {self._part:03d}", self.store)

    def _fetch(self, name: str, operation: Any) -> Tensor:
        """Return a weight that is used while it is not in memory."""
        if not self._is_open:
            raise _closed(name, operation)
        with self._passes.changing:
            return self._paged[name] if name in self._paged else self._read(name, operation)

    def _read(self, name: str, operation: Any) -> Tensor:
        """Read a weight that is used while it is not in memory, or refuse that."""
        shard = self._tensors[name][0]
        is_tied = shard.name in self._looked_up.get(self._part, ())
        if is_tied:  # from now on this part has it in memory
            self._looked_up[self._part].remove(shard.name)
            self._needs[self._part].append(shard.name)
        elif self.strict:
            where = f"in stage {self._part:03d}" if self._part >= 0 else "outside of a pass"
            homes = [f"{i:03d}" for i, part in enumerate(self._divided.parts) if shard.name in part.shards]
            planned = ", ".join(homes) or "none"
            raise _deviation(f"{operation} touches {name} {where}; it is planned for {planned}", self.store)
        now = self._placement.loaded(name)
        if self._outside is not None and now is not None:
            return now  # another weight of the same operation has brought its part
        if not is_tied:
            self.counts.unplanned_loads += 1
            self.counts.unplanned.add(name)
        part = next((index for index, names in enumerate(self._needs) if shard.name in names), None)
        is_bounded = self._outside is not None and not self._passes.is_shared and operation != RESULT
        if is_bounded and self._part >= 0 and part is not None:  # in place of this part: the plan has memory for one
            self._leave()
            self._feed.begin_pass(self._turns(part))
            self._enter(part)
            now = self._placement.loaded(name)
            if now is not None:  # else the module's own code has put another tensor there
                return now
        tensor = placement.read_tensor(self.store, name, self._layouts)
        if self._part < 0:  # outside of a pass, where no stage ends: the last one alone is kept
            self._paged.clear()
        self._paged[name] = tensor
        self._update_peak()
        return tensor

    def _update_peak(self) -> None:
        """Count the bytes of weights that are in memory now."""
        paged = sum(tensor.nbytes for tensor in self._paged.values())
        self._lost = [(array, num_bytes) for array, num_bytes in self._lost if array() is not None]
        held = sum(num_bytes for _, num_bytes in self._lost)
        weights = self._arena.peak_bytes + self.plan.resident_bytes + self.plan.slice_bytes + paged + held
        weights += self.counts.outside_bytes
        self.counts.peak_weight_bytes = max(self.counts.peak_weight_bytes, weights)


def _streamed(needs: Sequence[Sequence[str]], plan: WeightPlan) -> list[list[str]]:
    """Return the shards of each part that do not stay in memory."""
    return [[name for name in shards if name not in plan.residents] for shards in needs]


def _without_tied_tables(
    needs: list[list[str]], module: nn.Module, store: Store, plan: WeightPlan
) -> dict[int, set[str]]:
    """Remove streamed tables from the first of several parts that use them. Return what was removed, by part.

    A table of an embedding that another part uses as well is tied: the first part looks up a few rows, which are
    gathered, and the last one multiplies by all of them.
    """
    removed: dict[int, set[str]] = {}
    weights, shards = weights_of(module), store.manifest.shards
    for name in placement.sliceable_shards(store):
        parts = [index for index, names in enumerate(needs) if name in names]
        places = weights[shards[name].tensors[0].name].places
        is_table = shards[name].blocks is not None and any(isinstance(owner, nn.Embedding) for owner, *_ in places)
        if len(parts) > 1 and is_table and name not in plan.residents:
            needs[parts[0]].remove(name)
            removed.setdefault(parts[0], set()).add(name)
    return removed


def _closed(name: str, operation: Any) -> StageError:
    return StageError(f"{operation} needs {name}, and its stream is closed", None, "open the store again")


def _fetch_of(stream: Stream) -> Callable[[str, Any], Tensor]:
    """Return the function by which placeholders fetch weights. It does not keep a closed stream alive."""
    found = weakref.ref(stream)

    def fetch(name: str, operation: Any) -> Tensor:
        stream = found()
        if stream is None:
            raise _closed(name, operation)
        return stream._fetch(name, operation)

    return fetch


def _look_outside(counts: Counts, outside: Outside, plan: WeightPlan) -> None:
    """Count what passes have added beside the weights, and warn once if weights take more than their plan allows."""
    limit = plan.resident_bytes + plan.pool_bytes + plan.slice_bytes + outside.counted_bytes
    if counts.passes & (counts.passes - 1) == 0:
        found = outside.counted_bytes + outside.grown_bytes()
        counts.peak_weight_bytes += max(found - counts.outside_bytes, 0)
        counts.outside_bytes = max(found, counts.outside_bytes)
    if counts.peak_weight_bytes > limit and not outside.is_said:
        outside.is_said = True
        size, beside = format_size(counts.peak_weight_bytes), format_size(counts.outside_bytes)
        why = f"{beside} are in tensors that are no weights of the store, {len(counts.unplanned)} weights were used"
        what = f"offramp: {size} of weights were in memory, the budget of weights is {format_size(limit)}"
        warnings.warn(f"{what}: {why} outside their stages, {len(counts.held)} are still referred to", stacklevel=2)


def _close_feed(stream: Stream) -> None:
    if stream._first_pass is not None:
        stream._first_pass.stop()
    stream._feed.close()


def _change_plan(stream: Stream) -> None:
    """Change to the plan that the first pass allows, after it. Warn once if even the fewest weights are too many."""
    if stream._first_pass is None:
        return
    stream.plan = stream._first_pass.next_plan(stream._feed.resident_bytes() + stream.plan.slice_bytes)
    excess = stream._first_pass.excess_bytes
    if excess > 0:
        limit, beside = stream.bounds.process_bytes or 0, format_size(stream._first_pass.other_bytes)
        what = f"offramp: the process takes {format_size(limit + excess)}, more than its limit of {format_size(limit)}"
        warnings.warn(f"{what}: {beside} in a pass, besides weights", stacklevel=2)
    stream._first_pass, before, kept = None, stream._feed, dict(stream._slots)
    stream._slots.clear()
    before.close()
    stream._bytes_before += before.bytes_read
    stream._feed = stream._open_feed(kept)
    stream._feed.pass_index = before.pass_index
    LEDGER.reserve(stream, _share(stream, stream._feed))


def _share(stream: Stream, feed: WeightFeed) -> Share:
    """Return what a stream reserves."""
    plan, sizes, bounds = stream.plan, stream._sizes, stream.bounds
    streamed = min(plan.pool_bytes, page_rounded(stream._arena.num_bytes))
    weight_bytes = sum(sizes[name] for name in plan.residents) + streamed + plan.slice_bytes
    return Share(weight_bytes, bounds.activation_bytes, bounds.budget_bytes, feed.resident_bytes, LEDGER.moment())


def stream(
    module: nn.Module | type | Callable[[], nn.Module],
    store: str | os.PathLike,
    budget: int | str | None = None,
    *,
    weight_budget: int | str | None = None,
    inputs: Any = None,
    **options: Any,
) -> Stream:
    """Run a divided module under a budget: `with stream(model, store, budget="1GiB") as model: model(**inputs)`.

    Args:
        module: the module, whose weights are freed, or its class or a function that builds it, which is then built
            without weights.
        store: the folder that `divide` made from it.
        budget: maximum resident memory of the whole process; None: what the machine allows; `"auto"`: what its
            container allows.
        weight_budget: maximum bytes of weights in memory instead, whatever else the process takes.
        inputs: the largest expected inputs, as `divide` takes them, for `budget`: they are run once to measure
            activations. None: no input is larger than the example of the division.
        options: fields of `StreamConfig`: `strict`, `reads`, `verify`.

    Raises BudgetError naming the smallest budget that works, StageError if the module does not belong to the store,
    StoreError, and ValueError for an unknown option.
    """
    if budget is not None and weight_budget is not None:
        raise ValueError("give budget, for the whole process, or weight_budget, for weights alone")
    require_known(StreamConfig, options, "stream option")
    config = StreamConfig(**options)
    opened = Store(store, config.verify)
    module = matching_module(module, opened)
    outside = Outside(module)
    proof = opened.manifest.proof
    if config.strict and proof is not None and proof.is_paged:
        what = "weights of this store are read outside their stages"
        raise RefusedError(what, opened.path, "divide again with the inputs that will come, or run without strict")
    if weight_budget is not None:
        sizes = placement.data_bytes(opened)
        plan = placement.plan_within(opened, sizes, outside.weight_limit(parse_size(weight_budget), opened))
        return Stream(module, opened, plan, sizes, config, Bounds(outside))
    activation_bytes = stream_bytes(opened.program)
    if inputs is not None:
        activation_bytes = _measure_activations(module, opened, Arguments(inputs), config.reads)
    limit = LEDGER.left(least_limit(None if budget in (None, AUTO) else parse_size(budget)), LEDGER.moment())
    sizes = placement.slot_bytes(opened)
    plan = _plan_of_process(module, opened, limit, activation_bytes, sizes)
    budget_bytes = limit.num_bytes if limit.source == BUDGET else None
    # Without a budget, and with all weights resident, the first pass need not find out how many of them fit.
    is_free = limit.source == MEMORY and all(map(plan.residents.issuperset, placement.streamed_shards(opened)))
    process_bytes = None if is_free else limit.num_bytes - limit.reserved_bytes
    bounds = Bounds(outside, limit.source, budget_bytes, activation_bytes, process_bytes)
    return Stream(module, opened, plan, sizes, config, bounds)


def _plan_of_process(
    module: nn.Module, store: Store, limit: Limit, activation_bytes: int, sizes: Mapping[str, int]
) -> WeightPlan:
    """Return the plan of weights for a limit of the whole process. Raises BudgetError."""
    base_bytes = _base_bytes(module) + HEADROOM_BYTES
    other = base_bytes + limit.reserved_bytes + activation_bytes
    try:
        return placement.plan_within(store, sizes, limit.num_bytes - other)
    except BudgetError:
        weight_bytes = placement.smallest_weights(store, sizes)
        parts = (("process", base_bytes), ("activations", activation_bytes), ("weights", weight_bytes))
        raise too_small(limit, parts, other + weight_bytes) from None


def _measure_activations(module: nn.Module, store: Store, inputs: Arguments, reads: str) -> int:
    """Return the bytes that a pass takes besides weights, measured with the fewest weights in memory.

    Afterwards the module has its weights again: a budget can still be refused.
    """
    sizes, held = placement.slot_bytes(store), [(weight, weight.tensor) for weight in weights_of(module).values()]
    smallest = placement.smallest_weights(store, sizes)
    plan = placement.plan_within(store, sizes, smallest)
    trial = Stream(module, Store(store.path, store.policy), plan, sizes, StreamConfig(reads=reads))
    try:
        with torch.random.fork_rng(devices=[]), trial as running, PeakMeter("clear_refs") as meter:
            inputs.copy().call(running)
            before = read_memory().rss_bytes - running.counts.peak_weight_bytes
    finally:
        for weight, tensor in held:
            weight.put(tensor)
    return max(meter.peak_bytes - before - smallest, 0) + store.program.activation_bytes


def _base_bytes(module: nn.Module) -> int:
    """Return the resident memory of the process without the weights that the module will release."""
    parameters = [weight.tensor for weight in weights_of(module).values() if not weight.is_buffer]
    held = sum(tensor.nbytes for tensor in parameters if type(tensor) is nn.Parameter and not tensor.is_meta)
    return max(read_memory().rss_bytes - held - LEDGER.resident_bytes(), 0)
