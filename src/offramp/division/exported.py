"""Export of a module by torch.export, with its graph as plain data.

The module is exported on tensors without data, so no weights are needed. Operations are not decomposed: they are those
that the module calls, and give the same bits.
"""

import io
import logging
import math
import random
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from offramp.backends.torch_graphs import NUMBERS
from offramp.division.cutting import REFERENCE, Graph, Node
from offramp.division.messages import no_graph
from offramp.division.snapshot import undisturbed
from offramp.errors import StageError, said
from offramp.program.program import Call, Value
from offramp.streaming.capture import Arguments
from offramp.streaming.placeholders import Weight

MOST_ROWS = 1 << 31
"""Number of rows that any graph must take."""
CHECKS = ("aten._assert", "aten.sym_constrain_range")
"""Prefixes of operations without a result."""
_NAMES = {
    **{function: name for name, function in NUMBERS.items()},
    torch.sym_max: "max", torch.sym_min: "min", torch.sym_int: "int", torch.sym_float: "float", torch.sym_sum: "sum",
}  # fmt: skip
"""Operations on numbers and their names in captured graphs."""


def export(
    module: nn.Module,
    weights: Mapping[str, Weight],
    example: Arguments,
    others: Sequence[Arguments] = (),
    longest: int | None = None,
) -> Graph:
    """Export a module for any number of rows, and for any size of the axes in which `others` differ from the example.

    Where they differ in no other axis, the length of token ids may vary too, if the module allows it.

    Args:
        longest: most tokens that the graph must take, of a module that classifies texts.

    Raises StageError with what torch.export says where it cannot, and where the graph holds for some lengths only.
    """
    differing = _differing(module, example, others)
    with_length = [axes | _lengths(leaf) for axes, leaf in zip(differing, _leaves(example), strict=True)]
    attempts = [differing] if any(axes - {0} for axes in differing) else [with_length, differing]
    reason = ""
    for axes in attempts:
        try:
            program = _exported(module, weights, example, axes)
            _require_sizes(program, module, longest)
            return _as_data(program, module, weights, tuple(example.tensors()))
        except StageError:
            raise
        except Exception as error:  # torch.export raises many classes
            reason = said(error)
            violated = re.search(r"^[ \t]*- (.*?)(\. |$)", str(error), re.MULTILINE)
            if "Constraints" in reason and violated:
                reason = f"{type(error).__name__}: {violated[1]}"
    raise no_graph(f"torch.export cannot take this module ({reason})", type(module).__name__)


def _leaves(inputs: Arguments) -> list[Any]:
    return pytree.tree_leaves((inputs.args, inputs.kwargs))


def _form(inputs: Arguments) -> pytree.TreeSpec:
    return pytree.tree_structure((inputs.args, inputs.kwargs))


def _differing(module: nn.Module, example: Arguments, others: Sequence[Arguments]) -> list[set[int]]:
    """Return for each leaf of the arguments the axes that differ between the examples, and 0, which counts rows."""
    leaves = _leaves(example)
    found: list[set[int]] = [{0} if isinstance(leaf, Tensor) and leaf.dim() else set() for leaf in leaves]
    for other in others:
        if _form(other) != _form(example) or not all(map(_is_alike, leaves, _leaves(other))):
            remedy = "use --method eager, or give examples that are alike"
            what = "examples that differ in more than sizes of tensors cannot share a graph"
            raise StageError(what, type(module).__name__, remedy)
        for axes, leaf, its in zip(found, leaves, _leaves(other), strict=True):
            if isinstance(leaf, Tensor):
                axes.update(i for i, (one, two) in enumerate(zip(leaf.shape, its.shape, strict=True)) if one != two)
    return found


def _is_alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.dim() == other.dim()
    return not isinstance(other, Tensor) and type(one) is type(other) and one == other


def _lengths(leaf: Any) -> set[int]:
    """Return the axes of a leaf that are lengths: axis 1 of token ids."""
    return {1} if isinstance(leaf, Tensor) and leaf.dim() == 2 and not leaf.is_floating_point() else set()


def _exported(module: nn.Module, weights: Mapping[str, Weight], example: Arguments, axes: Sequence[set[int]]) -> Any:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # a quarter of a second, and 33 MiB

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    moving = [dict.fromkeys(sorted(each), torch.export.Dim.DYNAMIC) or None for each in axes]
    args, kwargs = pytree.tree_unflatten(moving, _form(example))
    shapes = dict(kwargs) if not args else (*args, *kwargs.values())  # by the parameters of `forward`
    with undisturbed(module), torch.no_grad():
        with mode:
            for weight in weights.values():
                if not weight.is_buffer:
                    empty = torch.empty(weight.tensor.shape, dtype=weight.tensor.dtype, device="cpu")
                    weight.put(nn.Parameter(empty, requires_grad=False))
        before = _draws()
        with quiet():
            program = torch.export.export(module, example.args, example.kwargs, dynamic_shapes=shapes, strict=False)
        if _draws() != before:
            what = "the module draws random numbers of Python or NumPy, which a graph would keep"
            raise no_graph(what, type(module).__name__)
        return program


