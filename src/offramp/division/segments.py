"""Graphs for the stages of a divided module: exported, cut where stages begin, proven, written for both backends."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.backends.torch_graphs import CapturedGraph
from offramp.division.cutting import Graph, cut, has_hidden
from offramp.division.exported import export
from offramp.errors import StageError
from offramp.program.program import Segments, graph_file
from offramp.store import StoreWriter
from offramp.store import manifest as m
from offramp.streaming.capture import Arguments, are_equal
from offramp.streaming.placeholders import Weight, bits
from offramp.streaming.placement import NAMES

OPSET, IR = 18, 8
"""Of what torch writes; ONNX Runtime 1.14 reads it."""
TOLERANCE = 1e-4
"""What ONNX Runtime may differ by, of the largest value of a result."""
CONSTANTS = "constants"
"""The shard of what graphs take besides weights and saved buffers."""
Say = Callable[[str], None]
Examples = Sequence[tuple[Arguments, Sequence[Tensor]]]


def with_segments(
    module: nn.Module,
    weights: Mapping[str, Weight],
    manifest: m.ModuleManifest,
    exits: Sequence[int],
    examples: Examples,
    fetch: Callable[[str], Tensor],
    writer: StoreWriter,
    say: Say,
) -> m.ModuleManifest:
    """The manifest with a graph for each stage, which are written. `exits`: the stages before which
    an exit can stand, if the graphs have the hidden state there.

    Raises StageError with the reason where the module cannot be exported, or its graphs answer otherwise than it does.
    """
    program = manifest.program
    graph = export(module, weights, examples[0][0], [inputs for inputs, _ in examples[1:]])
    segments, kinds = cut(graph, program, _tables(manifest))
    manifest = _with_kept(segments, manifest)
    _require_own_weights(segments, manifest)
    graphs = {kind: CapturedGraph(data, kind) for kind, data in kinds.items()}
    for inputs, expected in examples:
        fault = _fault(partial(_run, graphs, segments, graph, inputs, fetch), expected)
        if fault is not None:
            shown = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in inputs.tensors().items())
            raise StageError(f"the exported graph {fault} for {shown}", program.module, "use --method eager")
    segments = replace(segments, exits=tuple(i for i in exits if has_hidden(segments, program, i)))
    known = {tensor.name for shard in manifest.shards.values() for tensor in shard.tensors}
    constants = {name: tensor for name, tensor in graph.data.items() if name not in known and _is_used(name, segments)}
    shards = dict(manifest.shards)
    if constants:
        shards[CONSTANTS] = _write_constants(constants, writer)
    files = [writer.add_file(graph_file(kind), data) for kind, data in sorted(kinds.items())]
    say(f"{len(segments.stages)} stages as {len(kinds)} graphs, exits can stand before {len(segments.exits)} of them")
    onnx = _write_onnx(graphs, segments, graph, examples[0][0], fetch, writer, say)
    return replace(
        manifest, program=replace(program, segments=segments), shards=shards, graphs=onnx,
        files=(*manifest.files, *files), source=replace(manifest.source, method="export"),
    )  # fmt: skip


def _tables(manifest: m.ModuleManifest) -> set[str]:
    """Of which a stream reads nothing but rows."""
    gathered = (tensor.name for shard in manifest.shards.values() if shard.blocks for tensor in shard.tensors)
    return set(gathered) - set(manifest.program.sliced)


def _fault(run: Callable[[], list[Tensor]], expected: Sequence[Tensor]) -> str | None:
    try:
        found = run()
    except Exception as error:  # of an operation, whatever it says of shapes that it was not made for
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


def _with_kept(segments: Segments, manifest: m.ModuleManifest) -> m.ModuleManifest:
    """The manifest with shards that stay in memory named by every stage whose graph takes a weight of theirs."""
    stages = []
    for segment, stage in zip(segments.stages, manifest.stages, strict=True):
        (step,) = stage.steps
        kept = [
            name for name in manifest.program.pinned if name not in step.shards
            and any(tensor.name in segment.weights for tensor in manifest.shards[name].tensors)
        ]  # fmt: skip
        stages.append(replace(stage, steps=(replace(step, shards=(*step.shards, *kept)),)))
    return replace(manifest, stages=tuple(stages))


def _require_own_weights(segments: Segments, manifest: m.ModuleManifest) -> None:
    """Raise StageError where a graph needs a weight that the run of the module used in other stages alone."""
    for segment, stage in zip(segments.stages, manifest.stages, strict=True):
        shards = [manifest.shards[name] for step in stage.steps for name in step.shards]
        lost = set(segment.weights) - {tensor.name for shard in shards for tensor in shard.tensors}
        if lost:
            what = f"{min(lost)} is used in stage {stage.name} of the exported graph, and elsewhere by the module"
            raise StageError(what, manifest.program.module, "use --method eager")


def _is_used(name: str, segments: Segments) -> bool:
    return any(name in segment.constants for segment in segments.stages)


def _write_constants(constants: Mapping[str, Tensor], writer: StoreWriter) -> m.Shard:
    tensors = sorted(constants.items(), key=lambda pair: pair[1].nbytes % 64 != 0)
    entries = [(name, name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors]
    return writer.add_shard(CONSTANTS, entries, lambda name: [bits(constants[name])])


def _run(
    graphs: Mapping[str, CapturedGraph],
    segments: Segments,
    graph: Graph,
    inputs: Arguments,
    fetch: Callable[[str], Tensor],
    watch: Callable[[int, list[Tensor], tuple[Tensor, ...]], None] = lambda index, given, made: None,
) -> list[Tensor]:
    """What the graphs say, one after the other."""
    values: dict[str, Any] = dict(zip(graph.inputs, inputs.copy().tensors().values(), strict=True))
    with torch.no_grad():
        for name, found in segments.look_ups.items():
            values[name] = functional.embedding(values[found.input], fetch(found.table))
        for index, segment in enumerate(segments.stages):
            given = [values[name] for name in segment.reads]
            given += [fetch(name) for name in segment.weights]
            given += [graph.data[name] for name in segment.constants]
            made = graphs[segment.kind](*given)
            watch(index, given, made)
            values.update(zip(segment.writes, made, strict=True))
    return [values[name] for name in segments.outputs]


def _write_onnx(
    graphs: Mapping[str, CapturedGraph],
    segments: Segments,
    graph: Graph,
    example: Arguments,
    fetch: Callable[[str], Tensor],
    writer: StoreWriter,
    say: Say,
) -> dict[str, m.Graph]:
    """The same graphs for ONNX Runtime, each compared with what it was made from."""
    if importlib.util.find_spec("onnxscript") is None:
        say("no ONNX graphs written, the store runs on torch only: pip install 'offramp[divide]'")
        return {}
    made: dict[str, m.Graph] = {}
    worst = 0.0

    def write(index: int, given: list[Tensor], results: tuple[Tensor, ...]) -> None:
        nonlocal worst
        segment = segments.stages[index]
        if segment.kind not in made:
            extents = [graph.dynamic.get(name, ()) for name in segment.reads]
            data = _onnx(graphs[segment.kind], given, extents)
            worst = max(worst, _difference(data, graphs[segment.kind].inputs, given, results))
            file = writer.add_file(f"graphs/{segment.kind}.onnx", data)
            made[segment.kind] = m.Graph(file.file, file.bytes, file.sha256, OPSET, IR)

    try:
        _run(graphs, segments, graph, example, fetch, write)
    except StageError as error:
        say(f"no ONNX graphs written, the store runs on torch only: {error}")
        return {}
    say(f"ONNX graphs differ from PyTorch's by {worst:.1e} at most, of the largest value")
    return made


def _onnx(graph: CapturedGraph, given: Sequence[Tensor], extents: Sequence[Sequence[int]]) -> bytes:
    moving = [dict.fromkeys(each, torch.export.Dim.DYNAMIC) or None for each in extents]
    shapes = tuple(moving) + (None,) * (len(given) - len(moving))
    try:
        with _quiet():
            program = torch.onnx.export(
                graph, tuple(given), dynamo=True, dynamic_shapes=(shapes,), input_names=list(graph.inputs),
                opset_version=OPSET, verbose=False, external_data=False, optimize=True,
            )  # fmt: skip
        assert program is not None
        proto = program.model_proto
    except Exception as error:  # the exporter raises many kinds
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        what = f"a stage cannot be written as ONNX ({type(error).__name__}: {said[:200]})"
        raise StageError(what, None, "run it on torch") from None
    for node in proto.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for info in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        del info.metadata_props[:]
    del proto.graph.value_info[:]
    proto.ir_version = IR
    return proto.SerializeToString(deterministic=True)


def _difference(data: bytes, names: Sequence[str], given: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Of ONNX Runtime's results, relative to the largest value. Raises StageError where it is no rounding."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        taken = {each.name for each in session.get_inputs()}
        feeds = {n: t.detach().contiguous().numpy() for n, t in zip(names, given, strict=True) if n in taken}
        results: Any = session.run(None, feeds)
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise StageError(f"a stage does not run as ONNX ({str(error).splitlines()[0][:200]})", None, "") from None
    worst = 0.0
    for found, wanted in zip(results, expected, strict=True):
        wanted = wanted.detach().numpy()
        if found.dtype.kind == "f" and wanted.size:
            scale = max(float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0)), 1e-6)
            worst = max(worst, float(np.abs(found - wanted)[np.isfinite(wanted)].max(initial=0)) / scale)
        elif not np.array_equal(found, wanted):
            worst = float("inf")
    if worst > TOLERANCE:
        raise StageError(f"ONNX Runtime differs by {worst:.1e} of the largest value", None, "run it on torch")
    return worst


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of its steps on stdout, by warnings and by logging."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
