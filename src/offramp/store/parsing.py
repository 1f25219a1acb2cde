"""Reading a manifest: the one place that checks it.

Unknown or missing keys, types, names and sizes are refused here by name, so that the rest of the house trusts a
`Manifest`. That the bytes of the files are the promised ones is `store.reader` and `store.checking`'s matter; that the
tensors fit the computation is the backend's.
"""

from __future__ import annotations

import re
from typing import Any, Iterable, Optional, Tuple

from offramp.errors import DamagedError, VersionError
from offramp.store.manifest import (
    ACTIVATIONS,
    FILE_NAME,
    FORMAT,
    MAX_GRAPH_BYTES,
    MAX_MANIFEST_BYTES,
    PROBLEMS,
    Encoder,
    Exits,
    File,
    Graph,
    Manifest,
    Shard,
    Source,
    Stage,
    Step,
    Tensor,
    all_files,
    is_sealed,
)
from offramp.store.safetensors import ITEM_BYTES, MAX_RANK, PAGE_BYTES, strict_json

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_FILE = re.compile(r"(graphs/)?[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REMEDY = "divide the model again"


def loads(data: bytes, where: object = FILE_NAME) -> Manifest:
    """Parse and check a manifest. Raises VersionError for another format, DamagedError naming the key otherwise."""
    try:
        tree = strict_json(data)
    except ValueError as error:
        raise DamagedError(f"manifest is not JSON ({error})", where, _REMEDY) from None
    if not isinstance(tree, dict):
        raise DamagedError("manifest is not a JSON object", where, _REMEDY)
    version = tree.pop("format", None)
    if type(version) is not int or version != FORMAT:
        what = f"manifest has format {version!r}, this version reads {FORMAT}"
        raise VersionError(what, where, "use the offramp that wrote it, or divide again")
    try:
        manifest = _manifest(tree)
        _require_distinct((file.file.lower() for file in all_files(manifest)), "file")  # some file systems fold case
        _check_stages(manifest)
        _check_tables(manifest)
        _check_graphs(manifest)
    except _WrongError as error:
        raise DamagedError(f"manifest: {error}", where, _REMEDY) from None
    if not is_sealed(data):
        raise DamagedError("manifest was changed: it does not end in its own sha256", where, _REMEDY)
    return manifest


class _WrongError(Exception):
    """A value of the manifest that is not what it must be."""


def _object(tree: Any, where: str, required: str) -> dict:
    if not isinstance(tree, dict):
        raise _WrongError(f"{where} must be an object")
    missing = set(required.split()) - set(tree)
    unknown = set(tree) - set(required.split())
    if missing:
        raise _WrongError(f"{where} lacks {sorted(missing)}")
    if unknown:
        raise _WrongError(f"{where} has unknown keys {sorted(unknown)}")
    return tree


def _list(tree: Any, where: str) -> list:
    if not isinstance(tree, list):
        raise _WrongError(f"{where} must be a list")
    return tree


def _int(value: Any, where: str, low: int = 0, high: int = 1 << 53) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _WrongError(f"{where} must be an integer from {low} to {high}, not {value!r}")
    return value


def _str(value: Any, where: str, pattern: Optional[re.Pattern] = None) -> str:
    if not isinstance(value, str) or (pattern is not None and not pattern.fullmatch(value)):
        raise _WrongError(f"{where} must be a string{' like ' + pattern.pattern if pattern else ''}, not {value!r}")
    return value


def _choice(value: Any, where: str, choices: tuple) -> Any:
    if value not in choices:
        raise _WrongError(f"{where} must be one of {choices}, not {value!r}")
    return value


def _file_fields(tree: dict, where: str) -> Tuple[str, int, str]:
    return (
        _str(tree["file"], where + ".file", _FILE),
        _int(tree["bytes"], where + ".bytes"),
        _str(tree["sha256"], where + ".sha256", _SHA256),
    )


def _file(tree: Any, where: str) -> File:
    return File(*_file_fields(_object(tree, where, "file bytes sha256"), where))


def _graph(tree: Any, where: str) -> Graph:
    tree = _object(tree, where, "file bytes sha256 opset ir")
    graph = Graph(
        *_file_fields(tree, where), _int(tree["opset"], where + ".opset", 1), _int(tree["ir"], where + ".ir", 1)
    )
    if graph.bytes > MAX_GRAPH_BYTES:
        raise _WrongError(f"{where} of {graph.bytes} bytes is larger than {MAX_GRAPH_BYTES}")
    return graph


def _tensor(tree: Any, where: str) -> Tensor:
    tree = _object(tree, where, "name role dtype shape offset")
    shape = tuple(_int(extent, where + ".shape") for extent in _list(tree["shape"], where + ".shape"))
    if len(shape) > MAX_RANK:
        raise _WrongError(f"{where}.shape has {len(shape)} extents, at most {MAX_RANK} are read")
    return Tensor(
        _str(tree["name"], where + ".name"),
        _str(tree["role"], where + ".role"),
        _choice(tree["dtype"], where + ".dtype", tuple(ITEM_BYTES)),
        shape,
        _int(tree["offset"], where + ".offset"),
    )


def _shard(tree: Any, where: str) -> Shard:
    tree = _object(tree, where, "name file bytes sha256 data_start tensors blocks")
    file, size, sha256 = _file_fields(tree, where)
    shard = Shard(
        _str(tree["name"], where + ".name", _NAME),
        file,
        size,
        sha256,
        _int(tree["data_start"], where + ".data_start", PAGE_BYTES, min(size, MAX_MANIFEST_BYTES)),
        tuple(
            _tensor(tensor, f"{where}.tensors[{i}]")
            for i, tensor in enumerate(_list(tree["tensors"], where + ".tensors"))
        ),
        None if tree["blocks"] is None else _file(tree["blocks"], where + ".blocks"),
    )
    _check_layout(shard, where)
    return shard


def _check_layout(shard: Shard, where: str) -> None:
    if shard.data_start % PAGE_BYTES:
        raise _WrongError(f"{where}.data_start {shard.data_start} is not a multiple of {PAGE_BYTES}")
    end = 0
    for tensor in sorted(shard.tensors, key=lambda tensor: tensor.offset):
        if tensor.offset != end:
            raise _WrongError(f"{where}: tensor {tensor.name!r} begins at {tensor.offset}, not at {end}")
        end += tensor.num_bytes
    if end != shard.data_bytes:
        raise _WrongError(f"{where}: tensors take {end} bytes, the file holds {shard.data_bytes}")


def _step(tree: Any, where: str) -> Step:
    tree = _object(tree, where, "kind shards")
    shards = tuple(_str(name, where + ".shards", _NAME) for name in _list(tree["shards"], where + ".shards"))
    return Step(_str(tree["kind"], where + ".kind", _NAME), shards)


def _stage(tree: Any, where: str) -> Stage:
    tree = _object(tree, where, "name role steps")
    steps = tuple(_step(step, f"{where}.steps[{i}]") for i, step in enumerate(_list(tree["steps"], where + ".steps")))
    role = _choice(tree["role"], where + ".role", ("embedding", "layer", "head"))
    return Stage(_str(tree["name"], where + ".name", _NAME), role, steps)


def _source(tree: Any) -> Source:
    tree = _object(tree, "source", "fingerprint architecture model_type method widened_from")
    widened = tree["widened_from"]
    return Source(
        _str(tree["fingerprint"], "source.fingerprint", _SHA256),
        _str(tree["architecture"], "source.architecture"),
        _str(tree["model_type"], "source.model_type"),
        _str(tree["method"], "source.method"),
        None if widened is None else _choice(widened, "source.widened_from", tuple(ITEM_BYTES)),
    )


def _encoder(tree: Any) -> Encoder:
    sizes = "hidden_size embedding_size num_layers num_heads intermediate_size vocab_size max_length"
    counts = "position_offset num_token_types pad_token"
    tree = _object(tree, "encoder", f"{sizes} {counts} activation norm_epsilon head_activation problem labels")
    numbers = {key: _int(tree[key], "encoder." + key, 1, 1 << 40) for key in sizes.split()}
    numbers.update({key: _int(tree[key], "encoder." + key, 0, 1 << 40) for key in counts.split()})
    epsilon = tree["norm_epsilon"]
    if not isinstance(epsilon, float) or not 0 <= epsilon < 1:
        raise _WrongError(f"encoder.norm_epsilon must be a small number, not {epsilon!r}")
    if numbers["hidden_size"] % numbers["num_heads"]:
        raise _WrongError(
            f"encoder: hidden_size {numbers['hidden_size']} is not a multiple of num_heads {numbers['num_heads']}"
        )
    head, problem, labels = tree["head_activation"], tree["problem"], _list(tree["labels"], "encoder.labels")
    if not (head is None) == (problem is None) == (not labels):
        raise _WrongError("encoder: head_activation, problem and labels go together")
    if problem == "regression" and len(labels) != 1:
        raise _WrongError(f"encoder: a regression has one label, not {len(labels)}")
    return Encoder(
        activation=_choice(tree["activation"], "encoder.activation", ACTIVATIONS),
        norm_epsilon=epsilon,
        head_activation=None if head is None else _choice(head, "encoder.head_activation", ACTIVATIONS),
        problem=None if problem is None else _choice(problem, "encoder.problem", PROBLEMS),
        labels=tuple(_str(label, "encoder.labels") for label in labels),
        **numbers,
    )


def _manifest(tree: dict) -> Manifest:
    tree = _object(tree, "manifest", "source encoder stages shards graphs files exits proof sha256")
    shards = [_shard(shard, f"shards[{i}]") for i, shard in enumerate(_list(tree["shards"], "shards"))]
    _require_distinct((shard.name for shard in shards), "shard")
    _require_distinct((tensor.name for shard in shards for tensor in shard.tensors), "tensor")
    graphs = tree["graphs"]
    if not isinstance(graphs, dict):
        raise _WrongError("graphs must be an object")
    exits = tree["exits"]
    if exits is not None:
        exits = _object(exits, "exits", "heads description")
        exits = Exits(_file(exits["heads"], "exits.heads"), _file(exits["description"], "exits.description"))
    if tree["proof"] is not None and not isinstance(tree["proof"], dict):
        raise _WrongError("proof must be an object or null")
    return Manifest(
        _source(tree["source"]),
        _encoder(tree["encoder"]),
        tuple(_stage(stage, f"stages[{i}]") for i, stage in enumerate(_list(tree["stages"], "stages"))),
        {shard.name: shard for shard in shards},
        {_str(kind, "graphs", _NAME): _graph(graph, "graphs." + kind) for kind, graph in graphs.items()},
        tuple(_file(file, f"files[{i}]") for i, file in enumerate(_list(tree["files"], "files"))),
        exits,
        tree["proof"],
    )


def _require_distinct(names: Iterable[str], what: str) -> None:
    seen = set()
    for name in names:
        if name in seen:
            raise _WrongError(f"{what} {name!r} is listed twice")
        seen.add(name)


def _check_stages(manifest: Manifest) -> None:
    """One embedding that gathers from one shard, the layers, and a head if the encoder has one."""
    stages, num_layers = manifest.stages, manifest.encoder.num_layers
    if len(manifest.layers) != num_layers:
        raise _WrongError(f"{len(manifest.layers)} layers are listed, the encoder has {num_layers}")
    head = ["head"] if manifest.encoder.problem is not None else []
    if [stage.role for stage in stages] != ["embedding", *["layer"] * num_layers, *head]:
        raise _WrongError(f"stages must be an embedding, the layers and {'a' if head else 'no'} head, in this order")
    _require_distinct((stage.name for stage in stages), "stage")
    for stage in stages:
        _check_steps(stage, manifest)


def _check_steps(stage: Stage, manifest: Manifest) -> None:
    names = [name for step in stage.steps for name in step.shards]
    for name in names:
        if name not in manifest.shards:
            raise _WrongError(f"stage {stage.name!r} needs shard {name!r}, which is not listed")
    for step in stage.steps:
        roles = [tensor.role for name in step.shards for tensor in manifest.shards[name].tensors]
        if len(set(roles)) != len(roles):
            raise _WrongError(f"stage {stage.name!r}, step {step.kind!r}: two tensors have one role")
    num_gathered = sum(manifest.shards[name].blocks is not None for name in names)
    if stage.role == "embedding" and (len(stage.steps), num_gathered) != (1, 1):
        raise _WrongError(f"stage {stage.name!r} must be one step that gathers rows from one shard")
    if stage.role != "embedding" and (not stage.steps or num_gathered):
        raise _WrongError(f"stage {stage.name!r} must have steps, and gather no rows")


def _check_tables(manifest: Manifest) -> None:
    """The tables that rows are gathered from have a row for everything that may be asked for."""
    encoder, width = manifest.encoder, manifest.encoder.embedding_size
    expected = {"word": encoder.vocab_size, "position": encoder.max_length + encoder.position_offset}
    if encoder.num_token_types:
        expected["type"] = encoder.num_token_types
    for shard in manifest.shards.values():
        found = {tensor.role: (tensor.dtype, tensor.shape) for tensor in shard.tensors}
        if shard.blocks is not None and found != {role: ("F32", (rows, width)) for role, rows in expected.items()}:
            raise _WrongError(f"shard {shard.name!r} must hold the tables of the encoder, not {found}")


def _check_graphs(manifest: Manifest) -> None:
    """None, or one for each kind, and one named `exit` where there are exits."""
    needed = {step.kind for stage in manifest.stages for step in stage.steps}
    if manifest.exits is not None:
        needed.add("exit")
    if manifest.graphs and needed - set(manifest.graphs):
        raise _WrongError(f"kinds {sorted(needed - set(manifest.graphs))} have no graph")
