"""Captured graphs for the parts of a divided module: exported, cut where parts begin, proven, and written."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from offramp.backends.torch_graphs import CapturedGraph
from offramp.division.cutting import Cut, Graph, cut, has_hidden
from offramp.division.exported import export
from offramp.division.onnx_export import IR, OPSET, difference, to_onnx
from offramp.division.original import Original
from offramp.errors import StageError
from offramp.program.captured import captured_program
from offramp.store import StoreWriter
from offramp.store import manifest as m
from offramp.streaming.capture import Arguments, are_equal
from offramp.streaming.placeholders import bits
from offramp.streaming.placement import NAMES

CONSTANTS = "constants"
"""Name of the shard of tensors that graphs take in addition to weights and saved buffers."""
Watch = Callable[[int, list[Tensor], tuple[Tensor, ...]], None]
"""Called with the index of a piece, its operands and its results."""


def with_graphs(original: Original, manifest: m.Manifest, exits: Sequence[int], writer: StoreWriter) -> m.Manifest:
    """Write a graph for each part of the module and return the manifest with a program that runs them.

    Args:
        exits: parts before which an exit can stand, if the graphs have the hidden state there.

    Raises StageError with the reason where the module cannot be exported, or its graphs give other answers.
    """
    inputs = [example.inputs for example in original.examples]
    graph = export(original.module, original.weights, inputs[0], inputs[1:])
    found = cut(graph, manifest.program, _tables(manifest))
    found, manifest = _placed(found, manifest)
    run = _Run(original, graph, found)
    for example in original.examples:
        fault = _fault(run, example.inputs, example.outputs)
        if fault is not None:
            shown = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in example.inputs.tensors().items())
            raise StageError(f"the exported graph {fault} for {shown}", original.name, "use --method eager")
    places = [index for index in exits if has_hidden(found, graph, manifest.program, index)]
    program = captured_program(manifest.program, found.pieces, found.values, places, found.lookups, found.outputs[0])
    files = [writer.add_file(m.captured_file(kernel), data) for kernel, data in sorted(found.graphs.items())]
    original.say(
        f"{len(found.pieces)} stages as {len(found.graphs)} graphs, exits can stand before {len(places)} of them"
    )
    return replace(
        manifest, program=program, shards={**manifest.shards, **_constants(graph, found, manifest, writer)},
        graphs=_write_onnx(run, writer), files=(*manifest.files, *files),
        source=replace(manifest.source, method="export"),
    )  # fmt: skip


class _Run:
    """The pieces of a module, run one after the other in PyTorch with all weights at hand."""

    def __init__(self, original: Original, graph: Graph, found: Cut) -> None:
        self.original, self.graph, self.found = original, graph, found
        self.graphs = {kernel: CapturedGraph(data, kernel) for kernel, data in found.graphs.items()}

    def __call__(self, inputs: Arguments, watch: Watch = lambda index, given, made: None) -> list[Tensor]:
        """Return the outputs."""
        fetch, graph = self.original.fetch, self.graph
        values: dict[str, Any] = dict(zip(graph.inputs, inputs.copy().tensors().values(), strict=True))
        with torch.no_grad():
            for name, lookup in self.found.lookups.items():
                values[name] = functional.embedding(values[lookup.input], fetch(lookup.table))
            for index, piece in enumerate(self.found.pieces):
                given = [values[name] for name in piece.reads]
                given += [fetch(name) for name in piece.weights]
                given += [graph.data[name] for name in piece.constants]
                made = self.graphs[piece.kernel](*given)
                watch(index, given, made)
                values.update(zip(piece.writes, made, strict=True))
        return [values[name] for name in self.found.outputs]


def _tables(manifest: m.Manifest) -> set[str]:
    """Return the tensors from which a stream reads only rows."""
    module = manifest.program.module
    assert module is not None, "divided by a run"
    return {name for name, (shard, _) in manifest.tensors().items() if shard.blocks is not None} - set(module.sliced)


def _fault(run: _Run, inputs: Arguments, expected: Sequence[Tensor]) -> str | None:
    try:
        found = run(inputs)
    except Exception as error:  # operations raise any class for shapes that they do not take
        return f"fails ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]})"
    if are_equal(found, expected):
        return None
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return "answers in other shapes than the module"
    worst = max(map(_distance, found, expected), default=0.0)
    return f"answers otherwise than the module (by {worst:.1e} at most, of the largest value)"


def _distance(found: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


def _placed(found: Cut, manifest: m.Manifest) -> tuple[Cut, m.Manifest]:
    """Return pieces with the shards of their weights, and parts that name the pinned shards that their pieces use.

    Raises StageError where a piece needs a weight that the run of the module used only in other parts.
    """
    module, tensors = manifest.program.module, manifest.tensors()
    assert module is not None, "divided by a run"
    pieces, parts = [], []
    for index, (piece, part) in enumerate(zip(found.pieces, module.parts, strict=True)):
        homes = {name: tensors[name][0].name if name in tensors else "" for name in piece.weights}
        kept = tuple(name for name in module.pinned if name in homes.values() and name not in part.shards)
        part = replace(part, shards=(*part.shards, *kept))
        lost = [name for name, home in homes.items() if home not in part.shards]
        if lost:
            what = f"{min(lost)} is used in stage {index:03d} of the exported graph, and elsewhere by the module"
            raise StageError(what, module.name, "use --method eager")
        parts.append(part)
        pieces.append(replace(piece, shards=tuple(name for name in part.shards if name in homes.values())))
    program = replace(manifest.program, module=replace(module, parts=tuple(parts)))
    return replace(found, pieces=tuple(pieces)), replace(manifest, program=program)


def _constants(graph: Graph, found: Cut, manifest: m.Manifest, writer: StoreWriter) -> dict[str, m.Shard]:
    """Write the constants that are not in the store. Returns their shard by name, or nothing."""
    used = {name for piece in found.pieces for name in piece.constants}
    constants = {name: data for name, data in graph.data.items() if name in used and name not in manifest.tensors()}
    if not constants:
        return {}
    tensors = sorted(constants.items(), key=lambda pair: pair[1].nbytes % 64 != 0)
    entries = [(name, name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors]
    return {CONSTANTS: writer.add_shard(CONSTANTS, entries, lambda name: [bits(constants[name])])}


def _write_onnx(run: _Run, writer: StoreWriter) -> dict[str, m.Graph]:
    """Write the graphs for ONNX Runtime. Returns none where one of them cannot be written or gives other results."""
    say = run.original.say
    if importlib.util.find_spec("onnxscript") is None:
        say("no ONNX graphs written, the store runs on torch only: pip install 'offramp[divide]'")
        return {}
    written: dict[str, m.Graph] = {}
    worst = 0.0

    def write(index: int, given: list[Tensor], results: tuple[Tensor, ...]) -> None:
        nonlocal worst
        piece = run.found.pieces[index]
        if piece.kernel not in written:
            graph = run.graphs[piece.kernel]
            data = to_onnx(graph, given, [run.graph.dynamic.get(name, ()) for name in piece.reads])
            worst = max(worst, difference(data, graph.inputs, given, results))
            written[piece.kernel] = writer.add_graph(piece.kernel, data, OPSET, IR)

    try:
        run(run.original.examples[0].inputs, write)
    except StageError as error:
        say(f"no ONNX graphs written, the store runs on torch only: {error}")
        return {}
    say(f"ONNX graphs differ from PyTorch's by {worst:.1e} at most, of the largest value")
    return written
