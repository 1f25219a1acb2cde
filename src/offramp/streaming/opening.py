"""The verb stream: from a store and a budget to a module that runs within it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from offramp.errors import BudgetError, RefusedError, StageError
from offramp.measure import PeakMeter, available_bytes, read_memory
from offramp.runtime.memory_model import HEADROOM_BYTES, stream_bytes, unlimited_bytes
from offramp.runtime.planner import page_rounded
from offramp.runtime.run_plan import choose_direct
from offramp.runtime.weight_plan import plan_weights, smallest_bytes
from offramp.store import Shard, Store
from offramp.streaming.capture import Arguments
from offramp.streaming.parts import module_of, streamed_shards
from offramp.streaming.placeholders import Weight, fingerprint, unsaved_buffers, weights_of
from offramp.streaming.placement import DTYPES, is_copied
from offramp.streaming.streamed import Stream
from offramp.streaming.weightless import of_class, with_dtypes
from offramp.units import format_size, parse_size


def stream(
    module: nn.Module | type,
    store: str | os.PathLike,
    budget: int | str | None = None,
    *,
    weight_budget: int | str | None = None,
    inputs: Any = None,
    strict: bool = False,
    reads: str = "auto",
    verify: str = "first",
) -> Stream:
    """Run a divided module under a budget: `with stream(model, store, budget="1GiB") as model: model(**inputs)`.

    Args:
        module: the module, whose weights are freed, or its class, which is then built without weights.
        store: the folder that `divide` made from it.
        budget: maximum resident memory of the whole process; None: what the machine allows.
        weight_budget: maximum bytes of weights in memory instead, whatever else the process takes.
        inputs: the largest expected inputs, as `divide` takes them, for `budget`: they are run once to measure
            activations. None: no input is larger than the example of the division.
        strict: refuse deviations from the plan (a weight used outside its stage, another order of stages) instead of
            reading the weights when they are used.
        reads, verify: as for `load`.

    Raises BudgetError naming the smallest budget that works, StageError if the module does not belong to the store,
    StoreError.
    """
    if budget is not None and weight_budget is not None:
        raise ValueError("give budget, for the whole process, or weight_budget, for weights alone")
    opened = Store(store, verify)
    module_of(opened)
    if isinstance(module, type):
        module = of_class(module, Path(store))
        with_dtypes(module, _dtypes(opened))
        _require_buffers(module, opened)
    _require_same(module, weights_of(module), opened)
    proof = opened.manifest.proof
    if strict and proof is not None and proof.is_paged:
        what = "weights of this store are read outside their stages"
        raise RefusedError(what, opened.path, "divide again with the inputs that will come, or run without strict")
    activation_bytes = stream_bytes(opened.program)
    if weight_budget is None and inputs is not None:
        activation_bytes = _measure_activations(module, opened, Arguments(inputs), reads)
    if weight_budget is not None:
        return _within(module, opened, parse_size(weight_budget), data_bytes(opened), strict, reads)
    limit = unlimited_bytes() if budget is None else parse_size(budget)
    other = _base_bytes(module) + activation_bytes + HEADROOM_BYTES
    try:
        return _within(module, opened, limit - other, slot_bytes(opened), strict, reads)
    except BudgetError:
        needed = other + _smallest(opened, slot_bytes(opened))
        raise BudgetError(
            f"budget of {format_size(limit)} is too small",
            f"process {format_size(other - activation_bytes)} + activations {format_size(activation_bytes)} + weights",
            f"the smallest budget that works is {-(-needed >> 20)}MiB",
        ) from None


def sliceable_shards(store: Store) -> list[str]:
    """Return the shards that may be read some rows at a time."""
    sliced = set(module_of(store).sliced)
    return [name for name, shard in store.manifest.shards.items() if shard.tensors and shard.tensors[0].name in sliced]


def _smallest(store: Store, sizes: Mapping[str, int]) -> int:
    """Return the fewest bytes of weights that the module can run with."""
    return smallest_bytes(streamed_shards(store), sizes, module_of(store).pinned, sliceable_shards(store))


def _within(
    module: nn.Module, store: Store, limit_bytes: int, sizes: Mapping[str, int], strict: bool, reads: str
) -> Stream:
    """Return a stream with at most `limit_bytes` of weights in memory."""
    pinned = module_of(store).pinned
    plan = plan_weights(streamed_shards(store), sizes, pinned, limit_bytes, sliceable_shards(store))
    grows = min(plan.resident_bytes + plan.pool_bytes, sum(sizes.values()))
    direct = choose_direct(store, reads, grows, available_bytes())
    return Stream(module, store, plan, sizes, strict=strict, direct=direct)


def _measure_activations(module: nn.Module, store: Store, inputs: Arguments, reads: str) -> int:
    """Return the bytes that a pass takes besides weights, measured with the fewest weights in memory."""
    sizes = slot_bytes(store)
    smallest = _smallest(store, sizes)
    trial = _within(module, Store(store.path, store.policy), smallest, sizes, False, reads)
    with trial as running, PeakMeter("clear_refs") as meter:
        inputs.call(running)
        before = read_memory().rss_bytes - running.counts.peak_weight_bytes
    return max(meter.peak_bytes - before - smallest, 0) + store.program.activation_bytes


def data_bytes(store: Store) -> dict[str, int]:
    """Return the bytes of weights of each shard."""
    return {name: shard.data_bytes + _copied_bytes(shard) for name, shard in store.manifest.shards.items()}


def slot_bytes(store: Store) -> dict[str, int]:
    """Return the memory that each shard takes: its file in whole pages, and tensors that are copied out of it."""
    return {name: page_rounded(shard.bytes) + _copied_bytes(shard) for name, shard in store.manifest.shards.items()}


def _copied_bytes(shard: Shard) -> int:
    return sum(entry.num_bytes for entry in shard.tensors if is_copied(entry))


def _base_bytes(module: nn.Module) -> int:
    """Return the resident memory of the process without the weights that the module will release."""
    own = {id(weight.tensor): weight for weight in weights_of(module).values()}
    held = sum(weight.num_bytes for weight in own.values() if _has_data(weight))
    return max(read_memory().rss_bytes - held, 0)


def _has_data(weight: Weight) -> bool:
    return not weight.is_buffer and type(weight.tensor) in (nn.Parameter,) and not weight.tensor.is_meta


def _dtypes(store: Store) -> dict[str, str]:
    """Return the dtype of each weight, under all its names."""
    found = {name: tensor.dtype for name, (_, tensor) in store.manifest.tensors().items()}
    for name, aliases in module_of(store).aliases.items():
        found.update((alias, found[name]) for alias in aliases)
    return found


def _require_same(module: nn.Module, weights: Mapping[str, Weight], store: Store) -> None:
    """Raise StageError unless the module has exactly the weights of the store, on the CPU."""
    for name, weight in weights.items():
        if weight.tensor.device.type not in ("cpu", "meta"):
            what = f"{name} is on {weight.tensor.device}, and a stream computes on the CPU"
            raise StageError(what, store.path, "give module.cpu()")
    divided, tensors = module_of(store), store.manifest.tensors()
    stored = {name: (DTYPES[tensor.dtype], tuple(tensor.shape)) for name, (_, tensor) in tensors.items()}
    own = {name: (weight.tensor.dtype, tuple(weight.tensor.shape)) for name, weight in weights.items()}
    differ = sorted(name for name in own if stored.get(name) != own[name])
    buffers = {name for name, weight in weights.items() if weight.is_buffer}
    if fingerprint(weights) == divided.weights_sha256 and not differ and buffers == set(divided.buffers):
        return
    differ += sorted(stored.keys() - own.keys())
    what = "which weights are tied, or are buffers, differs from the store"
    if differ:
        name = differ[0]
        what = f"{name} is {_described(own.get(name))} in the module, {_described(stored.get(name))} in the store"
    raise StageError(what, store.path, f"give a {divided.name} as it was divided, or divide again")


def _require_buffers(module: nn.Module, store: Store) -> None:
    """Raise StageError unless a module built from its class has the buffers of the divided one."""
    proof = store.manifest.proof
    if proof is not None and proof.unsaved_buffers_sha256 not in (None, unsaved_buffers(module)):
        what = "buffers that are in no checkpoint are others than those of the divided module"
        raise StageError(what, store.path, f"give the {module_of(store).name} that was divided, not its class")


def _described(found: tuple[Any, tuple[int, ...]] | None) -> str:
    return "missing" if found is None else f"{str(found[0]).removeprefix('torch.')} {list(found[1])}"
