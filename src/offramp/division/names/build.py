"""Build the store of a text encoder by the names of its tensors, without running the model.

A few megabytes of tensor data are held at a time. Tests compare the store with its source tensor by tensor and logit by
logit.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from offramp.checkpoints.source import Source
from offramp.division.config import DivisionConfig, identity
from offramp.division.names.kernels import IR, OPSET, build_graphs
from offramp.division.names.plan import Division, ShardPlan, plan_division
from offramp.errors import MissingExtraError, SourceError
from offramp.program.heads import HeadForm
from offramp.program.program import Program
from offramp.store import Shard, StoreWriter
from offramp.store import manifest as m
from offramp.store.exits import exit_tensors, parse_exits
from offramp.store.safetensors import num_bytes, read_header

INDEX = "model.safetensors.index.json"
CHUNK_BYTES = 2 << 20
"""Bytes of the source that are read at a time; while they are converted to F32, 3.5 times as much is held."""


def divide_by_names(source: Source, store: Path, config: DivisionConfig) -> Path:
    """Divide a checkpoint of a BERT-like text encoder. Raises SourceError, UsageError, DiskFullError."""
    division = plan_division(source.config, source.entries, source.folder)
    fingerprint, say = source.fingerprint(), config.say
    with StoreWriter(store, identity(fingerprint), force=config.force) as writer:
        writer.require_space(sum(num_bytes("F32", t.shape) for shard in division.shards for t in shard.tensors))
        if division.widened_from is not None:
            say(f"converted from {division.widened_from} to F32")
        shards = {}
        for number, plan in enumerate(division.shards, start=1):
            shards[plan.name] = _write_shard(source, plan, writer)
            say(f"{plan.name} ({number}/{len(division.shards)})")
        files = [_config(source, division, writer), *(writer.add_copy(path.name, path) for path in source.companions())]
        files.append(writer.add_file(INDEX, _index(shards)))
        exits, form = _exits(source, division.program, writer)
        manifest = m.Manifest(
            m.Source(fingerprint, division.architecture, division.model_type, "names", division.widened_from),
            division.program,
            shards,
            _write_graphs(division.program, form, writer, say),
            tuple(files),
            exits,
            labels=writer.add_labels(division.labels),
        )
        return writer.finish(manifest)


def encoder_graphs(program: Program, form: HeadForm | None) -> dict[str, bytes]:
    """Return the ONNX graph of each kernel. Raises MissingExtraError without onnx."""
    if importlib.util.find_spec("onnx") is None:
        raise MissingExtraError("onnx", "divide")
    return build_graphs(program, form)


def _write_shard(source: Source, plan: ShardPlan, writer: StoreWriter) -> Shard:
    names = {tensor.canonical_name: tensor.source_name for tensor in plan.tensors}
    tensors = [(tensor.canonical_name, tensor.role, "F32", tensor.shape) for tensor in plan.tensors]

    def read(name: str) -> Iterable[bytes | memoryview]:
        dtype = source.entries[names[name]][0]
        return _upcast(dtype, source.chunks(names[name], CHUNK_BYTES))

    return writer.add_shard(plan.name, tensors, read, gathered=plan.gathered)


def _upcast(dtype: str, chunks: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """Yield data of F16 and BF16 as F32, which is exact, and other data unchanged."""
    for chunk in chunks:
        if dtype == "F16":
            yield np.frombuffer(chunk, np.float16).astype(np.float32).data.cast("B")
        elif dtype == "BF16":  # the upper half of a float32
            yield (np.frombuffer(chunk, np.uint16).astype(np.uint32) << 16).data.cast("B")
        else:
            yield chunk


def _config(source: Source, division: Division, writer: StoreWriter) -> m.File:
    """Write config.json, with the dtype of a converted checkpoint replaced: transformers would convert it back."""
    path = source.folder / "config.json"
    if division.widened_from is None:
        return writer.add_copy(path.name, path)
    config = {**source.config, **{key: "float32" for key in ("torch_dtype", "dtype") if key in source.config}}
    return writer.add_file(path.name, (json.dumps(config, indent=2) + "\n").encode())


def _index(shards: Mapping[str, Shard]) -> bytes:
    """Return the index by which transformers finds the shard of each tensor."""
    weight_map = {tensor.name: shard.file for shard in shards.values() for tensor in shard.tensors}
    size = sum(tensor.num_bytes for shard in shards.values() for tensor in shard.tensors)
    tree = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(tree, indent=2) + "\n").encode()


def _exits(source: Source, program: Program, writer: StoreWriter) -> tuple[m.Exits | None, HeadForm | None]:
    found = source.exits()
    if found is None:
        return None, None
    heads, description = found
    form = parse_exits(description.read_bytes(), source.folder, SourceError).form
    _require_exits(heads, program, form)
    return writer.add_exits(heads, description), form


def _require_exits(heads: Path, program: Program, form: HeadForm) -> None:
    """Raise SourceError unless the file holds an exit after each layer but the last, and nothing else."""
    with heads.open("rb") as file:
        found = read_header(file.fileno(), heads.stat().st_size, heads).tensors
    wanted = {name: ("F32", shape) for name, shape in exit_tensors(program, form).items()}
    for name in sorted({*found, *wanted}):
        entry = (found[name].dtype, found[name].shape) if name in found else None
        if entry != wanted.get(name):
            what = f"exits do not fit the model: {name} is {entry}, not {wanted.get(name)}"
            raise SourceError(what, heads, "train the exits again")


def _write_graphs(
    program: Program, form: HeadForm | None, writer: StoreWriter, say: Callable[[str], None]
) -> dict[str, m.Graph]:
    try:
        graphs = encoder_graphs(program, form)
    except MissingExtraError as error:
        say(f"no graphs written, the store runs on torch only: {error} and `offramp divide --graphs STORE` adds them")
        return {}
    return {kernel: writer.add_graph(kernel, data, OPSET, IR) for kernel, data in graphs.items()}
