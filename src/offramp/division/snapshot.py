"""State of a module that a run can change, and its restoration: a division leaves the caller's module as it was.

Parameters are not copied: while a module runs, placeholders stand for them. Everything else that its attributes lead to
is: containers and objects are restored to what they held, tensors to their data.
"""

import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from offramp.streaming.placeholders import Placeholder, bits
from offramp.streaming.reachable import cells, contents, is_own_function, referents, slots

COMPILER = "torch._dynamo"
"""Package of PyTorch that compiles; it takes seconds to import, and is where something is compiled."""
SEED = 0
"""State in which the random generators of the process are before each run."""
Undo = Callable[[], None]
_CLOSED = (ModuleType, type)
"""Objects whose attributes are not part of the state of a module."""
_OF_THREADS = ("asyncio", "concurrent", "logging", "multiprocessing", "queue", "threading")
"""Packages whose objects are left as they are."""


class Snapshot:
    """The state of all objects that the attributes of a module lead to, for a later `restore`."""

    def __init__(self, module: nn.Module) -> None:
        self._reset: list[Undo] = []
        self._undo: list[Undo] = [_undo_of_process()]
        self._weights = {id(tensor) for tensor in module.parameters()}
        self.aliased: set[int] = set()
        """Addresses of the memory of tensors to which anything except the buffers of a module refers."""
        buffers = {id(part._buffers) for part in module.modules()}
        seen, waiting = set(), [module]
        while waiting:
            each = waiting.pop()
            if id(each) not in seen:
                seen.add(id(each))
                found = self._saved(each)
                waiting += found
                self.aliased |= set() if id(each) in buffers else set(filter(None, map(address, found)))

    def _saved(self, each: Any) -> list[Any]:
        """Save one object, and return the objects that it leads to."""
        if isinstance(each, Tensor):
            self._undo.append(_undo_of_tensor(each, has_copy=id(each) not in self._weights))
            return [] if isinstance(each, Placeholder) else [vars(each)]
        if isinstance(each, _CLOSED) or _is_of_threads(type(each)) or is_own_function(each):
            return []
        generator = _undo_of_generator(each)
        if generator is not None:
            self._reset.append(generator)
            return []
        if isinstance(each, (dict, list, deque, set)):
            self._undo.append(_undo_of_container(each))
        elif isinstance(each, (np.ndarray, bytearray)):
            if isinstance(each, bytearray) or each.flags.writeable:  # else such as a file of gigabytes that is mapped
                self._undo.append(_undo_of_array(each))
        elif isinstance(each, FunctionType):
            self._undo += [_undo_of_cell(cell) for cell in cells(each)]
            return [*referents(each), vars(each)]
        elif not isinstance(each, (tuple, frozenset, partial, MethodType)):
            found, attributes = slots(each), getattr(each, "__dict__", None)
            self._undo += [_undo_of_slots(each, found)] if found else []
            return [*([attributes] if isinstance(attributes, dict) else []), *found.values()]
        return referents(each)

    def seed(self) -> None:
        """Set all random generators, those of the process and of the module, to the state that each run begins with."""
        torch.default_generator.manual_seed(SEED)
        random.seed(SEED)
        np.random.seed(SEED)
        for reset in self._reset:
            reset()

    def restore(self) -> None:
        """Restore the state. The last saved is restored first: the module itself last."""
        for undo in (self.seed, *reversed(self._undo)):
            undo()


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[Snapshot]:
    """Restore the module and the random generators afterwards.

    Within, the random generators are in the state that each run begins with, the module has copies of its buffers that
    it may write to, and functions that torch.compile made run uncompiled.
    """
    snapshot = Snapshot(module)
    copies = _Copies(module)
    try:
        for part in module.modules():
            for name, buffer in part._buffers.items():
                if buffer is None or isinstance(buffer, nn.Parameter):
                    continue
                if address(buffer) not in snapshot.aliased:  # else other code would not see what is written
                    part._buffers[name] = copies.of(buffer)
        snapshot.seed()
        with _uncompiled():
            yield snapshot
    finally:
        snapshot.restore()


@cache
def _is_of_threads(kind: type) -> bool:
    """Return whether a class is of those by which threads wait for each other: one that waits now would be lost."""
    return any(each.__module__.partition(".")[0] in _OF_THREADS for each in kind.__mro__)


def _uncompiled() -> Any:
    """Return a context in which functions that torch.compile made run uncompiled.

    PyTorch does not compile them while operations are watched, or fails, and does not try it again afterwards.
    """
    return torch.compiler.set_stance("force_eager") if COMPILER in sys.modules else nullcontext()