def _draws() -> tuple:
    """Return what changes where Python or NumPy draws a random number."""
    _, keys, place, *_ = np.random.get_state()
    return random.getstate(), np.asarray(keys).tobytes(), place


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the exporter's progress and dumps on stdout and stderr, in warnings and in logs."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _require_sizes(program: Any, module: nn.Module, longest: int | None) -> None:
    """Raise StageError unless an exported program takes any number of rows, and texts of all lengths up to `longest`.

    A module that computes differently from some size on, such as in blocks, is exported for the sizes on the example's
    side of that.
    """
    inputs = program.graph_signature.user_inputs
    for node in program.graph.find_nodes(op="placeholder"):
        sizes = getattr(node.meta.get("val"), "shape", ()) if node.name in inputs else ()
        for size, needed, unit in zip(sizes, (MOST_ROWS, longest), ("rows", "tokens"), strict=False):
            limits = program.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
            if needed is not None and limits is not None and not limits.upper >= needed:
                taken = needed if needed == longest else "any number"
                what = f"the graph holds for at most {limits.upper} {unit}, and the model takes {taken}"
                raise no_graph(what, type(module).__name__)


def _as_data(program: Any, module: nn.Module, weights: Mapping[str, Weight], arguments: Sequence[str]) -> Graph:
    """Return an exported program as plain data. Its inputs are named as the arguments, in order: torch.export names
    positional ones as the module's code does.
    """
    signature, nodes = program.graph_signature, list(program.graph.nodes)
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate or _writes_to_inputs(nodes):
        raise no_graph("the module writes to its buffers or inputs", type(module).__name__)
    first_names = {name: weight.name for weight in weights.values() for name in (weight.name, *weight.aliases)}
    constants: dict[str, str] = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    buffers = {key: first_names.get(name, name) for key, name in constants.items()}
    tensors = {node.name: node.meta["val"] for node in nodes if isinstance(node.meta.get("val"), Tensor)}
    inputs = [name for name in signature.user_inputs if isinstance(name, str) and name in tensors]
    outputs = [name for name in signature.user_outputs if isinstance(name, str) and name in tensors]
    names = dict(zip(inputs, arguments, strict=True))
    for node in nodes:
        node.name = names.get(node.name, node.name)
    symbols = {str(tensors[name].shape[0]) for name in inputs if tensors[name].dim()}
    values, batch, dynamic = {}, {}, {}
    for name, tensor in tensors.items():
        name = names.get(name, name)
        values[name] = Value(str(tensor.dtype).removeprefix("torch."), tuple(map(_hint, tensor.shape)))
        moving = {i: str(size) for i, size in enumerate(tensor.shape) if isinstance(size, torch.SymInt)}
        counting = [i for i, symbol in moving.items() if symbol in symbols]
        if moving:
            dynamic[name] = tuple(moving)
        if counting:
            batch[name] = counting[0]
    calls = [node for node in nodes if node.op == "call_function" and not str(node.target).startswith(CHECKS)]
    parameters = {key: first_names[name] for key, name in signature.inputs_to_parameters.items()}
    data = {name: _constant(program, module, name) for name in buffers.values()}
    return Graph(
        tuple(map(_node, calls)),
        tuple(arguments),
        parameters,
        buffers,
        tuple(names.get(name, name) for name in outputs),
        values,
        batch,
        dynamic,
        data,
    )


def _writes_to_inputs(nodes: Any) -> bool:
    """Return whether an operation changes an input of the graph (weight, buffer or argument) or a view of one."""
    shares = {node.name: node.op == "placeholder" for node in nodes}
    for node in nodes:
        if node.op != "call_function":
            continue
        if not isinstance(node.target, torch._ops.OpOverload):
            shares[node.name] = any(shares[used.name] for used in node.all_input_nodes)
            continue
        for number, argument in enumerate(node.target._schema.arguments):
            given = node.kwargs.get(argument.name, node.args[number] if number < len(node.args) else None)
            used = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, torch.fx.Node)]
            if argument.alias_info is not None and any(shares[each.name] for each in used):
                if argument.alias_info.is_write:
                    return True
                shares[node.name] = True
    return False


def _constant(program: Any, module: nn.Module, name: str) -> Tensor:
    """Return the data of a buffer, or of a tensor that the module's code makes from numbers."""
    found = dict(module.named_buffers()).get(name)
    found = program.constants.get(name) if found is None else found
    if not isinstance(found, Tensor) or isinstance(found, FakeTensor):
        raise no_graph(f"constant {name} of the exported graph has no data", type(module).__name__)
    return found


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _node(node: Any) -> Node:
    calls = set()
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        again = key.rpartition("@")[2] if "@" in key else ""
        calls.add(Call(path, int(again) + 1 if again.isdigit() else 1))
    value = node.meta.get("val")
    is_number = not isinstance(value, (Tensor, list, tuple))
    return Node(node.name, _target(node), _data(node.args), _data(node.kwargs), frozenset(calls), is_number)


def _target(node: Any) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        if not str(node.target).startswith("aten."):
            raise no_graph(f"operation {node.target} is none of torch's own")
        return str(node.target)
    if node.target not in _NAMES:
        raise no_graph(f"operation {getattr(node.target, '__name__', node.target)} is not known")
    return _NAMES[node.target]


def _data(part: Any) -> Any:
    """Return an argument as JSON."""
    if isinstance(part, torch.fx.Node):
        return {REFERENCE: part.name}
    if isinstance(part, (list, tuple)):
        return [_data(inner) for inner in part]
    if isinstance(part, Mapping):
        return {key: _data(inner) for key, inner in part.items()}
    if part is None or isinstance(part, (bool, int, str)):
        return part
    if isinstance(part, float):
        return part if math.isfinite(part) else {"float": str(part)}
    for kind in (torch.dtype, torch.device, torch.memory_format, torch.layout):
        if isinstance(part, kind):
            return {kind.__name__: str(part).removeprefix("torch.")}
    raise no_graph(f"argument {part!r} of the exported graph is not known")
