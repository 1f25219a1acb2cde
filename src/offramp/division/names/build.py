"""Build the store of a text encoder by the names of its tensors, without running the model.

The plan, that is the shard, name and role of each tensor and the program that takes them, is decided from the config
and from the names, dtypes and shapes of the tensors. A family is assumed to compute what its table says. A few
megabytes of tensor data are held at a time. Tests compare the store with its source tensor by tensor and logit by
logit.
"""

import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from offramp.checkpoints.downloads import store_downloads
from offramp.checkpoints.families import Family, family_of, shown
from offramp.checkpoints.source import Source
from offramp.checkpoints.tokenizing import store_tokenizer
from offramp.checkpoints.weights import Rows, open_file, read_small
from offramp.division.config import DivisionConfig
from offramp.division.messages import adapter_tensors, advice, listed
from offramp.division.names.narrow import (
    MARK,
    Quantised,
    exact_inputs,
    floats,
    matrix_of,
    quantise,
    stored,
    stored_name,
)
from offramp.errors import SourceError, UsageError
from offramp.program import encoder as encoders
from offramp.program.blocks import cut_program
from offramp.program.consistency import MAX_STEPS
from offramp.program.dtypes import ALIGNMENT_BYTES, DTYPES, FLOAT, HALF
from offramp.program.narrow import DEFAULTS, EXACT, INTEGER, LARGEST_WEIGHT, ROTATED, ROTATION, SUFFIX, option
from offramp.program.program import BEGIN, END, LAYER, Kernel, Program
from offramp.store import Shard, Store, StoreWriter
from offramp.store import manifest as m
from offramp.store.checking import require_whole
from offramp.store.exits import exit_tensors, parse_exits
from offramp.store.manifest import FP16, FP32, INT8
from offramp.store.reader import is_store
from offramp.store.safetensors import num_bytes, read_header
from offramp.units import format_size, named_size

Entry = tuple[str, tuple[int, ...]]
"""Dtype, as safetensors spells it, and shape."""
ROWS = "embedding-rows"
"""The shard of embedding tables, from which rows are gathered."""
INDEX = "model.safetensors.index.json"
CHUNK_BYTES = 2 << 20
"""Bytes of the source that are read at a time; while they are converted to F32, 3.5 times as much is held."""
FLOATS = (*(dtype.name for dtype in DTYPES.values() if dtype.upcasts), "F64")
"""Dtypes that are stored as F32; of these, only F64 is rounded, as in transformers."""
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
"""Endings of constants that old versions of transformers saved."""
_ROUNDED = {FP16: f"to {HALF}", INT8: f"to integers from {-LARGEST_WEIGHT} to {LARGEST_WEIGHT}, and rows to {HALF}"}
"""Dtype of a store -> how its matrices are rounded."""
_NUMBER = re.compile(r"\.\d+\.")


class PlannedTensor(NamedTuple):
    """One tensor: its name in the source and in the store, its name in the computation, its shape, and its dtype in the
    store.
    """

    source_name: str
    """Name in the source; empty where the source has no such tensor, which is refused."""
    canonical_name: str
    role: str
    shape: tuple[int, ...]
    dtype: str = FLOAT
    rows: Rows = None
    """Rows of the tensor of the source that it holds."""


@dataclass(frozen=True)
class ShardPlan:
    """One shard, its tensors in the order of the file."""

    name: str
    tensors: tuple[PlannedTensor, ...]
    gathered: bool = False
    """Rows of its tensors are fetched singly."""


@dataclass(frozen=True)
class Division:
    """Plan of a store. The shard `other`, if there is one, belongs to no stage: it only keeps the checkpoint whole."""

    program: Program
    labels: tuple[str, ...]
    architecture: str
    model_type: str
    shards: tuple[ShardPlan, ...]
    widened_from: str | None
    """The first other dtype among the tensors of the source; None if all of them are F32."""
    left_out: tuple[str, ...]
    """Tensors of the source that the model does not have, and that transformers ignores."""
    block_bytes: int | None = None
    """Size of the blocks into which tensors are cut; None: all tensors are whole."""


