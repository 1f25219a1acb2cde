"""Check that a module and a store belong together: equal names, shapes, dtypes and ties, and equal weights."""

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from offramp.errors import StageError
from offramp.store import Shard, Store
from offramp.store.safetensors import header_bytes
from offramp.streaming import attributes, placement
from offramp.streaming.capture import are_equal
from offramp.streaming.layouts import layout_of, layouts_of
from offramp.streaming.placeholders import (
    PIECE_BYTES,
    Placeholder,
    Weight,
    fingerprint,
    pieces,
    unsaved_buffers,
    weights_of,
)
from offramp.streaming.weightless import of_class, require_buffers, with_dtypes


def matching_module(module: nn.Module | type | Callable[[], nn.Module], store: Store) -> nn.Module:
    """Return the module, built if it is a class or a function that builds one.

    Raises StageError unless the store was made from such a module.
    """
    divided = placement.module_of(store)
    tensors = {n: entry for n, (shard, entry) in store.manifest.tensors().items() if shard.name != placement.CONSTANTS}
    if not isinstance(module, nn.Module):
        module = of_class(module, store.path)
        aliases = {alias: name for name, aliases in divided.aliases.items() for alias in aliases}
        named = tensors | {alias: tensors[name] for alias, name in aliases.items()}
        attributes.require_equal(module, store)
        with_dtypes(module, {name: entry.dtype for name, entry in named.items()})
        proof = store.manifest.proof
        if proof is not None and proof.unsaved_buffers_sha256 not in (None, unsaved_buffers(module)):
            what = "buffers that are in no checkpoint are others than those of the divided module"
            raise StageError(what, store.path, f"give the {divided.name} that was divided, not its class")
    require_buffers(module, "give its class, or a module whose buffers have data")
    weights = weights_of(module)
    for name, weight in weights.items():
        if weight.tensor.device.type not in ("cpu", "meta"):
            what = f"{name} is on {weight.tensor.device}, and a stream computes on the CPU"
            raise StageError(what, store.path, "give module.cpu()")
    own = {name: _described(weight.tensor.dtype, weight.tensor.shape) for name, weight in weights.items()}
    stored = {name: _described(placement.DTYPES[entry.dtype], entry.shape) for name, entry in tensors.items()}
    buffers = {name for name, weight in weights.items() if weight.is_buffer}
    differ = next((name for name in (*sorted(own), *sorted(stored)) if own.get(name) != stored.get(name)), None)
    if differ is not None:
        what = f"{differ} is {own.get(differ, 'missing')} in the module, {stored.get(differ, 'missing')} in the store"
    elif fingerprint(weights) != divided.weights_sha256 or buffers != set(divided.buffers):
        what = "which weights are tied, or are buffers, differs from the store"
    else:
        _require_equal(weights, store)
        return module
    raise StageError(what, store.path, f"give a {divided.name} as it was divided, or divide again")


def _require_equal(weights: Mapping[str, Weight], store: Store) -> None:
    """Raise StageError if the weights that a module holds are others than those of the store.

    What was streamed before, or is of a class, holds none.
    """
    loaded = {n: w for n, w in weights.items() if not w.tensor.is_meta and not isinstance(w.tensor, Placeholder)}
    if all(weight.is_buffer for weight in loaded.values()):
        return
    layouts = layouts_of(store)
    for shard in store.manifest.shards.values():
        held = {entry.name: loaded[entry.name].tensor for entry in shard.tensors if entry.name in loaded}
        if len(held) == len(shard.tensors) and _shard_sha256(shard, held) == shard.sha256:
            differ = [name for name in held if layout_of(held[name]) != layouts.get(name)]
        else:
            differ = [n for n in held if not are_equal([held[n]], [placement.read_tensor(store, n, layouts)])]
        if differ:
            what = f"{differ[0]} has other values or strides in the module than in the store"
            remedy = "divide again to run the module's own weights, or give its class to run those of the store"
            raise StageError(what, store.path, remedy)


def _shard_sha256(shard: Shard, held: Mapping[str, Tensor]) -> str:
    """Return the sha256 of the file that would hold the tensors."""
    digest = hashlib.sha256(header_bytes((e.name, e.dtype, e.shape, e.offset) for e in shard.tensors))
    for entry in shard.tensors:
        for piece in pieces(held[entry.name], PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _described(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
