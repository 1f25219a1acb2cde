"""Captured graphs for the parts of a divided module: exported, cut where parts begin, proven, and written.

Graphs for ONNX Runtime are made from those for PyTorch, and each is compared with its origin.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from offramp.backends.onnx_checks import require_allowed
from offramp.backends.onnx_operators import Known
from offramp.backends.torch_graphs import CapturedGraph
from offramp.division.cutting import Cut, Graph, cut, has_hidden
from offramp.division.exported import export
from offramp.division.exporter import IR, ON_TORCH, OPSET, to_onnx
from offramp.division.messages import no_graph
from offramp.division.proof import Example, Original, are_close, difference_of
from offramp.division.snapshot import undisturbed
from offramp.errors import StageError, said
from offramp.program.captured import captured_program
from offramp.program.checks import WrongError
from offramp.program.dtypes import ALIGNMENT_BYTES
from offramp.store import StoreWriter
from offramp.store import manifest as m
from offramp.streaming.capture import Arguments, are_equal
from offramp.streaming.placeholders import bits
from offramp.streaming.placement import CONSTANTS, NAMES

TOLERANCE = 1e-4
"""Largest accepted difference of ONNX Runtime, relative to the largest value of a result."""
Watch = Callable[[int, list[Tensor], tuple[Tensor, ...]], None]
"""Called with the index of a piece, its operands and its results."""


def with_graphs(
    original: Original, manifest: m.Manifest, exits: Sequence[int], writer: StoreWriter
) -> tuple[m.Manifest, "Run"]:
    """Write a graph for each part of the module. Returns the manifest with a program that runs them, and their run.

    Args:
        exits: parts before which an exit can stand, if the graphs have the hidden state there.

    Raises StageError with the reason where the module cannot be exported, or its graphs give other answers.
    """
    inputs = [example.inputs for example in original.examples]
    module = manifest.program.module
    assert module is not None, "divided by a run"
    texts = manifest.program.texts
    longest = None if texts is None else texts.max_length
    graph = export(original.module, original.weights, inputs[0], inputs[1:], longest)
    by_rows = {name for name, (shard, _) in manifest.tensors().items() if shard.blocks is not None}
    found = cut(graph, manifest.program, by_rows - set(module.sliced))
    found, manifest = _placed(found, manifest)
    run = Run(original, graph, found)
    for example in original.examples:
        fault = _fault(run, example)
        if fault is not None:
            raise no_graph(f"the exported graph {fault} for {example.shapes}", original.name)
    if manifest.program.output is not None:
        _require_independent_rows(run, original.examples[0])
    places = [index for index in exits if has_hidden(found, graph, manifest.program, index)]
    program = captured_program(manifest.program, found.pieces, found.values, places, found.lookups, found.outputs[0])
    files = [writer.add_file(m.captured_file(kernel), data) for kernel, data in sorted(found.graphs.items())]
    counts = f"{len(found.pieces)} stages as {len(found.graphs)} graphs"
    original.say(f"{counts}, exits can stand before {len(places)} of them")
    unlisted = sorted({name for graph in run.graphs.values() for name in graph.unlisted})
    if unlisted:
        what = f"the graphs have operations that stores may not bring ({', '.join(unlisted)})"
        original.say(f"{what}: run it with offramp.stream, or with --trust-kernels")
    manifest = replace(
        manifest,
        program=program,
        shards={**manifest.shards, **_constants(graph, found, manifest, writer)},
        graphs=_write_onnx(run, program.activation_bytes, writer),
        files=(*manifest.files, *files),
        source=replace(manifest.source, method="export"),
    )
    return manifest, run


class Run:
    """The pieces of a module, run one after the other in PyTorch with all weights at hand."""

    def __init__(self, original: Original, graph: Graph, found: Cut) -> None:
        self.original, self.graph, self.found = original, graph, found
        self.graphs = {kernel: CapturedGraph(data, kernel, trusted=True) for kernel, data in found.graphs.items()}
        self.draws = False
        """True if the last run has drawn random numbers."""

    def __call__(self, inputs: Arguments, watch: Watch = lambda index, given, made: None) -> list[Tensor]:
        """Return the outputs."""
        return self.of(list(inputs.copy().tensors().values()), watch)

    def of(self, tensors: Sequence[Tensor], watch: Watch = lambda index, given, made: None) -> list[Tensor]:
        """Return the outputs for the tensors among the arguments."""
        fetch, graph = self.original.fetch, self.graph
        values: dict[str, Any] = dict(zip(graph.inputs, tensors, strict=True))
        with undisturbed(self.original.module), torch.no_grad():  # for the state of the random generators
            seeded = torch.default_generator.get_state()
            for name, lookup in self.found.lookups.items():
                values[name] = functional.embedding(values[lookup.input], fetch(lookup.table))
            for index, piece in enumerate(self.found.pieces):
                given = [values[name] for name in piece.reads]
                given += [fetch(name).contiguous() for name in piece.weights]  # as backends have them
                given += [graph.data[name] for name in piece.constants]
                made = self.graphs[piece.kernel](*given)
                watch(index, given, made)
                values.update(zip(piece.writes, made, strict=True))
            self.draws = not torch.equal(seeded, torch.default_generator.get_state())
        return [values[name] for name in self.found.outputs]


def _fault(run: Run, example: Example) -> str | None:
    """Return what is wrong with the graphs on an example, or None."""
    try:
        found = run(example.inputs)
    except Exception as error:  # operations raise any class for shapes that they do not take
        return f"fails ({said(error)})"
    if are_equal(found, example.outputs):
        return None
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in example.outputs]:
        return "answers in other shapes than the module"
    worst = max(map(difference_of, found, example.outputs))
    return f"gives other answers than the module (by {worst:.1e} at most, of the largest value)"


def _require_independent_rows(run: Run, example: Example) -> None:
    """Raise StageError where a row of the answer is another one beside other rows: rows come in batches of any size,
    and leave them at exits.
    """
    axes = [run.graph.batch.get(name) for name in run.graph.inputs]
    tensors, answer = list(example.inputs.tensors().values()), example.outputs[0]
    if run.draws or run.graph.batch.get(run.found.outputs[0]) != 0 or 0 not in axes:
        return
    places = [0, len(answer) - 1]
    batches = [[_row(t, axis, row) for t, axis in zip(tensors, axes, strict=True)] for row in places]
    try:
        found = torch.cat([run.of(batch)[0] for batch in batches])
    except Exception as error:  # operations raise any class for shapes that they do not take
        raise no_graph(f"the exported graph fails for a row alone ({said(error)})", run.original.name) from None
    if not are_close([found], [answer[places]]):
        raise no_graph("the answer to a row depends on the other rows of its batch", run.original.name)


def _row(tensor: Tensor, axis: int | None, row: int) -> Tensor:
    return tensor if axis is None else tensor.narrow(axis, row, 1).contiguous()


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
            what = f"{min(lost)} is used in stage {index:03d} of the exported graph, and in another one by the module"
            raise no_graph(what, module.name)
        parts.append(part)
        pieces.append(replace(piece, shards=tuple(name for name in part.shards if name in homes.values())))
    program = replace(manifest.program, module=replace(module, parts=tuple(parts)))
    return replace(found, pieces=tuple(pieces)), replace(manifest, program=program)


def _constants(graph: Graph, found: Cut, manifest: m.Manifest, writer: StoreWriter) -> dict[str, m.Shard]:
    """Write the constants that are not in the store. Returns their shard by name, or nothing."""
    used = {name for piece in found.pieces for name in piece.constants} - manifest.tensors().keys()
    constants = [(name, tensor) for name, tensor in graph.data.items() if name in used]
    if not constants:
        return {}
    aligned = sorted(constants, key=lambda pair: pair[1].nbytes % ALIGNMENT_BYTES != 0)
    entries = [(name, name, NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in aligned]
    return {CONSTANTS: writer.add_shard(CONSTANTS, entries, lambda name: [bits(graph.data[name])])}


def _write_onnx(run: Run, activation_bytes: int, writer: StoreWriter) -> dict[str, m.Graph]:
    """Write the graphs for ONNX Runtime.

    Returns none where one of them cannot be written, may not be in a store, or gives other results.
    """
    say = run.original.say
    if importlib.util.find_spec("onnxscript") is None:
        say("no ONNX graphs written, the store runs on torch only: pip install 'offramp[divide]'")
        return {}
    written: dict[str, m.Graph] = {}
    differences = [0.0]

    def write(index: int, given: list[Tensor], results: tuple[Tensor, ...]) -> None:
        piece = run.found.pieces[index]
        if piece.kernel not in written:
            graph = run.graphs[piece.kernel]
            data = to_onnx(graph, given, [run.graph.dynamic.get(name, ()) for name in piece.reads])
            operands = {name: tensor.detach() for name, tensor in zip(graph.inputs, given, strict=True)}
            require_allowed_in_stores(data, operands, graph.inputs[: len(piece.reads)], activation_bytes)
            feeds = {name: tensor.contiguous().numpy() for name, tensor in operands.items()}
            differences.append(difference(opened(data), feeds, results, TOLERANCE))
            written[piece.kernel] = writer.add_graph(piece.kernel, data, OPSET, IR)

    try:
        run(run.original.examples[0].inputs, write)
    except StageError as error:
        say(f"no ONNX graphs written, the store runs on torch only: {error}")
        return {}
    say(f"ONNX graphs differ from PyTorch's by {max(differences):.1e} at most, of the largest value")
    return written


def require_allowed_in_stores(
    data: bytes, operands: Mapping[str, Tensor | np.ndarray], reads: Sequence[str], lived: int
) -> None:
    """Raise StageError where readers of the store would refuse a graph. `lived`: bytes of the model's values."""
    inputs = {n: Known(str(each.dtype).removeprefix("torch."), tuple(each.shape)) for n, each in operands.items()}
    try:
        require_allowed(data, inputs, reads, lived)
    except WrongError as error:
        raise StageError(f"as ONNX, {error}", None, ON_TORCH) from None


