"""One run of a module, written down: which calls began and ended, which weights and values each operation touched.

Weights are placeholders during the run and are fetched one by one, so that the whole model need not be in memory. What
is read through a view or through a reference that Python took earlier is seen too: values are told apart by memory.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from offramp.program.program import Call, Value
from offramp.streaming.graph import Enter, Leave, Op, Trace
from offramp.streaming.placeholders import Placeholder, Weight, bits

Around = Callable[[Callable[..., Any], tuple, dict[str, Any]], Any]
"""(forward, arguments, keywords) -> what the call gives."""


class Arguments:
    """Arguments of a model call, positional and by name."""

    def __init__(self, inputs: Tensor | Sequence[Any] | Mapping[str, Any]) -> None:
        """Take a tensor, a sequence of positional arguments, or a mapping of named ones."""
        by_name = isinstance(inputs, Mapping)
        self.args: tuple = () if by_name else (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        self.kwargs: dict[str, Any] = dict(inputs) if by_name else {}

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors in the arguments, by argument."""
        named = {**{str(i): arg for i, arg in enumerate(self.args)}, **self.kwargs}
        found = {}
        for name, argument in named.items():
            leaves = [leaf for leaf in pytree.tree_leaves(argument) if isinstance(leaf, Tensor)]
            found.update({f"{name}.{i}" if i else name: leaf for i, leaf in enumerate(leaves)})
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


def tensors_of(output: Any) -> list[Tensor]:
    """Return all tensors of an output in a fixed order, from inside any containers."""
    found: list[Tensor] = []
    _collect(output, found, set())
    return found


def _collect(part: Any, found: list[Tensor], seen: set[int]) -> None:
    if isinstance(part, Tensor):
        found.append(part)
    elif isinstance(part, (nn.Module, type)):
        return
    elif isinstance(part, Mapping):
        for value in part.values():
            _collect(value, found, seen)
    elif isinstance(part, (list, tuple, set)):
        for value in part:
            _collect(value, found, seen)
    elif id(part) not in seen:  # a dataclass, a cache of keys and values
        seen.add(id(part))
        for value in _held(part):
            _collect(value, found, seen)


