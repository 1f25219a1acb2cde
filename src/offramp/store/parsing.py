"""Manifests read from bytes: the one place that checks them, alone and as parts that must fit together.

Unknown or missing keys, types, names and sizes are refused here by name, so that every caller can rely on a `Manifest`.
Files are compared with their digests by `store.reader` and `store.checking`.
"""

from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple

from offramp.errors import DamagedError, VersionError
from offramp.program import program as p
from offramp.program.checks import WrongError, int_of, read, require_distinct, require_listed, strict_json
from offramp.program.consistency import check_program
from offramp.program.dtypes import FLOAT, HALF
from offramp.program.encoder import misfit
from offramp.program.program import Program
from offramp.store import manifest as m
from offramp.store.repeats import expand
from offramp.store.safetensors import PAGE_BYTES, require_contiguous

_REMEDY = "divide the model again"


@dataclass(frozen=True)
class _ProgramManifest(m.Common):
    program: Any
    proof: Optional[m.Proof]
    labels: Optional[m.File]


def loads(data: bytes, where: object = m.FILE_NAME) -> m.Manifest:
    """Return the checked manifest of format 1, 2 or 3.

    Raises VersionError for another format, DamagedError naming the key for anything else that is wrong.
    """
    try:
        tree = strict_json(data)
    except ValueError as error:
        raise DamagedError(f"manifest is not JSON ({error})", where, _REMEDY) from None
    if not isinstance(tree, dict):
        raise DamagedError("manifest is not a JSON object", where, _REMEDY)
    version = tree.pop("format", None)
    if type(version) is not int or version not in m.FORMATS:
        what = f"manifest has format {version!r}, this version reads {', '.join(map(str, m.FORMATS))}"
        raise VersionError(what, where, "use the offramp that wrote it, or divide again")
    try:
        manifest = _manifest(tree) if version == m.FORMAT else _old_manifest(tree, version)
        check_program(manifest.program)
        _check_manifest(manifest)
    except WrongError as error:
        raise DamagedError(f"manifest: {error}", where, _REMEDY) from None
    if not m.is_sealed(data):
        raise DamagedError("manifest was changed: it does not end in its own sha256", where, _REMEDY)
    return manifest


def parse_labels(data: bytes, num_labels: int, where: object) -> Tuple[str, ...]:
    """Return the labels of `labels.json`. Raises DamagedError unless it is a list of `num_labels` strings."""
    try:
        labels = read(Tuple[str, ...], strict_json(data), "labels")
        if len(labels) != num_labels:
            raise WrongError(f"{len(labels)} labels, the output has {num_labels}")
    except ValueError as error:
        raise DamagedError(f"labels: {error}", where, _REMEDY) from None
    return labels


def _manifest(tree: Dict[str, Any]) -> m.Manifest:
    found = read(_ProgramManifest, tree, "")
    program = read(Program, expand(found.program, "program"), "program")
    return found.manifest(program, found.proof, found.labels)


def _old_manifest(tree: Dict[str, Any], version: int) -> m.Manifest:
    from offramp.store.lifting import lift  # imported for old stores only: its dataclasses make start-up slower

    return lift(tree, version)


def _check_manifest(manifest: m.Manifest) -> None:
    """Raise WrongError naming the first part that does not fit the others."""
    program, shards = manifest.program, manifest.shards
    require_distinct((tensor.name for shard in shards.values() for tensor in shard.tensors), "tensor")
    require_distinct((file.file.lower() for file in m.all_files(manifest)), "file")  # some file systems fold case
    for index, shard in enumerate(shards.values()):
        _check_shard(shard, f"shards[{index}]")
    for index, stage in enumerate(program.stages):
        for number, step in enumerate(stage.steps):
            _check_step(step, manifest, f"program.stages[{index}].steps[{number}]")
    for name, lookup in program.lookups.items():
        _check_look_up(lookup, f"program.lookups.{name}", program.texts, manifest)
    if program.module is not None:
        _check_module(program.module, manifest)
    if manifest.exits is not None and manifest.exits.description.bytes > m.MAX_EXITS_BYTES:
        raise WrongError(f"exits.description of more than {m.MAX_EXITS_BYTES} bytes")
    if manifest.labels is not None and manifest.labels.bytes > m.MAX_LABELS_BYTES:
        raise WrongError(f"labels of more than {m.MAX_LABELS_BYTES} bytes")
    for name in manifest.upcast:
        if manifest.tensors()[name][1].offset % 2:
            raise WrongError(f"tensor {name!r} of {HALF} begins at an odd byte")
    wrong = misfit(program, {name: (tensor.dtype, tensor.shape) for name, (_, tensor) in manifest.taken.items()})
    if wrong is not None:
        raise WrongError(wrong)
    _check_graphs(manifest)
    num_labels = 0 if program.output is None else program.output.num_labels
    if (manifest.labels is not None) + bool(manifest.inline_labels) != bool(num_labels):
        raise WrongError(f"labels: the output has {num_labels}")


