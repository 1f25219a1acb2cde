"""The verb divide: a model folder becomes a store. At most a few megabytes of tensor data are held at any time, and
the source is never touched.

By names it does not run the model; that the store gives the same answers is shown by the tests, tensor by tensor and
logit by logit. By a run (`modules.py`) the division proves that itself."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from offramp import __version__
from offramp.checkpoints.families import FAMILIES
from offramp.checkpoints.hub import resolve
from offramp.checkpoints.source import Source, open_source
from offramp.division.names.kernels import IR, OPSET, build_graphs
from offramp.division.names.plan import Division, ShardPlan, plan_division
from offramp.errors import MissingExtraError, SourceError, UsageError
from offramp.store import Encoder, Shard, Store, StoreWriter
from offramp.store import manifest as m
from offramp.store.exits import exit_tensors, parse_exits, read_exits
from offramp.store.files import make_folder, write_atomic
from offramp.store.safetensors import num_bytes, read_header

METHODS = ("auto", "names", "eager", "export")
INDEX = "model.safetensors.index.json"
CHUNK_BYTES = 2 << 20
"""Of the source at a time; while it is widened, 3.5 times as much is held."""


def divide(
    model: Any,
    *rest: Any,
    method: str = "auto",
    stage_bytes: int | None = None,
    inputs: Mapping[str, Any] | None = None,
    more_inputs: Sequence[Any] = (),
    exits: str | os.PathLike | None = None,
    force: bool = False,
    offline: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> Path:
    """Divide a model into a store: `divide(folder, store)`, or `divide(module, example_inputs, store)`.

    Args:
        model: a Hugging Face checkpoint folder, an id on the hub, or any `torch.nn.Module` in evaluation mode.
        rest: of a module, what it is called with (a tensor, a tuple, or a dictionary); then the folder to make. An
            interrupted division is resumed.
        method: `names`: by the names of the tensors, without PyTorch, for encoders of texts of the BERT family;
            `eager`: by a run, for any model that transformers has, which then runs by its own code in `stream`;
            `export`: the same, and its stages become graphs, which run without that code, and where exits can stand;
            `auto`: names where that can be, else eager, and graphs too of what classifies, if it can be exported.
        stage_bytes: the most that a stage should need, for a division by a run; as much as a block of it if None.
        inputs: example inputs by name, for a folder that is divided by a run; made up from its config if None.
        more_inputs: of a module, further examples to prove the division with.
        exits: of a module, the run folder that `training.train_exits` left for it; a checkpoint folder has its own.
        force: replace an existing store.
        offline: take hub models from the cache alone.
        say: is told of each shard, and of what the user should know (widening, missing graphs).

    Raises SourceError, StageError, PickleError, UsageError (target exists), DiskFullError, MissingExtraError.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, not {method!r}")
    if not isinstance(model, (str, os.PathLike)):
        from offramp.division.modules import divide_module

        example, store = rest
        _refuse_existing(Path(store), force)
        return divide_module(
            model,
            example,
            Path(store),
            more_inputs=more_inputs,
            exits=None if exits is None else Path(exits),
            stage_bytes=stage_bytes,
            method=method,
            force=force,
            say=say,
        )
    (store,) = rest
    if exits is not None:
        raise UsageError("a checkpoint folder has its exits beside its weights", exits, "divide that folder")
    _refuse_existing(Path(store), force)
    folder = resolve(str(model), offline)
    _refuse_itself(folder, Path(store))
    if method in ("eager", "export") or (method == "auto" and not _has_known_names(folder)):
        why = "asked for" if method != "auto" else "no text classifier of the BERT family, so a run tells its stages"
        say(f"method {'eager' if method == 'auto' else method}: {why}")
        from offramp.division.checkpoints import divide_checkpoint

        return divide_checkpoint(
            folder,
            Path(store),
            example_inputs=inputs,
            stage_bytes=stage_bytes,
            method=method,
            force=force,
            say=say,
        )
    if stage_bytes is not None or inputs is not None:
        raise UsageError("stage sizes and example inputs are for a division by a run", folder, "give --method eager")
    say("method names: an encoder of texts whose tensors have known names")
    with open_source(folder) as source:
        division = plan_division(source.config, source.entries, source.folder)
        fingerprint = source.fingerprint()
        with StoreWriter(Path(store), f"{fingerprint} offramp {__version__} format {m.FORMAT}", force=force) as writer:
            return _build(source, division, fingerprint, writer, say)


def _has_known_names(folder: Path) -> bool:
    """Whether the model is of a family whose names are known, and of a class that ends in a classification head or in
    none.
    """
    with open_source(folder) as source:
        if source.config.get("model_type") not in FAMILIES:
            return False
        try:
            architecture = FAMILIES[source.config["model_type"]].architecture(source.config)
        except SourceError:
            return False
        return architecture.endswith(("Model", "ForSequenceClassification"))


def add_graphs(store: str | os.PathLike) -> Path:
    """Write the graphs of a store that was divided without onnx.

    Raises MissingExtraError without onnx, StoreError, DiskFullError.
    """
    with Store(store, verify="never") as opened:
        manifest = opened.manifest
        exits = read_exits(opened)
        graphs = _graphs(manifest.encoder, None if exits is None else exits.form)
        make_folder(opened.path / "graphs")
        files = {kind: write_atomic(opened.path / "graphs" / f"{kind}.onnx", [data]) for kind, data in graphs.items()}
        tree = {
            kind: m.Graph(f"graphs/{kind}.onnx", file.bytes, file.sha256, OPSET, IR) for kind, file in files.items()
        }
        write_atomic(opened.path / m.FILE_NAME, [m.dumps(dataclasses.replace(manifest, graphs=tree))])
    return Path(store)