def divide_by_names(source: Source, store: Path, config: DivisionConfig) -> Path:
    """Divide a checkpoint of a BERT-like text encoder. Raises SourceError, UsageError, DiskFullError."""
    division = plan_division(source.config, source.entries, source.folder, config.dtype)
    if config.block_bytes is not None:
        division = cut_division(division, config.block_bytes, config.say)
    program, say = division.program, config.say
    read = source.fingerprint()
    fingerprint = _undivided(source.folder) or read if config.dtype != FP32 else read
    with config.writer(store, read if read == fingerprint else f"{read} {fingerprint}") as writer:
        writer.require_space(sum(num_bytes(t.dtype, t.shape) for shard in division.shards for t in shard.tensors))
        if config.dtype == FP32 and division.widened_from is not None:
            say(f"converted from {division.widened_from} to {FLOAT}")
        if config.dtype != FP32:
            say(f"matrices of the layers and rows of embedding tables are rounded: {_ROUNDED[config.dtype]}")
        if division.left_out:
            names = listed([shown(name) for name in division.left_out])
            say(f"{len(division.left_out)} tensors left out, which a {division.architecture} does not have: {names}")
        shards = {}
        kernels = {shard: program.kernels[step.kernel] for step in program.steps() for shard in step.shards}

        @lru_cache(maxsize=1)  # blocks of one matrix are written one after another
        def exact_of(found: str, number: int) -> np.ndarray:
            return exact_inputs(_chunks(source, found), source.entries[found][1][1], number)

        for number, plan in enumerate(division.shards, start=1):
            shards[plan.name] = _write_shard(source, plan, writer, config.dtype, kernels.get(plan.name), exact_of)
            say(f"{plan.name} ({number}/{len(division.shards)})")
        files = [
            _config(source, division, writer, config.dtype),
            *(writer.add_copy(path.name, path) for path in source.companions()),
        ]
        files += [*store_tokenizer(source.folder, writer, say), *store_downloads(source.folder, writer)]
        is_checkpoint = config.dtype != INT8 and division.block_bytes is None
        files += [writer.add_file(INDEX, _index(shards))] if is_checkpoint else []
        exits = _exits(source, program, writer)
        made_from = m.Source(fingerprint, division.architecture, division.model_type, m.NAMES, division.widened_from)
        labels = writer.add_labels(division.labels)
        return writer.finish(m.Manifest(made_from, program, shards, {}, tuple(files), exits, labels=labels))


def _undivided(folder: Path) -> str | None:
    """Return the fingerprint of the model that an fp32 store was divided from, after a check of all its files.

    A policy or transcript of that model is known to be of the new store then.
    """
    if not is_store(folder):
        return None
    with Store(folder) as store:
        require_whole(store)
        return store.manifest.source.fingerprint if store.manifest.precision == FP32 else None


def plan_division(
    config: Mapping[str, Any], entries: Mapping[str, Entry], where: object = None, dtype: str = FP32
) -> Division:
    """Plan the division of a model with this `config.json` and these tensors, name -> (dtype, shape).

    `dtype`: that of the matrices of layers in the store, one of `STORED`.

    Raises SourceError for an unknown architecture or setting, and for tensors that are missing, mis-shaped, of layers
    that the config does not have, or of a dtype that is not among `FLOATS`, by name; `where` is where they are.
    """
    family = family_of(config)
    encoder = family.encoder(config)
    base = family.base if any(name.startswith(family.base) for name in entries) else ""
    expected = {tensor.canonical_name: tensor.shape for tensor in chain(*_wanted(family, encoder, base, {}).values())}
    sources = _canonical_names(entries, family.base, expected, where)
    found = {name: entries[source][1] for name, source in sources.items()}
    _require_class(family, config, found)
    passed_through = family.passed_through(base, family.has_head(config))
    extra = [name for name in sorted(found) if name not in expected]
    other = [name for name in extra if name.startswith(passed_through) and entries[sources[name]][0] in FLOATS]
    _require_fit(expected, found, [name for name in extra if name not in other], where)
    wanted = _wanted(family, encoder, base, sources, dtype)
    if dtype == INT8:
        other = []  # the store is no checkpoint that they could keep whole
    if other:
        wanted["other"] = [PlannedTensor(sources[name], name, "other", found[name]) for name in other]
    widened_from = _widened_from({sources[name]: entries[sources[name]][0] for name in (*expected, *other)}, where)
    left_out = tuple(sources[name] for name in extra if name not in other)
    shards = []
    for name, tensors in wanted.items():
        shards.append(ShardPlan(name, _aligned(tensors), gathered=name == ROWS))
    program, architecture = _program(encoder, wanted, dtype), family.architecture(config)
    return Division(program, encoder.labels, architecture, family.model_type, tuple(shards), widened_from, left_out)


