"""An exported graph as plain data, and the pieces that it falls into where stages begin.

A piece (`Segment`) is a small graph whose weights are inputs. Pieces that differ in the numbers of their weights alone,
and not in their shapes, are of one kind, and are written once. Numbers that follow from shapes are computed anew in
each piece that needs them, so that nothing but tensors flows from one to the next.

Pure Python; the graphs are JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from offramp.errors import StageError
from offramp.program.program import TEXT_INPUTS, Call, Flow, LookUp, Program, Segment, Segments, Value, is_for_heads
from offramp.streaming.graph import LOOK_UP

REFERENCE = "v"
"""The key of an argument that names a value."""


@dataclass(frozen=True)
class Node:
    """One operation. Arguments are JSON; `{"v": name}` stands for a value."""

    name: str
    target: str
    args: Any
    kwargs: Any
    calls: frozenset[Call]
    """The module calls that it is in."""
    is_number: bool
    """Whether it gives a number that follows from shapes, and no tensor."""


@dataclass(frozen=True)
class Graph:
    """What torch.export made of a module. Values are named by the node that gives them, or are inputs of the graph."""

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
    """Value -> its extent that counts rows."""
    dynamic: Mapping[str, tuple[int, ...]]
    """Value -> its extents that may differ from call to call."""
    data: Mapping[str, Any]
    """Constant -> its tensor."""


def with_inputs(graph: Graph, arguments: Sequence[str]) -> Graph:
    """The same graph with its inputs called as the arguments of the module, in order; torch.export calls those without
    a name as the module's code does.
    """
    names = dict(zip(graph.inputs, arguments, strict=True))

    def keyed(mapping: Mapping[str, Any]) -> dict[str, Any]:
        return {names.get(name, name): value for name, value in mapping.items()}

    known = {name: names.get(name, name) for name in (*graph.values, *(node.name for node in graph.nodes))}
    known.update({name: name for name in (*graph.weights, *graph.constants)})
    nodes = [
        replace(node, args=_renamed(node.args, known), kwargs=_renamed(node.kwargs, known)) for node in graph.nodes
    ]
    return replace(
        graph, nodes=tuple(nodes), inputs=tuple(arguments), outputs=tuple(known[name] for name in graph.outputs),
        values=keyed(graph.values), batch=keyed(graph.batch), dynamic=keyed(graph.dynamic),
    )  # fmt: skip


def cut(graph: Graph, program: Program, tables: Set[str] = frozenset()) -> tuple[Segments, dict[str, bytes]]:
    """The pieces between the starts of the stages, and the graph of each kind. Rows of `tables` that are looked up by
    an input flow into the pieces as if they were inputs, so that the tables need not be read.

    Raises StageError where a stage begins at no operation of the graph, or reads other weights than it has.
    """
    numbers = {node.name: node for node in graph.nodes if node.is_number}
    look_ups = {node.name: found for node in graph.nodes if (found := _look_up(node, graph, program, tables))}
    nodes = [node for node in graph.nodes if not node.is_number]
    bounds = [*_starts(nodes, program), len(nodes)]
    pieces = [[node for node in nodes[start:end] if node.name not in look_ups] for start, end in pairwise(bounds)]
    needed_later = set(graph.outputs)
    segments: list[Segment] = []
    kinds: dict[str, bytes] = {}
    for piece, flow in zip(reversed(pieces), reversed(program.flows), strict=True):
        full = _with_numbers(piece, numbers)
        made = {node.name for node in piece}
        reads = [name for name in _references(full) if name not in {node.name for node in full}]
        writes = tuple(node.name for node in piece if node.name in needed_later)
        weights = tuple(name for name in reads if name in graph.weights)
        constants = tuple(name for name in reads if name in graph.constants)
        values = tuple(name for name in reads if name not in graph.weights and name not in graph.constants)
        _require_tensors(values, graph, program)
        values = _hidden_first(values, flow, graph)
        needed_later = (needed_later - made) | set(values)
        inputs = {"r": values, "w": weights, "c": constants}
        data = _canonical(full, inputs, writes, [_fixed(name, graph) for group in inputs.values() for name in group])
        kind = f"graph-{hashlib.sha256(data).hexdigest()[:12]}"
        kinds[kind] = data
        segments.append(
            Segment(kind, values, writes, tuple(graph.weights[name] for name in weights),
                    tuple(graph.constants[name] for name in constants))
        )  # fmt: skip
    flowing = {name for segment in segments for name in (*segment.reads, *segment.writes)}
    made_of = Segments(
        tuple(reversed(segments)),
        graph.outputs,
        {name: graph.values[name] for name in sorted(flowing)},
        {name: graph.batch[name] for name in sorted(flowing) if name in graph.batch},
        look_ups=look_ups,
    )
    return made_of, kinds


def _look_up(node: Node, graph: Graph, program: Program, tables: Set[str]) -> LookUp | None:
    """Which rows an operation looks up, if they are those of a table by an input."""
    if node.target != LOOK_UP:
        return None
    table, index = (part.get(REFERENCE) if isinstance(part, Mapping) else None for part in node.args[:2])
    name = graph.weights.get(str(table))
    if name is None or name not in tables or index not in program.inputs or index not in graph.inputs:
        return None
    return LookUp(name, index)


def _require_tensors(values: Sequence[str], graph: Graph, program: Program) -> None:
    foreign = next((name for name in values if name not in graph.values), None)
    if foreign is not None:
        raise StageError(f"{foreign} flows between stages and is no tensor", program.module, "use --method eager")


def _hidden_first(values: tuple[str, ...], flow: Flow, graph: Graph) -> tuple[str, ...]:
    """What an exit before the stage would look at, in front."""
    hidden = None if flow.hidden is None else flow.values[flow.hidden]
    like = [
        name for name in values if hidden is not None and name in graph.batch and _is_like(graph.values[name], hidden)
    ]
    front = like if len(like) == 1 else []
    return (*front, *(name for name in values if name not in front))


def has_hidden(segments: Segments, program: Program, stage: int) -> bool:
    """Whether the first value that a stage reads is the hidden state that it begins with, so that an exit can stand
    before it; of texts it must have a place for each token.
    """
    flow, reads = program.flows[stage], segments.stages[stage].reads
    if flow.hidden is None or not reads or not _is_like(segments.values[reads[0]], flow.values[flow.hidden]):
        return False
    ids_shape = None if program.texts is None else program.inputs[TEXT_INPUTS[0]].shape
    return is_for_heads(flow.values[flow.hidden], ids_shape)


def _is_like(value: Value, other: Value) -> bool:
    return value.dtype == other.dtype and len(value.shape) == len(other.shape) and value.shape[1:] == other.shape[1:]


def _starts(nodes: Sequence[Node], program: Program) -> list[int]:
    """Index of the first operation of each stage."""
    starts = [0]
    for flow in program.flows[1:]:
        place = next((i for i, node in enumerate(nodes) if flow.start in node.calls), None)
        if place is None or place < starts[-1]:
            assert flow.start is not None
            what = f"{flow.start.module} (call {flow.start.number}) begins at no operation of the exported graph"
            raise StageError(what, program.module, "use --method eager")
        starts.append(place)
    return starts


def _with_numbers(piece: Sequence[Node], numbers: Mapping[str, Node]) -> list[Node]:
    """A piece, and before each operation the numbers that it uses and those that they follow from."""
    found: dict[str, Node] = {}

    def add(node: Node) -> None:
        for name in _references([node]):
            if name in numbers and name not in found:
                add(numbers[name])
        found[node.name] = node

    for node in piece:
        add(node)
    return list(found.values())


def _references(nodes: Iterable[Node]) -> list[str]:
    """The values that they use, each once, in order."""
    return list(dict.fromkeys(name for node in nodes for name in _named((node.args, node.kwargs))))


def _named(tree: Any) -> Iterator[str]:
    if isinstance(tree, Mapping):
        if REFERENCE in tree:
            yield tree[REFERENCE]
            return
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        for part in tree:
            yield from _named(part)


def _fixed(name: str, graph: Graph) -> list[int | None]:
    """Its shape, with None for what may differ from call to call."""
    moving = graph.dynamic.get(name, ())
    return [None if extent in moving else n for extent, n in enumerate(graph.values[name].shape)]


def _canonical(
    nodes: Sequence[Node],
    inputs: Mapping[str, Sequence[str]],
    writes: Sequence[str],
    shapes: Sequence[Sequence[int | None]],
) -> bytes:
    """A piece as JSON with names that do not depend on where it stands. The shapes of its inputs, in their order, tell
    pieces apart whose graphs for ONNX Runtime, which has them fixed, would differ.
    """
    names = {name: f"{letter}{i}" for letter, group in inputs.items() for i, name in enumerate(group)}
    names.update({node.name: f"n{i}" for i, node in enumerate(nodes)})
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
    if isinstance(tree, Mapping):
        if REFERENCE in tree:
            return {REFERENCE: names[tree[REFERENCE]]}
        return {key: _renamed(value, names) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_renamed(part, names) for part in tree]
    return tree