class _Copies:
    """Copies of buffers, which share memory where the buffers themselves do."""

    def __init__(self, module: nn.Module) -> None:
        uses = Counter(map(address, {id(buffer): buffer for buffer in module.buffers()}.values()))
        self._shared: dict[int, Any] = {place: None for place, count in uses.items() if place and count > 1}
        self._made: dict[int, Tensor] = {}

    def of(self, buffer: Tensor) -> Tensor:
        """Return the copy of a buffer."""
        if id(buffer) not in self._made:
            place, data = address(buffer), buffer.detach()
            if place in self._shared and not (data.is_conj() or data.is_neg()):
                self._shared[place] = self._shared[place] or data.untyped_storage().clone()
                view = data.storage_offset(), data.shape, data.stride()
                copy = torch.empty(0, dtype=data.dtype).set_(self._shared[place], *view)
            else:
                copy = data.clone()
            self._made[id(buffer)] = copy.requires_grad_(buffer.requires_grad)
        return self._made[id(buffer)]


def address(part: Any) -> int:
    """Return the address of the memory of a dense tensor; 0 for another object."""
    if not isinstance(part, Tensor) or isinstance(part, Placeholder) or part.layout != torch.strided or part.is_nested:
        return 0
    return 0 if is_traceable_wrapper_subclass(part) or part.is_meta else part.untyped_storage().data_ptr()


def _undo_of_generator(each: Any) -> Undo | None:
    """Return what resets a generator of random numbers; None for another object."""
    if isinstance(each, torch.Generator):
        state = each.get_state()
        return lambda: each.set_state(state) and None
    if isinstance(each, random.Random):
        return partial(each.setstate, each.getstate())
    if isinstance(each, np.random.RandomState):
        return partial(each.set_state, each.get_state())
    if isinstance(each, np.random.Generator):
        return partial(setattr, each.bit_generator, "state", each.bit_generator.state)
    return None


def _undo_of_array(array: np.ndarray | bytearray) -> Undo:
    """Return what restores the elements of an array."""
    copy = array[:] if isinstance(array, bytearray) else array.copy()

    def undo() -> None:
        if isinstance(array, bytearray):
            array[:] = copy
        else:
            array[...] = copy

    return undo


def _undo_of_cell(cell: Any) -> Undo:
    """Return what restores a variable that a function takes from around it."""
    before = contents(cell)

    def undo() -> None:
        if contents(cell) is not before:
            cell.cell_contents = before

    return undo


def _undo_of_slots(each: Any, before: Mapping[str, Any]) -> Undo:
    """Return what restores the slots of an object."""

    def undo() -> None:
        for name, value in before.items():
            if getattr(each, name, None) is not value:
                object.__setattr__(each, name, value)

    return undo


def _undo_of_process() -> Undo:
    torch_state, state, numpy_state = torch.default_generator.get_state(), random.getstate(), np.random.get_state()

    def undo() -> None:
        torch.default_generator.set_state(torch_state)
        random.setstate(state)
        np.random.set_state(numpy_state)

    return undo


def _undo_of_container(container: Any) -> Undo:
    before = list(container.items() if isinstance(container, dict) else container)

    def undo() -> None:
        now = list(container.items() if isinstance(container, dict) else container)
        if len(now) != len(before) or any(map(_differ, now, before)):
            container.clear()
            for each in before:
                _put(container, each)

    return undo


def _put(container: Any, each: Any) -> None:
    """Put an element, or an item of a dictionary, into a container."""
    if isinstance(container, dict):
        container[each[0]] = each[1]
    elif isinstance(container, set):
        container.add(each)
    else:
        container.append(each)


def _differ(now: Any, before: Any) -> bool:
    """Return whether two elements of a container, or two items of a dictionary, are not the same objects."""
    if isinstance(now, tuple) and isinstance(before, tuple) and len(now) == len(before):
        return any(one is not other for one, other in zip(now, before, strict=True))
    return now is not before


def _undo_of_tensor(tensor: Tensor, *, has_copy: bool) -> Undo:
    """Return what restores the memory of a tensor, its flag and, of a copy that is made, its data."""
    if isinstance(tensor, Placeholder) or tensor.is_meta:
        return lambda: None
    data, needs_grad = tensor.data, tensor.requires_grad
    copy = data.clone() if has_copy else None

    def undo() -> None:
        if not _is_in(tensor, data):
            tensor.data = data
        if copy is not None and bits(data) != bits(copy):
            data.copy_(copy)
        if tensor.requires_grad != needs_grad:
            tensor.requires_grad_(needs_grad)

    return undo


def _is_in(tensor: Tensor, data: Tensor) -> bool:
    """Return whether a tensor has the memory of its former `data`."""
    if tensor.layout != torch.strided or tensor.is_nested or is_traceable_wrapper_subclass(tensor):
        return True
    same_place = tensor.data_ptr() == data.data_ptr() and tensor.shape == data.shape
    return same_place and tensor.stride() == data.stride()