def cut_division(division: Division, block_bytes: int, say: Callable[[str], None]) -> Division:
    """Return the plan of a store in which products with larger weights than a block are cut into blocks.

    Raises UsageError where a program would have too many steps.
    """
    planned = {tensor.canonical_name: tensor for shard in division.shards for tensor in shard.tensors}
    in_memory = {HALF: FLOAT}  # a slot holds what is computed with
    tensors = {name: (in_memory.get(each.dtype, each.dtype), each.shape) for name, each in planned.items()}
    program, cuts = cut_program(division.program, tensors, block_bytes)
    _require_few_steps(division.program, tensors, block_bytes)
    if not cuts:
        say(f"nothing is cut: no step takes more than {format_size(block_bytes)} of weights")
        return division
    shards = []
    for shard in division.shards:
        if shard.name not in cuts:
            shards.append(shard)
        for name, weights in cuts.get(shard.name, {}).items():
            parts = [
                planned[rows.tensor]._replace(
                    canonical_name=rows.name(tensors),
                    role=port,
                    shape=rows.shape(tensors),
                    rows=(rows.start, rows.stop),
                )
                for port, rows in weights.items()
            ]
            shards.append(ShardPlan(name, _aligned(parts)))
    say(f"cut into blocks of at most {format_size(block_bytes)}: transformers cannot load such a store")
    return replace(division, program=program, shards=tuple(shards), block_bytes=block_bytes)


def _require_few_steps(program: Program, tensors: Mapping[str, Entry], block_bytes: int) -> None:
    """Raise UsageError, naming larger blocks, where a program with blocks has more steps than are run."""
    sizes = (block_bytes << power for power in itertools.count())
    numbers = ((size, sum(1 for _ in cut_program(program, tensors, size).program.steps())) for size in sizes)
    first = next(numbers)
    if first[1] > MAX_STEPS:
        what = f"blocks of {format_size(block_bytes)} make {first[1]} steps, at most {MAX_STEPS} are run"
        enough = next(size for size, number in numbers if number <= MAX_STEPS or size > encoders.MAX_SIZE)
        raise UsageError(what, None, f"cut it into larger blocks: --block {named_size(enough)}")


def _aligned(tensors: Sequence[PlannedTensor]) -> tuple[PlannedTensor, ...]:
    """Return tensors in the order of the file: those that would misalign the next come last, else in order of use."""
    return tuple(sorted(tensors, key=lambda tensor: num_bytes(tensor.dtype, tensor.shape) % ALIGNMENT_BYTES != 0))


def _canonical_names(
    entries: Mapping[str, Entry], prefix: str, expected: Mapping[str, tuple[int, ...]], where: object
) -> dict[str, str]:
    """Return canonical name -> name in the source, without constants that old versions of transformers saved.

    Today's names replace `LayerNorm.gamma` and `.beta`, which come from TensorFlow. As in transformers, each name may
    have the prefix of the backbone or not; of two tensors that differ in it alone, the one with the exact name counts.
    """
    found: dict[str, str] = {}
    for source in entries:
        name = source
        for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
            if source.endswith(old):
                name = source.removesuffix(old) + new
        other = name.removeprefix(prefix) if name.startswith(prefix) else prefix + name
        if name not in expected and other in expected and other not in entries:
            name = other
        if name in found:
            what = f"{shown(source)} and {shown(found[name])} are the same tensor"
            raise SourceError(what, where, "get the model again")
        if not name.endswith(BUFFERS):
            found[name] = source
    return found


def _require_class(family: Family, config: Mapping[str, Any], found: Mapping[str, object]) -> None:
    """Raise SourceError where the config names no class, and there is a head that may be of several classes."""
    out = family.names("head", "")["out.weight"]
    if not config.get("architectures") and out in found:
        classes = f'"architectures": ["{family.classes[0]}ForTokenClassification"]'
        what = f"config.json names no architectures, and {shown(out)} is of a head"
        raise SourceError(what, "config.json", f"add {classes}, or the class that the head is of")


