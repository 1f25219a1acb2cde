"""Placeholders of weights that are not in memory: tensors of the right shape and dtype that detect every use.

A meta tensor is not sufficient: on a CPU several operations accept one as a weight and return garbage without an error,
and code that reads `weight.device` builds its own tensors there. A placeholder reports the CPU as its device, and every
operation on it receives the data that its owner fetches.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from offramp.errors import StageError
from offramp.streaming.stages import Sizes

Fetch = Callable[[str, Any], Tensor]
"""(weight, operation) -> its data. May raise."""
Substitute = Callable[["Placeholder", Any, tuple, dict], Any]
"""(weight, function, arguments, keywords) -> the result without the whole weight, or NotImplemented."""


LOOK_UP = torch.ops.aten.embedding.default
"""Operation that reads only rows of a weight; `graph.LOOK_UP` is its name."""
MM, ADDMM = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
BY_ROWS = {LOOK_UP: 0, MM: 1, ADDMM: 2}
"""Operations that need only some rows of a weight at a time -> index of the weight among the arguments. In a matrix
product it is the right factor, whose rows are multiplied with columns of the left one."""
PIECE_BYTES = 2 << 20
"""Bytes of a weight that are hashed or compared at once."""


class Placeholder(Tensor):
    """A weight that is not in memory.

    To PyTorch it is a plain tensor, for code looks at what it is given: some layers compute otherwise on tensors that
    have functions of their own, and some operations on weights that require gradients.
    """

    weight_name: str
    weight_class: type[nn.Parameter]
    """Class of the weight itself."""
    attributes: dict[str, Any]
    """Attributes that code has given the weight, such as a scale that its layer reads."""
    fetch: Fetch
    substitute: Substitute | None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, name: str, like: Tensor, fetch: Fetch, substitute: Substitute | None = None) -> Placeholder:
        """Make a placeholder with the shape and dtype of `like`, which may be on the meta device."""
        facts: Any = {"strides": like.stride(), "dtype": like.dtype, "requires_grad": like.requires_grad}
        made = Tensor._make_wrapper_subclass(cls, like.shape, device="cpu", **facts)  # type: ignore[attr-defined]
        attributes, kind = dict(vars(like)), type(like)
        if isinstance(like, Placeholder):
            attributes, kind = like.attributes, like.weight_class
        vars(made).update(attributes)
        made.weight_name, made.fetch, made.substitute, made.attributes = name, fetch, substitute, attributes
        made._is_param = isinstance(like, nn.Parameter)
        made.weight_class = kind if issubclass(kind, nn.Parameter) else nn.Parameter
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Placeholder({self.weight_name}, {tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        """Return the elements of the weight. No operation is dispatched for this and the next methods."""
        return self.detach().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Return the weight as an array."""
        return self.detach().numpy(force=force)

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The weight without its history. Raises StageError where another one is set."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if value is not self:  # else `module.to("cpu")`, which changes nothing
            raise written_to(self.weight_name, "its attribute data")

    def data_ptr(self) -> int:
        """Return the address of the weight."""
        return self.detach().data_ptr()

    def untyped_storage(self) -> Any:
        """Return the memory of the weight. The placeholder has none, and reading it would end the process."""
        return self.detach().untyped_storage()

    def __deepcopy__(self, memo: Any) -> Any:
        raise self._uncopied()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self._uncopied()

    def _uncopied(self) -> StageError:
        what = f"the weight {self.weight_name} is in a store, and a streamed module cannot be copied or pickled"
        return StageError(what, None, "copy the module before it is streamed, or take its state_dict() in the stream")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation with rows of the weight if possible, otherwise with the whole weight.

        Raises StageError for an operation that would write to the weight: it would write to a copy.
        """
        for part in written(func, args, kwargs or {}):
            if isinstance(part, Placeholder):
                raise written_to(part.weight_name, str(func))
        if func in BY_ROWS:
            result = _substituted(args[BY_ROWS[func]], func, args, kwargs or {})
            if result is not NotImplemented:
                return result

        def there(part: Any) -> Any:
            return part.fetch(part.weight_name, func) if isinstance(part, Placeholder) else part

        args, named = pytree.tree_map(there, (args, kwargs or {}))
        return func(*args, **named)


class SlicedPlaceholder(Placeholder):
    """A placeholder of which a linear layer can use some rows at a time, if its owner allows it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Substitute linear layers, which are several operations below this level; run other functions normally."""
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            result = _substituted(kwargs.get("weight", args[1] if len(args) > 1 else None), func, args, kwargs)
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def _substituted(weight: Any, func: Any, args: tuple, kwargs: dict) -> Any:
    if isinstance(weight, Placeholder) and weight.substitute is not None:
        return weight.substitute(weight, func, args, kwargs)
    return NotImplemented


def written(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that an operation writes to."""
    if not isinstance(func, torch._ops.OpOverload) or not func._schema.is_mutable:
        return []
    known = enumerate(func._schema.arguments)
    given = [kwargs.get(a.name, args[i] if i < len(args) else None) for i, a in known if a.is_write]
    return [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]


def written_to(name: str, by: str) -> StageError:
    """Return the error for code that writes to a weight of a divided module; `by`: the operation that does."""
    remedy = (
        "compute a new tensor instead (of an nn.Embedding: set max_norm to None), or divide it with the new weights"
    )
    return StageError(f"a divided module keeps its weights, and {by} writes to {name}", None, remedy)


