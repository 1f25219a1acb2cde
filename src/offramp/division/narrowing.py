"""Integer weights for a module that was divided by a run: matrix products of its ONNX graphs become products of
integers, and the shards are written again.

The graphs exist and are proven in floats before. A weight becomes integers where every graph that takes it multiplies
rows by it, and nothing else. Heads stay floats: the product whose result is the answer, and a small last stage. The new
graphs are run on the operands of the example and compared with the floats.

Shapes: K inputs and N outputs of a product.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from offramp.backends.onnx_checks import checked_model, sizes_of
from offramp.backends.onnx_operators import Known
from offramp.division.export import IR, OPSET, Run, difference, opened, require_allowed_in_stores
from offramp.division.integer_graphs import Port, Uses, narrow_graph, turn_of, uses_of
from offramp.division.names.narrow import MARK, WEIGHT, Quantised, quantise, stored_name
from offramp.errors import StageError
from offramp.program.dtypes import ALIGNMENT_BYTES, DTYPES, FLOAT
from offramp.program.narrow import INTEGER, SCALE, turned_of
from offramp.program.program import Program, Step
from offramp.store import Shard, StoreWriter
from offramp.store import manifest as m
from offramp.store.safetensors import num_bytes
from offramp.streaming import layouts

LEAST_OUTPUTS, LEAST_ELEMENTS = 16, 1024
"""Smallest matrices that become integers: those of smaller ones save nothing."""
MOST_INPUTS = 1 << 16
"""Most inputs of a product: sums of more integers might exceed 32 bits."""
LARGEST_HEAD = 0.1
"""Largest part of the elements of matrices in the stage that gives the answer, if it stays one of floats."""
TOLERANCE = 0.25
"""Largest accepted difference of a stage from its floats, relative to the largest value of a result."""
CHUNK_BYTES = 2 << 20
_FULL = "divide it with --dtype fp32"
Places = dict[str, dict[str, Port]]
"""Kernel -> its inputs that take integers."""


def with_integers(run: Run, manifest: m.Manifest, writer: StoreWriter) -> m.Manifest:
    """Write the shards and ONNX graphs of a divided module again, with integers for floats where that is possible.

    Raises StageError where no product can have integers, no graph was written, or a result differs by more than
    TOLERANCE; SourceError for NaN or infinite numbers.
    """
    original, program = run.original, manifest.program
    if not manifest.graphs:
        raise StageError("integer weights need ONNX graphs, and none were written", original.name, _FULL)
    graphs = {kernel: (writer.partial / graph.file).read_bytes() for kernel, graph in manifest.graphs.items()}
    places = _places(program, manifest, {kernel: uses_of(data) for kernel, data in graphs.items()})
    if not places:
        what = "no matrix product can have integer weights: none, or only that of the answer, multiplies rows by a"
        raise StageError(f"{what} float32 weight of {LEAST_ELEMENTS} elements", original.name, _FULL)
    names = _narrowed(program, places)
    shards = {name: _write_shard(shard, names, manifest, writer) for name, shard in manifest.shards.items()}
    made = {kernel: narrow_graph(data, places[kernel]) for kernel, data in graphs.items() if kernel in places}
    manifest = replace(manifest, shards=shards, program=_program(program, places, names), proof=None)
    extra, worst = _proven(run, manifest, made, writer.partial)
    program = replace(manifest.program, activation_bytes=manifest.program.activation_bytes + extra)
    written = {kernel: writer.add_graph(kernel, data, OPSET, IR) for kernel, data in made.items()}
    original.say(
        f"{len(names)} matrices are stored as integers, results of stages differ by {worst:.1e} of the largest value"
        " at most"
    )
    files = _files(manifest, writer)
    return replace(manifest, program=program, graphs={**manifest.graphs, **written}, files=files)


def _places(program: Program, manifest: m.Manifest, uses: Mapping[str, Uses]) -> Places:
    """Return the inputs of kernels that take integers: of steps that share a kernel all take them or none, and of
    steps that share a weight, too.
    """
    tensors = manifest.tensors()
    assert program.output is not None, "captured"
    kept = {lookup.table for lookup in program.lookups.values()}
    kept.update(name for step in program.steps() for name in step.constants.values())
    found: Places = {kernel: dict(each.ports) for kernel, each in uses.items()}
    for step in program.steps():
        answers = {index for index, name in enumerate(step.writes) if name == program.output.value}
        for port, results in uses[step.kernel].results.items():
            if answers & results:
                found[step.kernel].pop(port, None)
    for kernel in _heads(program, found, tensors):
        found[kernel].clear()
    while True:
        refused = {name for step in program.steps() for name in _refused(step, found[step.kernel], tensors)} | kept
        orders: dict[str, set[bool]] = {}
        for step in program.steps():
            for port, name in step.weights.items():
                if port in found[step.kernel]:
                    orders.setdefault(name, set()).add(found[step.kernel][port].is_transposed)
        refused.update(name for name, each in orders.items() if len(each) > 1)
        wrong = {(s.kernel, port) for s in program.steps() for port, name in s.weights.items() if name in refused}
        before = sum(map(len, found.values()))
        for kernel, port in wrong:
            found[kernel].pop(port, None)
        if sum(map(len, found.values())) == before:
            return {kernel: ports for kernel, ports in found.items() if ports}


def _heads(program: Program, found: Places, tensors: Mapping[str, tuple[Shard, m.Tensor]]) -> set[str]:
    """Return the kernel of the step that gives the answer, if that is a small part of the model: a pooler, a head."""
    assert program.output is not None, "captured"
    sizes: dict[str, int] = {}
    for step in program.steps():
        elements = (tensors[step.weights[port]][1].shape for port in found[step.kernel])
        sizes[step.kernel] = sizes.get(step.kernel, 0) + sum(map(prod, elements))
    last = {step.kernel for step in program.steps() if program.output.value in step.writes}
    return {kernel for kernel in last if sizes[kernel] <= LARGEST_HEAD * sum(sizes.values())}


def _refused(step: Step, ports: Mapping[str, Port], tensors: Mapping[str, tuple[Shard, m.Tensor]]) -> set[str]:
    """Return the weights of a step that stay floats because of it."""
    return {
        name
        for port, name in step.weights.items()
        if port not in ports or not _is_worth(tensors[name][1], ports[port].is_transposed)
    }


def _is_worth(tensor: m.Tensor, is_transposed: bool) -> bool:
    if tensor.dtype != FLOAT or len(tensor.shape) != 2:
        return False
    outputs, inputs = tensor.shape if is_transposed else tensor.shape[::-1]
    return outputs >= LEAST_OUTPUTS and outputs * inputs >= LEAST_ELEMENTS and inputs <= MOST_INPUTS


class _Narrow(NamedTuple):
    """A weight that becomes integers."""

    is_transposed: bool

    def shape(self, tensor: m.Tensor) -> tuple[int, int]:
        """Return its inputs and outputs."""
        first, second = tensor.shape
        return (second, first) if self.is_transposed else (first, second)


def _narrowed(program: Program, places: Places) -> dict[str, _Narrow]:
    """Return the weights that become integers, by name."""
    found = {}
    for step in program.steps():
        for port, each in places.get(step.kernel, {}).items():
            found[step.weights[port]] = _Narrow(each.is_transposed)
    return found


def _write_shard(shard: Shard, names: Mapping[str, _Narrow], manifest: m.Manifest, writer: StoreWriter) -> Shard:
    """Write a shard again: integers and scales for weights, everything else as it is, under names that no model has."""
    folder, described, sources = writer.partial, [], {}
    for tensor in shard.tensors:
        narrow, whole = names.get(tensor.name), stored_name(tensor.name, "")
        sources[whole] = tensor, "" if narrow is None else WEIGHT
        if narrow is None:
            described.append((whole, tensor.role, tensor.dtype, tensor.shape))
            continue
        inputs, outputs = narrow.shape(tensor)
        scales = stored_name(tensor.name, SCALE)
        sources[scales] = tensor, SCALE
        described += [(whole, whole, INTEGER, (inputs, outputs)), (scales, scales, FLOAT, (outputs,))]
    described.sort(key=lambda each: num_bytes(each[2], each[3]) % ALIGNMENT_BYTES != 0)

    @lru_cache(maxsize=1)
    def quantised(name: str) -> Quantised:
        (tensor,) = (each for each in shard.tensors if each.name == name)
        inputs, outputs = names[name].shape(tensor)
        chunks = (np.frombuffer(chunk, np.float32) for chunk in _chunks(folder, shard, tensor))
        if not names[name].is_transposed:
            chunks = iter([np.concatenate(list(chunks)).reshape(inputs, outputs).T.reshape(-1)])
        none = np.empty(0, np.int64)
        return quantise(name, chunks, (outputs, inputs), manifest.source.architecture, turn_of(inputs), none)

    def read(name: str) -> Iterator[bytes | memoryview]:
        tensor, role = sources[name]
        return quantised(tensor.name).data(role, CHUNK_BYTES) if role else _chunks(folder, shard, tensor)

    gathered = shard.blocks is not None and not any(tensor.name in names for tensor in shard.tensors)
    return writer.add_shard(shard.name, described, read, gathered=gathered)


def _chunks(folder: Path, shard: Shard, tensor: m.Tensor) -> Iterator[bytes]:
    """Yield the data of a tensor from the file of its shard."""
    with open(folder / shard.file, "rb") as file:
        file.seek(shard.data_start + tensor.offset)
        for start in range(0, tensor.num_bytes, CHUNK_BYTES):
            yield file.read(min(CHUNK_BYTES, tensor.num_bytes - start))


def _program(program: Program, places: Places, names: Mapping[str, _Narrow]) -> Program:
    """Return a program whose steps take integers and scales, by the names that they have in the store."""

    def step_of(step: Step) -> Step:
        ports = places.get(step.kernel, {})
        weights = {port: stored_name(name, "") for port, name in step.weights.items()}
        weights.update((port + SCALE, stored_name(step.weights[port], SCALE)) for port in ports)
        return replace(step, weights=weights, constants=_renamed(step.constants))

    stages = tuple(replace(stage, steps=tuple(map(step_of, stage.steps))) for stage in program.stages)
    kernels = dict(program.kernels)
    for kernel, ports in places.items():
        about = {port + end: value for port, each in ports.items() for end, value in each.turned.attributes.items()}
        kernels[kernel] = replace(kernels[kernel], attributes=about)
    lookups = {name: replace(each, table=stored_name(each.table, "")) for name, each in program.lookups.items()}
    module = program.module
    assert module is not None, "divided by a run"
    module = replace(
        module,
        aliases={stored_name(name, ""): each for name, each in module.aliases.items()},
        buffers=tuple(stored_name(name, "") for name in module.buffers),
        sliced=tuple(stored_name(name, "") for name in module.sliced if name not in names),
        unused=tuple(stored_name(name, "") for name in module.unused),
    )
    return replace(program, stages=stages, kernels=kernels, lookups=lookups, module=module)


def _renamed(names: Mapping[str, str]) -> dict[str, str]:
    return {port: stored_name(name, "") for port, name in names.items()}


@dataclass
class _Proof:
    """Largest differences and values of the graphs that have run."""

    worst: float = 0.0
    extra_bytes: int = 0


def _proven(run: Run, manifest: m.Manifest, made: Mapping[str, bytes], folder: Path) -> tuple[int, float]:
    """Run the new graphs on the operands of the example, with the integers that were written.

    Returns the most bytes that a graph takes in addition to its floats, and the largest difference. Raises StageError.
    """
    proof, steps = _Proof(), list(manifest.program.steps())
    sessions = {kernel: opened(data) for kernel, data in made.items()}

    def watch(index: int, given: list[Tensor], results: tuple[Tensor, ...]) -> None:
        step = steps[index]
        if step.kernel not in made:
            return
        operands = {
            n: t.detach().contiguous().numpy() for n, t in zip(run.graphs[step.kernel].inputs, given, strict=True)
        }
        for port in turned_of(manifest.program.kernels[step.kernel].attributes):
            for name in (port, port + SCALE):
                operands[name] = _array(manifest, step.weights[name], folder)
        data, lived = made[step.kernel], manifest.program.activation_bytes
        try:
            require_allowed_in_stores(data, operands, list(step.reads), lived)
            proof.worst = max(proof.worst, difference(sessions[step.kernel], operands, results, TOLERANCE))
        except StageError as error:
            raise StageError(f"with integer weights, {error.what}", run.original.name, _FULL) from None
        proof.extra_bytes = max(proof.extra_bytes, _extra_bytes(data, operands))

    run(run.original.examples[0].inputs, watch)
    return proof.extra_bytes, proof.worst


def _array(manifest: m.Manifest, name: str, folder: Path) -> np.ndarray:
    shard, tensor = manifest.tensors()[name]
    data = b"".join(_chunks(folder, shard, tensor))
    return np.frombuffer(data, DTYPES[tensor.dtype].numpy).reshape(tensor.shape)


def _extra_bytes(data: bytes, operands: Mapping[str, np.ndarray]) -> int:
    """Return the bytes of what a product of integers has beside it that one of floats has not: rotated rows, integers,
    and sums before they are scaled.
    """
    model = checked_model(data)
    values = sizes_of(model, {name: Known(each.dtype.name, each.shape) for name, each in operands.items()}).values
    most = 0
    for node in model.graph.nodes:
        if node.operator.endswith("MatMulIntegerToFloat"):
            rows, sums = values[node.inputs[0]], values[node.outputs[0]]
            assert rows is not None and sums is not None, "of listed operators"
            most = max(most, 5 * rows.num_elements + sums.num_bytes)
    return most


def _files(manifest: m.Manifest, writer: StoreWriter) -> tuple[m.File, ...]:
    """Return the companions, with a config.json that says that the weights are integers, and without layouts."""
    files = []
    for file in manifest.files:
        if file.file == "config.json":
            config = json.loads((writer.partial / file.file).read_bytes())
            data = json.dumps({**config, "quantization_config": MARK}, indent=2).encode() + b"\n"
            file = writer.add_file(file.file, data)
        if file.file != layouts.FILE_NAME:
            files.append(file)
    return tuple(files)
