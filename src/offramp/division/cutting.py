"""An exported graph as plain data, cut into pieces where the parts of a module begin.

A piece is a small graph whose weights are inputs. Pieces that differ only in which weights they take, and not in
shapes, share one kernel, which is written once. Numbers that follow from shapes are computed again in each piece that
needs them, so that only tensors flow from one piece to the next.

The graphs are JSON.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch.utils import _pytree as pytree

from offramp.division.messages import no_graph
from offramp.program.captured import Piece
from offramp.program.consistency import MAX_STEPS
from offramp.program.dtypes import OF_ARRAYS
from offramp.program.program import BATCH, Call, LookUp, Module, Part, Program, Value, can_carry_exit, fits_output
from offramp.streaming.stages import LOOK_UP

REFERENCE = "v"
"""Key of an argument that names a value."""


@dataclass(frozen=True)
class Node:
    """One operation. Arguments are JSON; `{"v": name}` stands for a value."""

    name: str
    target: str
    args: Any
    kwargs: Any
    calls: frozenset[Call]
    """Module calls that contain it."""
    is_number: bool
    """The result is a number that follows from shapes, and no tensor."""


@dataclass(frozen=True)
class Graph:
    """Result of torch.export. A value has the name of the node that computes it, or of an input of the graph."""

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    """Arguments of the module that are tensors."""
    weights: Mapping[str, str]
    """Input of the graph -> name of the parameter."""
    constants: Mapping[str, str]
    """Input of the graph -> name of a buffer or constant."""
    outputs: tuple[str, ...]
    values: Mapping[str, Value]
    batch: Mapping[str, int]
    """Value -> its axis that counts rows."""
    dynamic: Mapping[str, tuple[int, ...]]
    """Value -> its axes whose sizes may differ from call to call."""
    data: Mapping[str, Any]
    """Constant -> its tensor."""


@dataclass(frozen=True)
class Cut:
    """The pieces of a graph, in order, and the graph of each kernel that they call."""

    pieces: tuple[Piece, ...]
    graphs: Mapping[str, bytes]
    values: Mapping[str, Value]
    """Every value that flows between pieces. Sizes are those of the example, except the axis that counts rows."""
    lookups: Mapping[str, LookUp]
    outputs: tuple[str, ...]


def cut(graph: Graph, program: Program, tables: Set[str] = frozenset()) -> Cut:
    """Cut a graph where the parts of the program's module begin.

    Rows of `tables` that are looked up by an input become values of their own, so that the tables need not be read.

    Raises StageError where a part begins at no operation of the graph, or something other than a tensor would flow.
    """
    assert program.module is not None, "a program that is captured"
    if len(program.module.parts) > MAX_STEPS:
        raise no_graph(f"{len(program.module.parts)} stages, at most {MAX_STEPS} become graphs", program.module.name)
    _require_arrays(graph, graph.inputs, "the input", program.module.name)
    numbers = {node.name: node for node in graph.nodes if node.is_number}
    lookups = {node.name: found for node in graph.nodes if (found := _look_up(node, graph, program, tables))}
    nodes = [node for node in graph.nodes if not node.is_number]
    bounds = [*_starts(nodes, program.module), len(nodes)]
    spans = [[node for node in nodes[start:end] if node.name not in lookups] for start, end in pairwise(bounds)]
    needed_later = set(graph.outputs)
    pieces: list[Piece] = []
    graphs: dict[str, bytes] = {}
    for span, part in zip(reversed(spans), reversed(program.module.parts), strict=True):
        full = _with_numbers(span, numbers)
        foreign = next((name for name in _reads(full) if name not in graph.values), None)
        if foreign is not None:
            raise no_graph(f"{foreign} flows between stages and is no tensor", program.module.name)
        piece, data = _piece(full, span, needed_later, part, graph)
        needed_later = (needed_later - {node.name for node in span}) | set(piece.reads)
        graphs[piece.kernel] = data
        pieces.insert(0, piece)
    flowing = sorted({name for piece in pieces for name in (*piece.reads, *piece.writes)})
    _require_arrays(graph, flowing, "the value between stages", program.module.name)
    values = {}
    for name in flowing:  # for any number of rows
        value, rows = graph.values[name], graph.batch.get(name)
        axes = tuple(BATCH if axis == rows else size for axis, size in enumerate(value.axes))
        values[name] = Value(value.dtype, axes)
    output, result = program.output, values.get(graph.outputs[0])
    if output is not None and result is not None and not fits_output(result, output):
        raise no_graph(
            f"the first output has the axes {result.axes}, not {output.num_labels} labels", program.module.name
        )
    return Cut(tuple(pieces), graphs, values, lookups, graph.outputs)


def _require_arrays(graph: Graph, names: Iterable[str], what: str, module: str) -> None:
    """Raise StageError for a value whose dtype NumPy does not have."""
    for name in names:
        dtype = graph.values[name].dtype
        if dtype not in OF_ARRAYS:
            raise no_graph(f"{what} {name!r} is {dtype}, which NumPy does not have", module)


def _piece(
    full: Sequence[Node], span: Sequence[Node], needed_later: Set[str], part: Part, graph: Graph
) -> tuple[Piece, bytes]:
    """Return the piece of the operations `span`, and its graph, which has the operations `full`."""
    reads = _reads(full)
    weights = tuple(name for name in reads if name in graph.weights)
    constants = tuple(name for name in reads if name in graph.constants)
    values = _hidden_first([name for name in reads if name not in (*weights, *constants)], part, graph)
    writes = tuple(node.name for node in span if node.name in needed_later)
    data = _canonical(full, {"r": values, "w": weights, "c": constants}, writes, graph)
    kernel = f"graph-{hashlib.sha256(data).hexdigest()[:12]}"
    own_weights = tuple(graph.weights[name] for name in weights)
    return Piece(kernel, values, writes, own_weights, tuple(graph.constants[name] for name in constants)), data


def _look_up(node: Node, graph: Graph, program: Program, tables: Set[str]) -> LookUp | None:
    """Return the look-up that an operation is, if it takes rows of a table by an input."""
    if node.target != LOOK_UP:
        return None
    table, index = (part[REFERENCE] if _is_reference(part) else None for part in node.args[:2])
    name, ids = graph.weights.get(str(table)), program.inputs.get(str(index))
    if name is None or name not in tables or ids is None or index not in graph.inputs:
        return None
    found = graph.values[node.name]
    return LookUp(name, str(index), Value(found.dtype, (*ids.axes, found.axes[-1])))


def _hidden_first(values: Sequence[str], part: Part, graph: Graph) -> tuple[str, ...]:
    """Return the values with the hidden state, which an exit before the part reads, in front."""
    hidden = None if part.hidden is None else part.flows[part.hidden]
    like = [name for name in values if name in graph.batch and hidden and _is_like(graph.values[name], hidden)]
    front = like if len(like) == 1 else []
    return (*front, *(name for name in values if name not in front))


def has_hidden(found: Cut, graph: Graph, program: Program, index: int) -> bool:
    """Return whether an exit can stand before a piece: it first reads the hidden state that its part begins with.

    For texts, the hidden state must have one place for each token.
    """
    assert program.module is not None, "a program that is captured"
    if len(program.module.parts) > MAX_STEPS:
        raise no_graph(f"{len(program.module.parts)} stages, at most {MAX_STEPS} become graphs", program.module.name)
    part, reads = program.module.parts[index], found.pieces[index].reads
    if part.hidden is None or not reads or not _is_like(graph.values[reads[0]], part.flows[part.hidden]):
        return False
    hidden = part.flows[part.hidden]
    if program.texts is not None and (len(hidden.axes) != 3 or hidden.axes[:2] != program.example):
        return False
    return can_carry_exit(hidden) and can_carry_exit(found.values[reads[0]])


def _is_like(value: Value, other: Value) -> bool:
    return value.dtype == other.dtype and len(value.axes) == len(other.axes) and value.axes[1:] == other.axes[1:]


def _starts(nodes: Sequence[Node], module: Module) -> list[int]:
    """Return the index of the first operation of each part."""
    starts = [0]
    for part in module.parts[1:]:
        place = next((i for i, node in enumerate(nodes) if part.start in node.calls), None)
        if place is None or place < starts[-1]:
            assert part.start is not None
            what = f"{part.start.module} (call {part.start.number}) begins at no operation of the exported graph"
            raise no_graph(what, module.name)
        starts.append(place)
    return starts


def _with_numbers(piece: Sequence[Node], numbers: Mapping[str, Node]) -> list[Node]:
    """Return a piece with the numbers that each operation uses, directly or not, before it."""
    found: dict[str, Node] = {}

    def add(node: Node) -> None:
        for name in _references([node]):
            if name in numbers and name not in found:
                add(numbers[name])
        found[node.name] = node

    for node in piece:
        add(node)
    return list(found.values())


def _is_reference(part: Any) -> bool:
    return isinstance(part, dict) and REFERENCE in part


def _references(nodes: Iterable[Node]) -> list[str]:
    """Return the values that nodes use, each once, in order."""
    arguments = [(node.args, node.kwargs) for node in nodes]
    leaves = pytree.tree_leaves(arguments, is_leaf=_is_reference)
    return list(dict.fromkeys(leaf[REFERENCE] for leaf in leaves if _is_reference(leaf)))


def _reads(nodes: Sequence[Node]) -> list[str]:
    """Return the values that nodes use and do not compute, in order of first use."""
    made = {node.name for node in nodes}
    return [name for name in _references(nodes) if name not in made]


def _canonical(
    nodes: Sequence[Node], inputs: Mapping[str, Sequence[str]], writes: Sequence[str], graph: Graph
) -> bytes:
    """Return a piece as JSON with names that do not depend on its place in the graph.

    It contains the shapes of its inputs, in their order, with None for sizes that may differ from call to call: graphs
    for ONNX Runtime have the others fixed, so pieces with other shapes need other kernels.
    """
    names = {name: f"{letter}{i}" for letter, group in inputs.items() for i, name in enumerate(group)}
    names.update({node.name: f"n{i}" for i, node in enumerate(nodes)})
    shapes = []
    for name in (name for group in inputs.values() for name in group):
        moving = graph.dynamic.get(name, ())
        shapes.append([None if axis in moving else size for axis, size in enumerate(graph.values[name].axes)])
    tree = {
        "inputs": {letter: len(group) for letter, group in inputs.items()},
        "nodes": [
            [names[node.name], node.target, _renamed(node.args, names), _renamed(node.kwargs, names)] for node in nodes
        ],
        "outputs": [names[name] for name in writes],
        "shapes": shapes,
    }
    return json.dumps(tree, separators=(",", ":"), sort_keys=True).encode() + b"\n"


def _renamed(tree: Any, names: Mapping[str, str]) -> Any:
    def rename(part: Any) -> Any:
        return {REFERENCE: names[part[REFERENCE]]} if _is_reference(part) else part

    return pytree.tree_map(rename, tree, is_leaf=_is_reference)