def _widened_from(dtypes: Mapping[str, str], where: object) -> str | None:
    for name, dtype in dtypes.items():
        if dtype not in FLOATS:
            remedy = f"divide a model of {', '.join(FLOATS)}, not a quantised one"
            raise SourceError(f"tensor {shown(name)} has dtype {dtype}", where, remedy)
    return next((dtype for dtype in dtypes.values() if dtype != FLOAT), None)


def _stages(encoder: encoders.Encoder) -> dict[str, list[tuple[str, str, int | None]]]:
    """Return stage -> (kernel, shard, layer) of each of its steps that take weights, in order."""
    stages: dict[str, list[tuple[str, str, int | None]]] = {"embedding": [("embedding", "embedding", None)]}
    for i in range(encoder.num_layers):
        stages[f"layer.{i}"] = [(kernel, f"layer-{i:02d}-{kernel}", i) for kernel in encoders.LAYER_KERNELS]
    if encoder.problem is not None:
        stages["head"] = [("head", "head", None)]
    return stages


def _wanted(
    family: Family, encoder: encoders.Encoder, base: str, sources: Mapping[str, str], dtype: str = FP32
) -> dict[str, list[PlannedTensor]]:
    """Return shard -> its tensors in order of use."""
    shapes, wanted = encoders.encoder_shapes(encoder, narrow=dtype == INT8), {}
    for kernel, shard, layer in ((ROWS, ROWS, None), *chain.from_iterable(_stages(encoder).values())):
        names = family.names(kernel, base, layer)
        wanted[shard] = [_planned(kernel, role, shape, names, sources, dtype) for role, shape in shapes[kernel].items()]
    return wanted


def _planned(
    kernel: str, role: str, shape: tuple[int, ...], names: Mapping[str, str], sources: Mapping[str, str], dtype: str
) -> PlannedTensor:
    """Return the plan of one tensor; integers, their scales and exact inputs come from the same matrix."""
    found = names[matrix_of(role)]
    name = stored_name(found, role) if dtype == INT8 else found
    return PlannedTensor(sources.get(found, ""), name, role, shape, _dtype_of(kernel, role, shape, dtype))


def _dtype_of(kernel: str, role: str, shape: tuple[int, ...], dtype: str) -> str:
    """Return the dtype in the store of a tensor of a kernel, where the store is one of `dtype`."""
    if dtype == INT8 and kernel in encoders.LAYER_KERNELS:
        return encoders.TEMPLATES[kernel + SUFFIX].dtype(role)
    is_narrow = kernel == ROWS or (kernel in encoders.LAYER_KERNELS and len(shape) > 1)
    return HALF if dtype != FP32 and is_narrow else FLOAT


def _program(encoder: encoders.Encoder, wanted: Mapping[str, Sequence[PlannedTensor]], dtype: str) -> Program:
    placed = []
    for stage, places in _stages(encoder).items():
        steps = []
        for kernel, shard, _ in places:
            shards = (ROWS, shard) if kernel == "embedding" else (shard,)
            tensors = {tensor.role: tensor.canonical_name for name in shards for tensor in wanted[name]}
            steps.append(encoders.PlacedStep(kernel, shards, tensors))
        role = {"embedding": BEGIN, "head": END}.get(stage, LAYER)
        placed.append(encoders.PlacedStage(stage, role, tuple(steps)))
    return encoders.encoder_program(encoder, placed, [ROWS], narrow=dtype == INT8)


def _require_fit(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    unexpected: Sequence[str],
    where: object,
) -> None:
    """Raise SourceError naming what does not fit among the tensors `found`, name -> shape.

    Unexpected tensors alone are no fault, unless they are of further layers or of an adapter.
    """
    wrong = [name for name, shape in expected.items() if found.get(name, shape) != shape]
    needed = [name for name in unexpected if _NUMBER.sub(".0.", name, count=1) in expected]
    needed += adapter_tensors(unexpected)
    if not wrong and not needed and expected.keys() <= found.keys():
        return
    complaints = {
        "missing": [f"{shown(name)} {shape}" for name, shape in expected.items() if name not in found],
        "unexpected": [f"{shown(name)} {found[name]}" for name in unexpected],
        "mis-shaped": [f"{shown(name)} {found[name]} not {expected[name]}" for name in wrong],
    }
    faults = [f"{len(names)} {what}: {listed(names)}" for what, names in complaints.items() if names]
    remedy = advice([name for name in expected if name not in found], found)
    raise SourceError(f"tensors do not fit config.json: {'; '.join(faults)}", where, remedy)