def _check_shard(shard: m.Shard, where: str) -> None:
    """Raise WrongError unless tensors fill the file, and rows are gathered from tables with distinct roles."""
    int_of(shard.data_start, f"{where}.data_start", PAGE_BYTES, min(shard.bytes, m.MAX_MANIFEST_BYTES))
    if shard.data_start % PAGE_BYTES:
        raise WrongError(f"{where}.data_start {shard.data_start} is not a multiple of {PAGE_BYTES}")
    tensors = ((tensor.offset, tensor.num_bytes, tensor.name) for tensor in shard.tensors)
    require_contiguous(tensors, shard.data_bytes, f"{where}: ")
    if shard.blocks is None:
        return
    if not shard.tensors or any(len(tensor.shape) != 2 or 0 in tensor.shape for tensor in shard.tensors):
        raise WrongError(f"shard {shard.name!r}, of which rows are gathered, must hold tables")
    require_distinct((tensor.role for tensor in shard.tensors), f"shard {shard.name!r}: role")


def _check_step(step: p.Step, manifest: m.Manifest, where: str) -> None:
    require_listed(step.shards, manifest.shards, f"{where} needs the shard")
    require_listed((*step.weights.values(), *step.constants.values()), manifest.tensors(), f"{where} takes the tensor")
    taken = {manifest.tensors()[name][0].name: name for name in step.weights.values()}
    for shard, name in taken.items():
        if shard not in step.shards:
            raise WrongError(f"{where} takes {name!r}, which is not in its shards")
    for shard in step.shards:
        if shard not in taken:
            raise WrongError(f"{where} needs the shard {shard!r}, of which it takes nothing")


def _check_look_up(lookup: p.LookUp, where: str, texts: Optional[p.Texts], manifest: m.Manifest) -> None:
    """Raise WrongError unless the table is gathered, of floats, and has a row for every id that may occur."""
    require_listed([lookup.table], manifest.tensors(), f"{where} takes the tensor")
    shard, table = manifest.tensors()[lookup.table]
    if shard.blocks is None:
        raise WrongError(f"{where} takes {lookup.table!r}, of whose shard no rows are gathered")
    if table.dtype not in (FLOAT, HALF) or lookup.value.axes[-1] != table.shape[1]:
        raise WrongError(f"{where} is {lookup.value}, the rows of its table are {table.dtype} [{table.shape[1]}]")
    if texts is None:
        return
    needed = {p.INPUT_IDS: texts.vocab_size, p.TOKEN_TYPE_IDS: texts.num_token_types}
    needed[p.POSITION_IDS] = texts.max_length + texts.position_offset
    height, least = table.shape[0], needed.get(lookup.input, 0)
    if height < least:
        raise WrongError(f"{where}: {lookup.table!r} has {height} rows, {lookup.input} names {least}")


def _check_module(module: p.Module, manifest: m.Manifest) -> None:
    """Raise WrongError unless the names of a module are known and its shards are of the kinds that they must be."""
    where, shards, tensors = "program.module", manifest.shards, manifest.tensors()
    for index, part in enumerate(module.parts):
        require_listed(part.shards, shards, f"{where}.parts[{index}] needs the shard")
    require_listed(module.pinned, shards, f"{where}.pinned names the shard")
    for key in ("aliases", "buffers", "sliced", "unused"):
        require_listed(getattr(module, key), tensors, f"{where}.{key} names the tensor")
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


def _check_graphs(manifest: m.Manifest) -> None:
    """Raise WrongError unless all captured kernels have graphs or none has, and exits have their kernel."""
    kernels, graphs = manifest.program.kernels, manifest.graphs
    for name, graph in graphs.items():
        if graph.bytes > m.MAX_GRAPH_BYTES:
            raise WrongError(f"graphs.{name} of {graph.bytes} bytes is larger than {m.MAX_GRAPH_BYTES}")
    if manifest.exits is not None and p.EXIT_KERNEL not in kernels:
        raise WrongError(f"exits need the kernel {p.EXIT_KERNEL!r}")
    needed = {step.kernel for step in manifest.program.steps() if kernels[step.kernel].template == p.CAPTURED}
    lost = sorted(needed - set(graphs))
    if graphs and lost:
        raise WrongError(f"kernels {lost} have no graph")