def _refuse_existing(store: Path, force: bool) -> None:
    """Before anything is read or hashed; the writer asks again, under its lock."""
    if os.path.lexists(store) and not force:
        raise UsageError("target exists", store, "choose another name, or --force to replace it")


def _refuse_itself(folder: Path, store: Path) -> None:
    """A store is a model folder too, and --force would replace the source while it is read."""
    if store.exists() and store.samefile(folder):
        raise UsageError("model and store are the same folder", store, "choose another name for the store")


def _build(
    source: Source, division: Division, fingerprint: str, writer: StoreWriter, say: Callable[[str], None]
) -> Path:
    total = sum(num_bytes("F32", tensor.shape) for shard in division.shards for tensor in shard.tensors)
    writer.require_space(total)
    if division.widened_from is not None:
        say(f"widened from {division.widened_from} to F32")
    shards = {}
    for number, plan in enumerate(division.shards, start=1):
        shards[plan.name] = _write_shard(source, plan, writer)
        say(f"{plan.name} ({number}/{len(division.shards)})")
    files = [_config(source, division, writer), *(writer.add_copy(path.name, path) for path in source.companions())]
    files.append(writer.add_file(INDEX, _index(shards)))
    exits, form = _exits(source, division.encoder, writer)
    manifest = m.Manifest(
        m.Source(fingerprint, division.architecture, division.model_type, "names", division.widened_from),
        division.encoder,
        division.stages,
        shards,
        _write_graphs(division.encoder, form, writer, say),
        tuple(files),
        exits,
    )
    return writer.finish(manifest)


def _write_shard(source: Source, plan: ShardPlan, writer: StoreWriter) -> Shard:
    names = {tensor.canonical_name: tensor.source_name for tensor in plan.tensors}
    tensors = [(tensor.canonical_name, tensor.role, "F32", tensor.shape) for tensor in plan.tensors]

    def read(name: str) -> Iterable[bytes | memoryview]:
        dtype = source.entry(names[name])[0]
        return _widened(dtype, source.chunks(names[name], CHUNK_BYTES))

    return writer.add_shard(plan.name, tensors, read, gathered=plan.gathered)


def _widened(dtype: str, chunks: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """F16 and BF16 as F32; both are exact."""
    for chunk in chunks:
        if dtype == "F16":
            yield np.frombuffer(chunk, np.float16).astype(np.float32).data.cast("B")
        elif dtype == "BF16":  # the upper half of a float32
            yield (np.frombuffer(chunk, np.uint16).astype(np.uint32) << 16).data.cast("B")
        else:
            yield chunk


def _config(source: Source, division: Division, writer: StoreWriter) -> m.File:
    """config.json as it is, but for the dtype of a widened checkpoint: transformers would narrow it again."""
    path = source.folder / "config.json"
    if division.widened_from is None:
        return writer.add_copy(path.name, path)
    config = {**source.config, **{key: "float32" for key in ("torch_dtype", "dtype") if key in source.config}}
    return writer.add_file(path.name, (json.dumps(config, indent=2) + "\n").encode())


def _index(shards: dict[str, Shard]) -> bytes:
    """The index that transformers finds shards by."""
    weight_map = {tensor.name: shard.file for shard in shards.values() for tensor in shard.tensors}
    size = sum(tensor.num_bytes for shard in shards.values() for tensor in shard.tensors)
    tree = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    return (json.dumps(tree, indent=2) + "\n").encode()


def _exits(source: Source, encoder: Encoder, writer: StoreWriter) -> tuple[m.Exits | None, str | None]:
    found = source.exits()
    if found is None:
        return None, None
    heads, description = found
    form = parse_exits(description.read_bytes(), source.folder, SourceError).form
    _require_exits(heads, encoder, form)
    return m.Exits(writer.add_copy(heads.name, heads), writer.add_copy(description.name, description)), form


def _require_exits(heads: Path, encoder: Encoder, form: str) -> None:
    """Raise SourceError unless the file holds an exit after each layer but the last, and nothing else."""
    with heads.open("rb") as file:
        found = read_header(file.fileno(), heads.stat().st_size, heads).tensors
    wanted = {name: ("F32", shape) for name, shape in exit_tensors(encoder, form).items()}
    for name in sorted({*found, *wanted}):
        entry = (found[name].dtype, found[name].shape) if name in found else None
        if entry != wanted.get(name):
            what = f"exits do not fit the model: {name} is {entry}, not {wanted.get(name)}"
            raise SourceError(what, heads, "train the exits again")


def _write_graphs(
    encoder: Encoder, form: str | None, writer: StoreWriter, say: Callable[[str], None]
) -> dict[str, m.Graph]:
    try:
        graphs = _graphs(encoder, form)
    except MissingExtraError as error:
        say(f"no graphs written, the store runs on torch only: {error} and `offramp divide --graphs STORE` adds them")
        return {}
    files = {kind: writer.add_file(f"graphs/{kind}.onnx", data) for kind, data in graphs.items()}
    return {kind: m.Graph(file.file, file.bytes, file.sha256, OPSET, IR) for kind, file in files.items()}


def _graphs(encoder: Encoder, form: str | None) -> dict[str, bytes]:
    if importlib.util.find_spec("onnx") is None:
        raise MissingExtraError("onnx", "divide")
    return build_graphs(encoder, form)
