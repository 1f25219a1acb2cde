"""Checks that the parts of a manifest fit together: the program, the tensors and shards, graphs, labels and exits."""

from __future__ import annotations

from typing import Iterable, Mapping, Optional

from offramp.program import program as p
from offramp.program.checks import WrongError, int_of, require_distinct
from offramp.program.encoder import misfit
from offramp.store.manifest import MAX_GRAPH_BYTES, MAX_MANIFEST_BYTES, Manifest, Shard, all_files
from offramp.store.safetensors import PAGE_BYTES

TEMPLATES_WITHOUT_GRAPH = ("mask", p.POOLED_LINEAR)
"""Templates that every backend computes by itself."""


def check_manifest(manifest: Manifest) -> None:
    """Raise WrongError naming the first part that does not fit the others."""
    program, shards = manifest.program, manifest.shards
    require_distinct((tensor.name for shard in shards.values() for tensor in shard.tensors), "tensor")
    require_distinct((file.file.lower() for file in all_files(manifest)), "file")  # some file systems fold case
    for index, shard in enumerate(shards.values()):
        _check_layout(shard, f"shards[{index}]")
        _check_gathered(shard)
    for index, stage in enumerate(program.stages):
        for number, step in enumerate(stage.steps):
            _check_step(step, manifest, f"program.stages[{index}].steps[{number}]")
    for name, lookup in program.lookups.items():
        _check_look_up(name, lookup, program.texts, manifest)
    if program.module is not None:
        _check_module(program.module, manifest)
    wrong = misfit(program, {name: (tensor.dtype, tensor.shape) for name, (_, tensor) in manifest.tensors().items()})
    if wrong is not None:
        raise WrongError(wrong)
    _check_graphs(manifest)
    num_labels = 0 if program.output is None else program.output.num_labels
    if (manifest.labels is not None) + bool(manifest.inline_labels) != bool(num_labels):
        raise WrongError(f"labels: the output has {num_labels}")


def _check_layout(shard: Shard, where: str) -> None:
    int_of(shard.data_start, f"{where}.data_start", PAGE_BYTES, min(shard.bytes, MAX_MANIFEST_BYTES))
    if shard.data_start % PAGE_BYTES:
        raise WrongError(f"{where}.data_start {shard.data_start} is not a multiple of {PAGE_BYTES}")
    end = 0
    for tensor in sorted(shard.tensors, key=lambda tensor: tensor.offset):
        if tensor.offset != end:
            raise WrongError(f"{where}: tensor {tensor.name!r} begins at {tensor.offset}, not at {end}")
        end += tensor.num_bytes
    if end != shard.data_bytes:
        raise WrongError(f"{where}: tensors take {end} bytes, the file holds {shard.data_bytes}")


def _check_gathered(shard: Shard) -> None:
    """Raise WrongError unless a shard from which rows are gathered consists of tables with distinct roles."""
    if shard.blocks is None:
        return
    if not shard.tensors or any(len(tensor.shape) != 2 or 0 in tensor.shape for tensor in shard.tensors):
        raise WrongError(f"shard {shard.name!r}, of which rows are gathered, must hold tables")
    require_distinct((tensor.role for tensor in shard.tensors), f"shard {shard.name!r}: role")


def _check_step(step: p.Step, manifest: Manifest, where: str) -> None:
    _require_listed(step.shards, manifest.shards, f"{where} needs the shard")
    _require_listed((*step.weights.values(), *step.constants.values()), manifest.tensors(), f"{where} takes the tensor")
    for name in step.weights.values():
        if manifest.tensors()[name][0].name not in step.shards:
            raise WrongError(f"{where} takes {name!r}, which is not in its shards")


def _require_listed(names: Iterable[str], known: Mapping[str, object], what: str) -> None:
    for name in names:
        if name not in known:
            raise WrongError(f"{what} {name!r}, which is not listed")


def _check_look_up(name: str, lookup: p.LookUp, texts: Optional[p.Texts], manifest: Manifest) -> None:
    """Raise WrongError unless the table is gathered, float32, and has a row for every id that may occur."""
    where = f"program.lookups.{name}"
    _require_listed([lookup.table], manifest.tensors(), f"{where} takes the tensor")
    shard, table = manifest.tensors()[lookup.table]
    if shard.blocks is None:
        raise WrongError(f"{where} takes {lookup.table!r}, of whose shard no rows are gathered")
    if table.dtype != "F32" or lookup.value.axes[-1] != table.shape[1]:
        raise WrongError(f"{where} is {lookup.value}, the rows of its table are {table.dtype} [{table.shape[1]}]")
    if texts is None:
        return
    needed = {
        p.INPUT_IDS: texts.vocab_size,
        p.POSITION_IDS: texts.max_length + texts.position_offset,
        p.TOKEN_TYPE_IDS: texts.num_token_types,
    }
    height, least = table.shape[0], needed.get(lookup.input, 0)
    if height < least:
        raise WrongError(f"{where}: {lookup.table!r} has {height} rows, {lookup.input} names {least}")


def _check_module(module: p.Module, manifest: Manifest) -> None:
    """Raise WrongError unless the names of a module are known and its shards are of the kinds that they must be."""
    where, shards, tensors = "program.module", manifest.shards, manifest.tensors()
    for index, part in enumerate(module.parts):
        _require_listed(part.shards, shards, f"{where}.parts[{index}] needs the shard")
    _require_listed(module.pinned, shards, f"{where}.pinned names the shard")
    for key in ("aliases", "buffers", "sliced", "unused"):
        _require_listed(getattr(module, key), tensors, f"{where}.{key} names the tensor")
    require_distinct([*tensors, *(name for names in module.aliases.values() for name in names)], "tensor")
    for shard in shards.values():
        if shard.blocks is not None and (len(shard.tensors) != 1 or shard.tensors[0].role != "rows"):
            raise WrongError(f"shard {shard.name!r}, of which rows are gathered, must hold one table")
    for name in module.sliced:
        if tensors[name][0].blocks is None:
            raise WrongError(f"{where}.sliced names {name!r}, of whose shard no rows are gathered")
    for name in module.pinned:
        if shards[name].blocks is not None:
            raise WrongError(f"{where}.pinned names {name!r}, of which rows are gathered")
    placed = {name for part in module.parts for name in part.shards}.union(module.pinned)
    for name in module.buffers:
        if tensors[name][0].name in placed:
            raise WrongError(f"{where}.buffers names {name!r}, which is in a part")


def _check_graphs(manifest: Manifest) -> None:
    """Raise WrongError unless all kernels have graphs or none has, and exits have their kernel."""
    kernels, graphs = manifest.program.kernels, manifest.graphs
    for name, graph in graphs.items():
        if graph.bytes > MAX_GRAPH_BYTES:
            raise WrongError(f"graphs.{name} of {graph.bytes} bytes is larger than {MAX_GRAPH_BYTES}")
    needed = {step.kernel for step in manifest.program.steps()}
    if manifest.exits is not None:
        if p.EXIT_KERNEL not in kernels:
            raise WrongError(f"exits need the kernel {p.EXIT_KERNEL!r}")
        needed.add(p.EXIT_KERNEL)
    lost = [name for name in sorted(needed - set(graphs)) if kernels[name].template not in TEMPLATES_WITHOUT_GRAPH]
    if graphs and lost:
        raise WrongError(f"kernels {lost} have no graph")
