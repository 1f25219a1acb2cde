"""State of a module that a run can change, and its restoration: a division leaves the caller's module as it was.

Parameters are not copied: while a module runs, placeholders stand for them. Everything else that its attributes lead to
is: containers and objects are restored to what they held, tensors to their data.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from offramp.streaming.placeholders import Placeholder, bits

SEED = 0
"""State in which the random generators of the process are before each run."""
Undo = Callable[[], None]
_CLOSED = (ModuleType, FunctionType, MethodType, type)
"""Objects whose attributes are not part of the state of a module."""


class Snapshot:
    """The state of all objects that the attributes of a module lead to, for a later `restore`."""

    def __init__(self, module: nn.Module) -> None:
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        self._undo: list[Undo] = [_undo_of_process()]
        self._weights = {id(tensor) for tensor in module.parameters()}
        seen, waiting = set(), [module]
        while waiting:
            each = waiting.pop()
            if id(each) not in seen:
                seen.add(id(each))
                waiting += self._saved(each)

    def _saved(self, each: Any) -> list[Any]:
        """Save one object, and return the objects that it leads to."""
        if isinstance(each, Tensor):
            self._undo.append(_undo_of_tensor(each, has_copy=id(each) not in self._weights))
            return []
        if isinstance(each, torch.Generator):
            self._generators.append((each, each.get_state()))
            return []
        if isinstance(each, (dict, list, deque, set)):
            self._undo.append(_undo_of_container(each))
        if isinstance(each, (dict, list, deque, set, tuple, frozenset)):
            return list(each.values() if isinstance(each, dict) else each)
        attributes = None if isinstance(each, _CLOSED) else getattr(each, "__dict__", None)
        return [attributes] if isinstance(attributes, dict) else []

    def seed(self) -> None:
        """Set all random generators, those of the process and of the module, to the state that each run begins with."""
        torch.default_generator.manual_seed(SEED)
        random.seed(SEED)
        np.random.seed(SEED)
        for generator, state in self._generators:
            generator.set_state(state)

    def restore(self) -> None:
        """Restore the state. The last saved is restored first: the module itself last."""
        for undo in (self.seed, *reversed(self._undo)):
            undo()


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[Snapshot]:
    """Restore the module and the random generators afterwards.

    Within, the random generators are in the state that each run begins with, and the module has copies of its buffers
    that it may write to.
    """
    snapshot = Snapshot(module)
    copies: dict[int, Tensor] = {}
    try:
        for part in module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None and not isinstance(buffer, nn.Parameter):
                    copy = copies.setdefault(id(buffer), buffer.detach().clone().requires_grad_(buffer.requires_grad))
                    part._buffers[name] = copy
        snapshot.seed()
        yield snapshot
    finally:
        snapshot.restore()


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