@dataclass(frozen=True, eq=False)
class Weight:
    """One parameter or saved buffer of a module, under the first of its names, and all places where it stands."""

    name: str
    tensor: Tensor
    places: tuple[tuple[nn.Module, str, bool], ...]
    """(module, name, whether it is a buffer of that module)."""
    aliases: tuple[str, ...]
    """Further names, if the weight is tied."""
    owners: frozenset[str]
    """Full names of the modules that hold it."""
    is_buffer: bool

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return self.tensor.nbytes

    def put(self, tensor: Tensor) -> None:
        """Set a tensor in every place of this weight."""
        for module, name, is_buffer in self.places:
            (module._buffers if is_buffer else module._parameters)[name] = tensor  # type: ignore[assignment]
            flat_names = module.__dict__.get("_flat_weights_names", ())  # of nn.LSTM and its kin
            if name in flat_names:
                module.__dict__["_flat_weights"][flat_names.index(name)] = tensor


def weights_of(model: nn.Module) -> dict[str, Weight]:
    """Return every parameter and saved buffer, name -> Weight, in the order of the modules. Tied ones are one."""
    found: dict[int, list[tuple[str, nn.Module, str, Tensor, bool]]] = defaultdict(list)
    for slot in _slots(model):
        found[id(slot[3])].append(slot)
    weights = {}
    for slots in found.values():
        paths, modules, names, tensors, are_buffers = zip(*slots, strict=True)
        first, *aliases = [f"{path}.{name}" if path else name for path, name in zip(paths, names, strict=True)]
        places = tuple(zip(modules, names, are_buffers, strict=True))
        weights[first] = Weight(first, tensors[0], places, tuple(aliases), frozenset(paths), all(are_buffers))
    return weights


def _slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor, bool]]:
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            is_saved = name not in module._non_persistent_buffers_set or isinstance(tensor, nn.Parameter)
            if tensor is not None and is_saved:
                yield path, module, name, tensor, name in module._buffers


def sizes_of(weights: Mapping[str, Weight]) -> Sizes:
    """Return the sizes that stages are planned by: those of all weights except buffers."""
    parameters = [weight for weight in weights.values() if not weight.is_buffer]
    return Sizes({w.name: w.num_bytes for w in parameters}, {w.name: w.owners for w in parameters})


def fingerprint(weights: Mapping[str, Weight]) -> str:
    """Return the sha256 of names, dtypes, shapes and ties, which must be equal for a store to fit a module."""
    described = [(w, w.tensor) for w in weights.values()]
    facts = [[w.name, str(t.dtype), list(t.shape), sorted(w.aliases), w.is_buffer] for w, t in described]
    return hashlib.sha256(json.dumps(sorted(facts)).encode()).hexdigest()


def content_sha256(weights: Mapping[str, Weight]) -> str:
    """Return the sha256 of `fingerprint` and of the data of all weights, which must be in memory."""
    digest = hashlib.sha256(fingerprint(weights).encode())
    for weight in weights.values():
        for piece in pieces(weight.tensor, PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def pieces(tensor: Tensor, num_bytes: int) -> Iterator[memoryview]:
    """Yield the data of a dense tensor row by row, `num_bytes` at a time."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    data = plain.reshape(-1).view(torch.uint8).numpy().data
    for start in range(0, len(data), num_bytes):
        yield data[start : start + num_bytes]


def have_equal_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two dense tensors of one shape and dtype are equal bit for bit."""
    pairs = zip(pieces(one, PIECE_BYTES), pieces(other, PIECE_BYTES), strict=True)
    return all(np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)) for a, b in pairs)


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """Return the dense tensors that a tensor of any layout consists of; a dense one is its only part."""
    if is_traceable_wrapper_subclass(tensor):
        return [part for name in tensor.__tensor_flatten__()[0] for part in dense_parts(getattr(tensor, name))]
    tensor = tensor.detach()
    if tensor.is_nested:
        return list(tensor.unbind())
    if tensor.is_quantized:
        by_channel = tensor.qscheme() not in (torch.per_tensor_affine, torch.per_tensor_symmetric)
        scales = (tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()) if by_channel else ()
        return [tensor.int_repr(), *(scales or (torch.tensor([tensor.q_scale(), tensor.q_zero_point()]),))]
    if tensor.layout == torch.strided:
        return [tensor]
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor.to_dense()]  # of libraries of kernels, such as oneDNN


def num_bytes(tensor: Tensor) -> int:
    """Return the size of the data of a tensor of any layout."""
    return sum(part.nbytes for part in dense_parts(tensor))


def unsaved_buffers(module: nn.Module) -> str:
    """Return the sha256 of the buffers that no checkpoint holds: a module built from its class must have the same."""
    saved = {id(tensor) for *_, tensor, _ in _slots(module)}
    digest = hashlib.sha256()
    for name, buffer in module.named_buffers():
        if id(buffer) not in saved:
            digest.update(json.dumps([name, str(buffer.dtype), list(buffer.shape)]).encode())
            digest.update(bits(buffer))
    return digest.hexdigest()


def bits(tensor: Tensor) -> bytes:
    """Return the data of a tensor of any layout as bytes."""
    return b"".join(piece for part in dense_parts(tensor) for piece in pieces(part, max(part.nbytes, 1)))