def are_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Return whether two lists of tensors are equal bit for bit, shapes and dtypes included."""
    if len(found) != len(expected):
        return False
    pairs = zip(found, expected, strict=True)
    return all(a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b) for a, b in pairs)


def _held(part: Any) -> list[Any]:
    """Return the attributes of an object, including those in slots."""
    slots = [name for cls in type(part).__mro__ for name in vars(cls).get("__slots__", ()) if not name.startswith("__")]
    return [*getattr(part, "__dict__", {}).values(), *(getattr(part, name) for name in slots if hasattr(part, name))]


def surround(module: nn.Module, around: Around) -> Callable[[], None]:
    """Have `around(forward, args, kwargs)` called in place of a module's `forward`. Returns what undoes it.

    Hooks would not do: they are not called for a `forward` that is called directly, nor after an interrupt, and some
    layers compute otherwise where they have any.
    """
    before, own, active = vars(module).get("forward"), module.forward, True

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return around(own, args, kwargs) if active else own(*args, **kwargs)

    def undo() -> None:
        nonlocal active
        active = False
        if vars(module).get("forward") is forward:  # else other code has wrapped it since
            del vars(module)["forward"]
            vars(module).update({} if before is None else {"forward": before})

    vars(module)["forward"] = forward
    return undo


def trace_run(
    model: nn.Module, weights: Mapping[str, Weight], inputs: Arguments, fetch: Callable[[str], Tensor]
) -> tuple[Trace, Any]:
    """Run a module once with its weights fetched on touch. Returns what happened, and the output.

    `fetch(name)` gives the data of a weight. What the module held before stands in its places again afterwards.
    """
    recorder = _Recorder(fetch)
    before = {name: weight.tensor for name, weight in weights.items()}
    parameters = [weight for weight in weights.values() if not weight.is_buffer]
    try:
        for weight in parameters:
            weight.put(Placeholder(weight.name, weight.tensor, recorder.fetched))
        with recorder.calls_of(model), recorder:
            output = inputs.call(model)
    finally:
        for weight in parameters:
            weight.put(before[weight.name])
    return recorder.trace(tensors_of(output)), output


class LastUsed:
    """Fetched weights, the last used ones kept up to some bytes: a trace touches each of them a few times in a row."""

    def __init__(self, fetch: Callable[[str], Tensor], max_bytes: int) -> None:
        self._fetch, self._max_bytes, self._bytes = fetch, max_bytes, 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def __call__(self, name: str) -> Tensor:
        """Return a weight, from memory or fetched."""
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        tensor = self._fetch(name)
        self._bytes += tensor.nbytes
        while self._kept and self._bytes > self._max_bytes:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        self._kept[name] = tensor
        return tensor


class Touches(TorchDispatchMode):
    """Notices which of some tensors, by name, an operation touches, be it through a view."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {_memory(tensor): name for name, tensor in tensors.items()}
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and not isinstance(leaf, Placeholder) and _memory(leaf) in self._names:
                self.found.add(self._names[_memory(leaf)])
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Writes events. A piece of memory is known by the address of its storage, which nothing else can take while a
    weak reference to it is held.
    """

    def __init__(self, fetch: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._fetch = fetch
        self._events: list[Enter | Leave | Op] = []
        self._values: dict[int, tuple[Value, int]] = {}
        self._owner: dict[int, str | int] = {}
        self._homes: dict[str, set[int]] = defaultdict(set)
        self._addresses: list[StorageWeakRef] = []
        self._calls: dict[str, int] = defaultdict(int)

    def fetched(self, name: str, operation: Any) -> Tensor:
        """Return the data of a weight, and record its memory."""
        tensor = self._fetch(name)
        self._own(tensor, name)
        self._homes[name].add(_memory(tensor))
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        touched = [leaf.weight_name for leaf in inputs if isinstance(leaf, Placeholder)]
        real = [leaf for leaf in inputs if not isinstance(leaf, Placeholder)]
        known = dict.fromkeys(_memory(leaf) for leaf in real)  # in order, and not in that of addresses
        owners = [self._owner[memory] for memory in known if memory in self._owner]
        reads = tuple(owner for owner in owners if isinstance(owner, int))
        weights = (*touched, *(owner for owner in owners if isinstance(owner, str)))
        result = func(*args, **kwargs)
        known.update((memory, None) for name in touched for memory in self._homes[name])
        writes = tuple(self._new(leaf) for leaf in pytree.tree_leaves(result) if _is_new(leaf, known))
        self._events.append(Op(str(func), tuple(dict.fromkeys(weights)), reads, writes))
        return result

    def trace(self, outputs: Sequence[Tensor]) -> Trace:
        """Return the recorded trace."""
        returned = [self._owner.get(_memory(tensor)) for tensor in outputs]
        kept = tuple(dict.fromkeys(value for value in returned if isinstance(value, int)))
        return Trace(tuple(self._events), self._values, kept)

    @contextmanager
    def calls_of(self, model: nn.Module) -> Iterator[None]:
        """Have the begin and the end of every module call written down."""
        undo = [surround(module, self._around(path)) for path, module in model.named_modules() if path]
        try:
            yield
        finally:
            for each in undo:
                each()

    def _around(self, path: str) -> Around:
        def around(forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
            self._calls[path] += 1
            leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            owners = [None if isinstance(leaf, Placeholder) else self._owner.get(_memory(leaf)) for leaf in leaves]
            arguments = tuple(
                (owner if isinstance(owner, int) else None, value_of(leaf))
                for owner, leaf in zip(owners, leaves, strict=True)
            )
            self._events.append(Enter(Call(path, self._calls[path]), arguments))
            try:
                return forward(*args, **kwargs)
            finally:
                self._events.append(Leave())

        return around

    def _new(self, tensor: Tensor) -> int:
        number = len(self._values)
        self._values[number] = value_of(tensor), tensor.nbytes
        self._own(tensor, number)
        return number

    def _own(self, tensor: Tensor, owner: str | int) -> None:
        memory = _memory(tensor)
        if memory not in self._owner and tensor.layout == torch.strided:
            self._addresses.append(StorageWeakRef(tensor.untyped_storage()))
        self._owner[memory] = owner


def _is_new(leaf: Any, known: Collection[int]) -> bool:
    """Return whether an operation made a tensor: views and in-place results lie in known memory."""
    return isinstance(leaf, Tensor) and not isinstance(leaf, Placeholder) and _memory(leaf) not in known


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def value_of(tensor: Tensor) -> Value:
    """Return the dtype and the sizes of a tensor."""
    if tensor.is_nested:  # rows of unequal lengths
        return Value(str(tensor.dtype).removeprefix("torch."), (tensor.numel(),))
    return Value(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