def opened(data: bytes) -> Any:
    """Return a session of a graph. Raises StageError where it does not load."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise StageError(f"a stage does not load as ONNX ({said(error)})", None, ON_TORCH) from None


def difference(session: Any, operands: Mapping[str, np.ndarray], expected: Sequence[Tensor], tolerance: float) -> float:
    """Return the largest difference between ONNX Runtime's results and those expected, relative to the largest value.

    Raises StageError where it is larger than `tolerance`, or the graph does not run.
    """
    try:
        results: Any = session.run(None, {each.name: operands[each.name] for each in session.get_inputs()})
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise StageError(f"a stage does not run as ONNX ({said(error)})", None, ON_TORCH) from None
    worst = 0.0
    for found, tensor in zip(results, expected, strict=True):
        wanted = tensor.detach().numpy()
        if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):  # a complex number becomes two others
            what = f"ONNX Runtime gives {found.dtype} {list(found.shape)} for {wanted.dtype} {list(wanted.shape)}"
            raise StageError(what, None, ON_TORCH)
        if found.dtype.kind == "f" and wanted.size:
            finite = np.isfinite(wanted)
            scale = max(float(np.abs(wanted[finite]).max(initial=0)), 1e-6)
            worst = max(worst, float(np.abs(found[finite] - wanted[finite]).max(initial=0)) / scale)
        elif not np.array_equal(found, wanted):
            worst = float("inf")
    if worst > tolerance:
        raise StageError(f"ONNX Runtime differs by {worst:.1e} of the largest value", None, ON_TORCH)
    return worst