def _chunks(source: Source, found: str, rows: Rows = None) -> Iterable[np.ndarray]:
    """Return a tensor of the source, or some of its rows, as chunks of float32."""
    return floats(source.entries[found][0], source.chunks(found, CHUNK_BYTES, rows))


def _write_shard(
    source: Source,
    plan: ShardPlan,
    writer: StoreWriter,
    dtype: str,
    kernel: Kernel | None,
    exact_of: Callable[[str, int], np.ndarray],
) -> Shard:
    """Write a shard of a kernel. Raises SourceError for a tensor of a narrow store that has numbers which it cannot
    hold.

    Args:
        exact_of: function of a matrix and a number that returns its exact inputs.
    """
    planned = {tensor.canonical_name: tensor for tensor in plan.tensors}
    tensors = [(tensor.canonical_name, tensor.role, tensor.dtype, tensor.shape) for tensor in plan.tensors]

    @lru_cache(maxsize=1)  # integers, scales and exact inputs of one matrix are written one after another
    def quantised(found: str, rows: Rows, rotation: int, exact: int) -> Quantised:
        shape = source.entries[found][1]
        shape = shape if rows is None else (rows[1] - rows[0], *shape[1:])
        return quantise(found, _chunks(source, found, rows), shape, source.folder, rotation, exact_of(found, exact))

    def read(name: str) -> Iterable[bytes | memoryview]:
        tensor = planned[name]
        place, matrix = (tensor.source_name, tensor.rows), matrix_of(tensor.role)
        if kernel is not None and encoders.TEMPLATES[kernel.template].dtype(matrix) == INTEGER:
            sizes = kernel.attributes
            rotation = option(sizes, ROTATION) if matrix in ROTATED else DEFAULTS[ROTATION]
            return quantised(*place, rotation, option(sizes, EXACT)).data(tensor.role, CHUNK_BYTES)
        if dtype != FP32:
            return stored(tensor.source_name, _chunks(source, *place), tensor.dtype, source.folder)
        return (chunk_N.data.cast("B") for chunk_N in _chunks(source, *place))

    return writer.add_shard(plan.name, tensors, read, gathered=plan.gathered)


def _config(source: Source, division: Division, writer: StoreWriter, dtype: str) -> m.File:
    """Write config.json, with the dtype of a converted checkpoint replaced, and integers and blocks marked as such."""
    path = source.folder / "config.json"
    more: dict[str, Any] = {"quantization_config": MARK} if dtype == INT8 else {}
    if division.block_bytes is not None:
        more["offramp_block_bytes"] = division.block_bytes
    if division.widened_from is None and not more:
        return writer.add_copy(path.name, path)
    return writer.add_file(path.name, source.config_in_float32(**more))


def _index(shards: Mapping[str, Shard]) -> bytes:
    """Return the index by which transformers finds the shard of each tensor."""
    weight_map = {tensor.name: shard.file for shard in shards.values() for tensor in shard.tensors}
    size = sum(tensor.num_bytes for shard in shards.values() for tensor in shard.tensors)
    tree = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(tree, indent=2) + "\n").encode()


def _exits(source: Source, program: Program, writer: StoreWriter) -> m.Exits | None:
    """Copy the exits. Raises SourceError unless there is one after each layer but the last, and nothing else."""
    exits = source.exits()
    if exits is None:
        return None
    heads, description = exits
    data = read_small(description, m.MAX_EXITS_BYTES)
    form = parse_exits(data, source.folder, SourceError, len(program.layers) - 1).form
    with os.fdopen(open_file(heads), "rb") as file:
        tensors = read_header(file.fileno(), os.fstat(file.fileno()).st_size, heads).tensors
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    wanted = {name: (FLOAT, shape) for name, shape in exit_tensors(program, form).items()}
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            what = f"exits do not fit the model: {name} is {found.get(name)}, not {wanted.get(name)}"
            raise SourceError(what, heads, "train the exits again")
    return writer.add_exits(heads, description)
