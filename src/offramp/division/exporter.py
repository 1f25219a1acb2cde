"""PyTorch's exporter to ONNX, for graphs of single stages.

The exporter spends most of its time on work that such a graph does not need: tables that it makes anew for each graph,
and a second trace that decomposes operations. Both are private to PyTorch; where a version has other names, the
exporter works as it comes.
"""

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from offramp.backends.torch_graphs import NUMBERS, CapturedGraph
from offramp.division.exported import CHECKS, quiet
from offramp.errors import StageError, said

OPSET, IR = 18, 8
"""Versions that torch writes; ONNX Runtime 1.14 reads them."""
ON_TORCH = "run it with --backend torch"
_aten = torch.ops.aten
_MAY_BE_IDLE = frozenset({
    _aten.reshape.default, _aten.view.default, _aten.expand.default, _aten.contiguous.default,
    _aten.to.dtype, _aten.to.device, _aten.to.dtype_layout,
})  # fmt: skip
"""Operations that do nothing where size and dtype are those of the operand."""
_SIZES = frozenset({*NUMBERS.values(), torch.sym_max, torch.sym_min, _aten.sym_size.int})
"""Operations on sizes, which are never decomposed."""
Decompose = Callable[[Any, Any], Any]
"""PyTorch's function that decomposes the operations of a program for which a registry has no ONNX function."""
Change = tuple[str, str, str, Callable[[Any], Callable[..., Any]]]
"""Module, class (or none) and name of a function of PyTorch, and what makes a quicker one of it."""


def to_onnx(graph: CapturedGraph, given: Sequence[Tensor], dynamic: Sequence[Sequence[int]]) -> bytes:
    """Return a graph as ONNX bytes. Raises StageError where PyTorch cannot write it.

    Args:
        given: example operands.
        dynamic: axes whose sizes may differ from call to call, of the first operands.
    """
    moving = [dict.fromkeys(each, torch.export.Dim.DYNAMIC) or None for each in dynamic]
    shapes = (*moving, *[None] * (len(given) - len(moving)))
    try:
        try:
            proto = _exported(graph, given, shapes, [*_TABLES, _DECOMPOSING])
        except Exception:  # of any class; some graphs pass only once a second trace has compared their sizes
            proto = _exported(graph, given, shapes, _TABLES)
    except Exception as error:  # the exporter raises many classes, whose cause tells more than its own advice
        what = f"a stage cannot be written as ONNX ({said(error.__cause__ or error)})"
        raise StageError(what, None, ON_TORCH) from None
    for node in proto.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for info in (*proto.graph.input, *proto.graph.output):
        del info.metadata_props[:]
    del proto.graph.value_info[:]
    proto.ir_version = IR
    return proto.SerializeToString(deterministic=True)


def _exported(graph: CapturedGraph, given: Sequence[Tensor], shapes: tuple, changes: Sequence[Change]) -> Any:
    with quiet(), _quicker(changes):
        program = torch.onnx.export(
            graph,
            tuple(given),
            dynamo=True,
            dynamic_shapes=(shapes,),
            input_names=list(graph.inputs),
            opset_version=OPSET,
            verbose=False,
            external_data=False,
            optimize=True,
            custom_translation_table={_aten.rsub.Scalar: _subtracted_from},
        )
        assert program is not None
        return program.model_proto


@contextmanager
def _quicker(changes: Sequence[Change]) -> Iterator[None]:
    """Make functions of PyTorch quicker meanwhile."""
    with ExitStack() as undoing:
        for module, owner, name, changed in changes:
            try:
                holder = importlib.import_module(module)
                holder = getattr(holder, owner) if owner else holder
                before = vars(holder)[name]
            except (ImportError, AttributeError, KeyError):
                continue
            undoing.callback(setattr, holder, name, before)
            quicker = changed(getattr(holder, name))
            setattr(holder, name, staticmethod(quicker) if owner else quicker)
        yield


@functools.cache
def _kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with a cache of its results, the same one each time: for all divisions of a process."""
    return functools.cache(function)


def _where_needed(decompose: Decompose) -> Decompose:
    """Return a function that decomposes a program only if an operation has no ONNX function, or changes an operand."""

    def decomposed(program: Any, registry: Any) -> Any:
        graph = program.graph
        needed, checks = _needed(graph), [node for node in graph.nodes if str(node.target).startswith(CHECKS)]
        if not all(_is_final(node, registry, node in needed) for node in graph.nodes if node not in checks):
            return decompose(program, registry)
        for node in checks:  # the exporter removes them later in any case
            graph.erase_node(node)
        for node in list(graph.nodes):
            if _is_idle(node):
                node.replace_all_uses_with(node.args[0])
        graph.eliminate_dead_code()
        return program

    return decomposed


def _needed(graph: Any) -> set[Any]:
    """Return the nodes that the outputs of a graph depend on."""
    found, waiting = set(), [node for node in graph.nodes if node.op == "output"]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _is_final(node: Any, registry: Any, is_needed: bool) -> bool:
    """Return whether a node of a program stays as it is when the program is decomposed."""
    if node.op != "call_function":
        return node.op in ("placeholder", "output")
    if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
        return False
    return not is_needed or node.target in _SIZES or _is_idle(node) or registry.is_registered(node.target)


def _is_idle(node: Any) -> bool:
    """Return whether a node does nothing, and gives no output its name.

    Sizes that vary are compared by their formulas, which adds no condition to them.
    """
    if node.target not in _MAY_BE_IDLE or any(user.op == "output" for user in node.users):
        return False
    made, given = node.meta["val"], node.args[0].meta["val"]
    return made.dtype == given.dtype and [str(size) for size in made.shape] == [str(size) for size in given.shape]


_TABLES: tuple[Change, ...] = (
    ("torch.onnx._internal.exporter._registration", "ONNXRegistry", "from_torchlib", _kept),
    ("torch._export.utils", "", "_materialize_cpp_cia_ops", _kept),
)
"""Functions that make tables, which are the same for all graphs of a process."""
_DECOMPOSING: Change = ("torch.onnx._internal.exporter._fx_passes", "", "decompose_with_registry", _where_needed)


def _subtracted_from(tensor: Any, number: Any, alpha: float = 1) -> Any:
    """Return `number - alpha * tensor` as ONNX. PyTorch makes a difference of it whose first operand is no tensor, and
    finds no translation for that.
    """
    from onnxscript import opset18

    op: Any = opset18

    def like(value: Any) -> Any:
        if isinstance(value, (int, float)):
            value = op.Constant(value_int=value) if isinstance(value, int) else op.Constant(value_float=value)
        return op.CastLike(value, tensor)

    if isinstance(number, float) and not tensor.dtype.is_floating_point():
        tensor = op.Cast(tensor, to=1)  # to float32, as PyTorch does
    return op.Sub(like(number), tensor if alpha == 1 else op.Mul(like(alpha), tensor))
