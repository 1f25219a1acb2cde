"""Tensors that a streamed module holds beside the weights of its store: buffers, caches, packed weights, and those that
a hook computes from others before each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from offramp.errors import BudgetError
from offramp.store import Store
from offramp.streaming import placement
from offramp.streaming.placeholders import Placeholder, num_bytes
from offramp.streaming.reachable import referents
from offramp.units import format_size, named_size

FEW = 1 / 8
"""Fraction of a weight budget up to which buffers are not counted."""
MOST_OBJECTS = 200_000
"""Objects after which the search for tensors ends."""
PLAIN = (str, bytes, int, float, complex, type(None), type, ModuleType, torch.dtype, torch.device)
INTERNAL = frozenset({*vars(nn.Module()), "forward", "_call_impl", "_flat_weights"} - {"_buffers"})
"""Attributes of a module in which its weights lie, or no tensors."""


class Computed(NamedTuple):
    """A weight that a hook computes before each call of its module, as an attribute."""

    module: nn.Module
    name: str
    source: str
    """Full name of the weight of equal size that it is computed from."""
    compute: Callable[[], Tensor]


class Outside:
    """The tensors of one module that are no weights of its store."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._computed = module, list(_computed_weights(module))
        self.num_bytes = self._bytes()
        """Bytes of these tensors when the stream was made, without weights that hooks compute."""
        self.counted_bytes = 0
        """Bytes that count against a weight budget."""
        self.is_said = False
        """True after a warning that weights have taken more than their budget."""

    def weight_limit(self, limit_bytes: int, store: Store) -> int:
        """Return what a weight budget leaves for the weights of the store.

        Weights that the hooks of one stage compute count, and other tensors unless they are few. Raises BudgetError.
        """
        shards, sources = store.manifest.shards, {computed.source for computed in self._computed}
        stages = [
            [entry for name in names for entry in shards[name].tensors] for names in placement.streamed_shards(store)
        ]
        self.counted_bytes = max(sum(each.num_bytes for each in stage if each.name in sources) for stage in stages)
        if self.num_bytes > limit_bytes * FEW:
            self.counted_bytes += self.num_bytes
        needed = self.counted_bytes + placement.smallest_weights(store, placement.data_bytes(store))
        if self.counted_bytes and limit_bytes < needed:
            what = f"a weight budget of {format_size(limit_bytes)} is too small"
            why = f"tensors of the module beside its weights take {format_size(self.counted_bytes)}"
            raise BudgetError(what, why, f"the smallest weight budget that works is {named_size(needed)}")
        return limit_bytes - self.counted_bytes

    def free(self) -> None:
        """Replace weights that hooks have computed by placeholders that compute them where they are used."""
        for module, name, _, compute in self._computed:
            weight = vars(module).get(name)
            if isinstance(weight, Tensor) and not isinstance(weight, Placeholder):
                vars(module)[name] = Placeholder(name, weight.detach(), lambda *_, compute=compute: compute())

    def grown_bytes(self) -> int:
        """Return the bytes that have been added since the stream was made."""
        return max(self._bytes() - self.num_bytes, 0)

    def _bytes(self) -> int:
        computed = {(id(module), name) for module, name, *_ in self._computed}
        roots = [
            value
            for part in self._module.modules()
            for name, value in vars(part).items()
            if name not in INTERNAL and (id(part), name) not in computed
        ]
        return sum(_storages(roots, {id(part) for part in self._module.modules()}).values())


def _computed_weights(module: nn.Module) -> Iterator[Computed]:
    for path, part in module.named_modules():
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                name, source, compute = hook.name, "_v", partial(hook.compute_weight, part)
            elif isinstance(hook, SpectralNorm):
                name, source, compute = hook.name, "_orig", partial(hook.compute_weight, part, False)
            elif isinstance(hook, BasePruningMethod):
                name, source, compute = hook._tensor_name, "_orig", partial(hook.apply_mask, part)
            else:
                continue
            yield Computed(part, name, f"{path}.{name}{source}".lstrip("."), compute)


def _storages(roots: Iterable[Any], own: Iterable[int] = ()) -> dict[int, int]:
    """Return the bytes of the memory of all tensors and arrays that can be reached, by address.

    `own`: ids of the modules that are streamed. The weights of another module, such as one in a plain list, are among
    what can be reached.
    """
    found: dict[int, int] = {}
    seen = set(own)
    left = list(roots)
    while left and len(seen) < MOST_OBJECTS:
        part = left.pop()
        if isinstance(part, PLAIN) or id(part) in seen or type(part).__module__.startswith("offramp."):
            continue
        seen.add(id(part))
        if isinstance(part, Tensor):
            if not part.is_meta:
                is_dense = part.layout == torch.strided and not is_traceable_wrapper_subclass(part)
                storage = part.untyped_storage() if is_dense else None
                found[storage.data_ptr() if storage else -id(part)] = storage.nbytes() if storage else num_bytes(part)
        elif isinstance(part, np.ndarray):
            while isinstance(part.base, np.ndarray):
                part = part.base
            if not isinstance(part, np.memmap):
                found[part.ctypes.data] = part.nbytes
        elif isinstance(part, torch.ScriptObject):  # packed: its state is a copy
            state = getattr(part, "__getstate__", tuple)()
            found[-id(part)] = sum(_storages([state]).values())
        else:
            left.extend(referents(part))
    return found
