"""One run of a module, written down: which calls began and ended, which weights and values each operation touched.

Weights are placeholders during the run and are fetched one by one, so that the whole model need not be in memory. What
is read through a view or through a reference that Python took earlier is seen too: values are told apart by memory.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from offramp.errors import StageError, UsageError
from offramp.program.program import Call, Value
from offramp.streaming.placeholders import (
    Placeholder,
    Weight,
    bits,
    have_equal_bits,
    num_bytes,
    written,
    written_to,
)
from offramp.streaming.reachable import slots
from offramp.streaming.stages import Op, Span, Trace

Around = Callable[[Callable[..., Any], tuple, dict[str, Any]], Any]
"""(forward, arguments, keywords) -> what the call gives."""


class Arguments:
    """Arguments of a model call, positional and by name."""

    def __init__(self, inputs: Tensor | np.ndarray | Sequence[Any] | Mapping[str, Any]) -> None:
        """Take a tensor, a NumPy array, a sequence of positional arguments, or a mapping of named ones.

        Raises UsageError for anything else.
        """
        if isinstance(inputs, np.ndarray) and inputs.dtype.kind in "biufc":
            inputs = torch.from_numpy(inputs.copy())
        is_named = isinstance(inputs, Mapping) and all(isinstance(name, str) for name in inputs)
        if not is_named and not isinstance(inputs, (Tensor, list, tuple)):
            what = f"the example inputs are a {type(inputs).__name__}, not a tensor, a tuple or a dictionary of names"
            raise UsageError(what, None, "give a tuple of the arguments of the module, such as (inputs,)")
        by_name: Any = inputs if is_named else {}
        self.args: tuple = () if is_named else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        self.kwargs: dict[str, Any] = dict(by_name)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors in the arguments, by argument."""
        found = {}
        for name, argument in {**{str(i): arg for i, arg in enumerate(self.args)}, **self.kwargs}.items():
            found.update({f"{name}.{i}" if i else name: leaf for i, leaf in enumerate(_leaves(argument))})
        return found

    def copy(self) -> Arguments:
        """Return a copy with its own tensors, since a model may write to its inputs."""

        def copied(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return leaf.clone()
            return copy.deepcopy(leaf) if tensors_of(leaf) else leaf  # a cache of keys and values

        made = Arguments(())
        made.args, made.kwargs = pytree.tree_map(copied, (self.args, self.kwargs))
        return made

    def call(self, model: Callable[..., Any]) -> Any:
        """Call the model without gradients."""
        with torch.no_grad():
            return model(*self.args, **self.kwargs)


def _leaves(tree: Any) -> list[Tensor]:
    """Return the tensors among arguments or results of an operation or a call."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def tensors_of(output: Any) -> list[Tensor]:
    """Return all tensors of an output in a fixed order, from inside any containers, however deep they are."""
    found: list[Tensor] = []
    left, seen, around = [(output, False)], set(), set()
    while left:
        part, is_done = left.pop()
        if is_done:
            around.remove(id(part))
        elif isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, (list, tuple, set, Mapping)):
            if id(part) not in around:  # else it contains itself
                around.add(id(part))
                values = part.values() if isinstance(part, Mapping) else part
                left += [(part, True), *((value, False) for value in reversed([*values]))]
        elif not isinstance(part, (nn.Module, type)) and id(part) not in seen:  # a dataclass, a cache
            seen.add(id(part))
            left += [(value, False) for value in reversed([*_attributes(part).values()])]
    return found


def _attributes(part: Any) -> dict[str, Any]:
    """Return the attributes of an object by name, including those in slots."""
    return {**getattr(part, "__dict__", {}), **slots(part)}


def with_data(output: Any, data_of: Callable[[Placeholder], Tensor]) -> Any:
    """Return an output with the data of its placeholders in their places.

    Lists, tuples and dictionaries are made anew; other objects, such as a dataclass, are changed in place.
    """
    seen: set[int] = set()

    def of(part: Any) -> Any:
        return pytree.tree_map(of_leaf, part) if any(isinstance(t, Placeholder) for t in tensors_of(part)) else part

    def of_leaf(part: Any) -> Any:
        if isinstance(part, Placeholder):
            return data_of(part)
        if isinstance(part, (Tensor, nn.Module, type)) or id(part) in seen:
            return part
        seen.add(id(part))
        if isinstance(part, set):
            return {of(each) for each in part}
        if isinstance(part, (list, MutableMapping)):  # of a class that PyTorch does not know
            for key, value in list(part.items() if isinstance(part, MutableMapping) else enumerate(part)):
                part[key] = of(value)
        for name, value in _attributes(part).items():
            new = of(value)
            if new is not value:
                object.__setattr__(part, name, new)
        return part

    return of(output)


def are_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Return whether two lists of tensors are equal bit for bit, shapes and dtypes included."""
    return len(found) == len(expected) and all(
        (a.dtype, a.layout) == (b.dtype, b.layout) and value_of(a) == value_of(b) and bits(a) == bits(b)
        for a, b in zip(found, expected, strict=True)
    )


def surround(module: nn.Module, around: Around) -> Callable[[], None]:
    """Have `around(forward, args, kwargs)` called in place of a module's `forward`. Returns what undoes it.

    Hooks would not do: they are not called for a `forward` that is called directly, nor after an interrupt, and some
    layers compute otherwise where they have any. A module that has hooks before its `forward`, which may use its
    weights, is surrounded with them.
    """
    name = "_call_impl" if module._forward_pre_hooks else "forward"
    before, own, active = vars(module).get(name), getattr(module, name), True

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return around(own, args, kwargs) if active else own(*args, **kwargs)

    def undo() -> None:
        nonlocal active
        active = False
        if vars(module).get(name) is forward:  # else other code has wrapped it since
            del vars(module)[name]
            vars(module).update({} if before is None else {name: before})

    vars(module)[name] = forward
    return undo


def trace_run(
    model: nn.Module, weights: Mapping[str, Weight], inputs: Arguments, fetch: Callable[[str], Tensor]
) -> tuple[Trace, Any]:
    """Run a module once with its weights fetched on touch. Returns what happened, and the output.

    `fetch(name)` gives the data of a weight. What the module held before stands in its places again afterwards. Raises
    StageError before a weight is written to.
    """
    parameters = {name: weight for name, weight in weights.items() if not weight.is_buffer}
    recorder = _Recorder(fetch, {name: weight.tensor for name, weight in parameters.items()})
    with ExitStack() as undo:
        for weight in parameters.values():
            undo.callback(weight.put, weight.tensor)
            weight.put(Placeholder(weight.name, weight.tensor, recorder.fetched))
        for path, module in model.named_modules():
            if path:
                undo.callback(surround(module, functools.partial(recorder.call, path)))
        with recorder:
            output = inputs.call(model)
    return recorder.trace(tensors_of(output)), output


class LastUsed:
    """Fetched weights, the last used ones kept up to some bytes: a trace touches each of them a few times in a row."""

    def __init__(self, fetch: Callable[[str], Tensor], max_bytes: int, own: Mapping[str, Tensor] | None = None) -> None:
        """`own`: weights of the module, with which copies are compared before they are freed."""
        self._fetch, self._max_bytes, self._bytes, self._own = fetch, max_bytes, 0, own or {}
        self._kept: dict[str, Tensor] = {}
        """Kept weights by name, the least recently used first."""

    def __call__(self, name: str) -> Tensor:
        """Return a weight, from memory or fetched."""
        tensor = self._kept.pop(name, None)
        if tensor is None:
            tensor = self._fetch(name)
            self._bytes += tensor.nbytes
            while self._kept and self._bytes > self._max_bytes:
                self._free(next(iter(self._kept)))
        self._kept[name] = tensor
        return tensor

    def clear(self) -> None:
        """Free all weights. Raises StageError for one that code has written to by other means than operations."""
        while self._kept:
            self._free(next(iter(self._kept)))

    def _free(self, name: str) -> None:
        tensor = self._kept.pop(name)
        self._bytes -= tensor.nbytes
        if name in self._own and not have_equal_bits(tensor, self._own[name]):
            raise written_to(name, "code that is no operation of PyTorch")


class Touches(TorchDispatchMode):
    """Notices which of some tensors, by name, an operation touches, be it through a view.

    Raises StageError before an operation that would write to one of them.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {_memory(tensor): name for name, tensor in tensors.items()}
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.found.update(filter(None, map(self._name, _leaves((args, kwargs)))))
        _require_unwritten(func, map(self._name, written(func, args, kwargs or {})))
        return func(*args, **(kwargs or {}))

    def _name(self, tensor: Tensor) -> str | None:
        return None if isinstance(tensor, Placeholder) else self._names.get(_memory(tensor))


def _require_unwritten(func: Any, weights: Iterable[str | None]) -> None:
    """Raise StageError if one of the `weights` that an operation writes to is not None."""
    name = next(filter(None, weights), None)
    if name is not None:
        raise written_to(name, str(func))


class _Recorder(TorchDispatchMode):
    """Writes down operations and calls. A piece of memory is known by the address of its storage, which nothing else
    can take while a weak reference to it is held.

    Operations that take functions, such as `torch.cond`, are one operation: what these functions touch is not recorded.
    """

    supports_higher_order_operators = True

    def __init__(self, fetch: Callable[[str], Tensor], own: Mapping[str, Tensor]) -> None:
        """`own`: tensors of the module that placeholders stand for; code can refer to them directly."""
        super().__init__()
        self._fetch = fetch
        self._ops: list[Op] = []
        self._spans: list[Span] = []
        self._values: dict[int, tuple[Value, int]] = {}
        self._owner: dict[int, str | int] = {_memory(tensor): name for name, tensor in own.items()}
        """Memory -> the weight or the value that lies there."""
        self._addresses: list[Any] = []
        self._calls: Counter[str] = Counter()
        self._depth = 0

    def fetched(self, name: str, operation: Any) -> Tensor:
        """Return the data of a weight, and record its memory."""
        tensor = self._fetch(name)
        self._own(tensor, name)
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = _leaves((args, kwargs))
        touched = [leaf.weight_name for leaf in inputs if isinstance(leaf, Placeholder)]
        known = dict.fromkeys(_memory(leaf) for leaf in inputs if not isinstance(leaf, Placeholder))  # ordered
        owners = [self._owner[memory] for memory in known if memory in self._owner]
        weights = dict.fromkeys((*touched, *(owner for owner in owners if isinstance(owner, str))))
        _require_unwritten(func, map(self._weight, written(func, args, kwargs)))
        result = func(*args, **kwargs)
        writes = []
        for leaf in (leaf for leaf in _leaves(result) if not isinstance(leaf, Placeholder)):
            memory = _memory(leaf)
            if memory not in known and self._owner.get(memory) not in touched:  # else a view, or written in place
                writes.append(len(self._values))
                self._own(leaf, len(self._values))
                self._values[len(self._values)] = value_of(leaf), num_bytes(leaf)
        reads = tuple(owner for owner in owners if isinstance(owner, int))
        self._ops.append(Op(str(func), tuple(weights), reads, tuple(writes)))
        return result

    def trace(self, outputs: Sequence[Tensor]) -> Trace:
        """Return the recorded trace."""
        returned = dict.fromkeys(number for number in map(self._value, outputs) if number is not None)
        return Trace(self._ops, self._spans, self._values, tuple(returned))

    def call(self, path: str, forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a module, and record where the call begins and ends."""
        self._calls[path] += 1
        arguments = tuple((self._value(leaf), value_of(leaf)) for leaf in _leaves((args, kwargs)))
        span = Span(Call(path, self._calls[path]), len(self._ops), -1, self._depth, arguments)
        self._spans.append(span)
        self._depth += 1
        try:
            return forward(*args, **kwargs)
        finally:
            span.end = len(self._ops)
            self._depth -= 1

    def _value(self, tensor: Tensor) -> int | None:
        """Return the number of the value in a tensor's memory, if there is one."""
        owner = None if isinstance(tensor, Placeholder) else self._owner.get(_memory(tensor))
        return owner if isinstance(owner, int) else None

    def _weight(self, tensor: Tensor) -> str | None:
        """Return the name of the weight that a tensor is or views, if there is one."""
        owner = tensor.weight_name if isinstance(tensor, Placeholder) else self._owner.get(_memory(tensor))
        return owner if isinstance(owner, str) else None

    def _own(self, tensor: Tensor, owner: str | int) -> None:
        memory = _memory(tensor)
        if memory not in self._owner:
            is_dense = tensor.layout == torch.strided
            weak = StorageWeakRef(tensor.untyped_storage()) if is_dense else torch._C._WeakTensorRef(tensor)  # type: ignore[attr-defined]
            self._addresses.append(weak)
        self._owner[memory] = owner


def _memory(tensor: Tensor) -> int:
    """Return what identifies the memory of a tensor. Raises StageError within a transform of torch.func."""
    if is_functorch_wrapped_tensor(tensor):
        what = "a part of the module is called within vmap, jvp or another transform of torch.func"
        raise StageError(f"{what}, where weights cannot be exchanged")
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else tensor._cdata


def value_of(tensor: Tensor) -> Value:
    """Return the dtype and the sizes of a tensor."""
    axes = (tensor.numel(),) if tensor.is_nested else tuple(tensor.shape)  # nested: rows of unequal lengths
    return Value(str(tensor.dtype).removeprefix("torch."), axes)
