"""Manifests read from bytes: the one place that checks them.

Unknown or missing keys, types, names and sizes are refused here by name, so that every caller can rely on a `Manifest`.
Files are compared with their digests by `store.reader` and `store.checking`.
"""

from __future__ import annotations

import re
from typing import Any, Dict, List, Tuple

from offramp.errors import DamagedError, VersionError
from offramp.program.checks import (
    WrongError,
    bool_of,
    choice_of,
    int_of,
    items_of,
    list_of,
    names_of,
    object_of,
    str_of,
)
from offramp.program.dtypes import DTYPES
from offramp.program.parsing import MAX_RANK, NAME, check_program, program_of, require_distinct
from offramp.store.consistency import check_manifest
from offramp.store.lifting import lift_encoder, lift_module, lift_proof
from offramp.store.manifest import (
    ENCODER_FORMAT,
    FILE_NAME,
    FORMAT,
    FORMATS,
    MAX_GRAPH_BYTES,
    MAX_MANIFEST_BYTES,
    Exits,
    File,
    Graph,
    Manifest,
    Proof,
    ProvenExample,
    ProvenInput,
    Shard,
    Source,
    Tensor,
    is_sealed,
)
from offramp.store.repeats import expand
from offramp.store.safetensors import PAGE_BYTES, strict_json

_FILE = re.compile(r"(graphs/)?[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_REMEDY = "divide the model again"


def loads(data: bytes, where: object = FILE_NAME) -> Manifest:
    """Return the checked manifest of format 1, 2 or 3.

    Raises VersionError for another format, DamagedError naming the key for anything else that is wrong.
    """
    tree = _tree(data, where)
    version = tree.pop("format", None)
    if type(version) is not int or version not in FORMATS:
        what = f"manifest has format {version!r}, this version reads {', '.join(map(str, FORMATS))}"
        raise VersionError(what, where, "use the offramp that wrote it, or divide again")
    try:
        manifest = _manifest(tree) if version == FORMAT else _old_manifest(tree, version)
        check_program(manifest.program)
        check_manifest(manifest)
    except WrongError as error:
        raise DamagedError(f"manifest: {error}", where, _REMEDY) from None
    if not is_sealed(data):
        raise DamagedError("manifest was changed: it does not end in its own sha256", where, _REMEDY)
    return manifest


def parse_labels(data: bytes, num_labels: int, where: object) -> Tuple[str, ...]:
    """Return the labels of `labels.json`. Raises DamagedError unless it is a list of `num_labels` strings."""
    try:
        labels = names_of(strict_json(data), "labels")
        if len(labels) != num_labels:
            raise WrongError(f"{len(labels)} labels, the output has {num_labels}")
    except (ValueError, WrongError) as error:
        raise DamagedError(f"labels: {error}", where, _REMEDY) from None
    return labels


def _tree(data: bytes, where: object) -> Dict[str, Any]:
    try:
        tree = strict_json(data)
    except ValueError as error:
        raise DamagedError(f"manifest is not JSON ({error})", where, _REMEDY) from None
    if not isinstance(tree, dict):
        raise DamagedError("manifest is not a JSON object", where, _REMEDY)
    return tree


def _manifest(tree: Dict[str, Any]) -> Manifest:
    tree = object_of(tree, "manifest", "source program shards graphs files exits proof labels sha256")
    common = _common(tree)
    proof, labels = tree["proof"], tree["labels"]
    return Manifest(
        program=program_of(expand(tree["program"], "program")),
        proof=None if proof is None else _proof(proof),
        labels=None if labels is None else _file(labels, "labels"),
        **common,
    )


def _old_manifest(tree: Dict[str, Any], version: int) -> Manifest:
    """Return a manifest of format 1 or 2 with its computation as a program."""
    described = "encoder" if version == ENCODER_FORMAT else "program"
    tree = object_of(tree, "manifest", f"source {described} stages shards graphs files exits proof sha256")
    common = _common(tree)
    if version == ENCODER_FORMAT:  # its proof, where there is one, is an object that nothing reads
        items_of({} if tree["proof"] is None else tree["proof"], "proof")
        program, labels = lift_encoder(tree["encoder"], tree["stages"], common["shards"])
        return Manifest(program=program, inline_labels=labels, **common)
    proof = _proof(lift_proof(tree["proof"]))
    program, labels = lift_module(tree["program"], tree["stages"], common["shards"], proof)
    return Manifest(program=program, inline_labels=labels, proof=proof, **common)


def _common(tree: Dict[str, Any]) -> Dict[str, Any]:
    """Return the fields that all formats describe alike."""
    shards: List[Shard] = [_shard(part, f"shards[{i}]") for i, part in enumerate(list_of(tree["shards"], "shards"))]
    require_distinct((shard.name for shard in shards), "shard")
    exits = tree["exits"]
    if exits is not None:
        exits = object_of(exits, "exits", "heads description")
        exits = Exits(_file(exits["heads"], "exits.heads"), _file(exits["description"], "exits.description"))
    return {
        "source": _source(tree["source"]),
        "shards": {shard.name: shard for shard in shards},
        "graphs": {
            str_of(name, "graphs", NAME): _graph(part, "graphs." + name)
            for name, part in items_of(tree["graphs"], "graphs")
        },
        "files": tuple(_file(part, f"files[{i}]") for i, part in enumerate(list_of(tree["files"], "files"))),
        "exits": exits,
    }


def _file_fields(tree: Dict[str, Any], where: str) -> Tuple[str, int, str]:
    return (
        str_of(tree["file"], where + ".file", _FILE),
        int_of(tree["bytes"], where + ".bytes"),
        str_of(tree["sha256"], where + ".sha256", _SHA256),
    )


def _file(tree: Any, where: str) -> File:
    return File(*_file_fields(object_of(tree, where, "file bytes sha256"), where))


def _graph(tree: Any, where: str) -> Graph:
    tree = object_of(tree, where, "file bytes sha256 opset ir")
    versions = (int_of(tree[key], f"{where}.{key}", 1) for key in ("opset", "ir"))
    graph = Graph(*_file_fields(tree, where), *versions)
    if graph.bytes > MAX_GRAPH_BYTES:
        raise WrongError(f"{where} of {graph.bytes} bytes is larger than {MAX_GRAPH_BYTES}")
    return graph


def _shape(tree: Any, where: str) -> Tuple[int, ...]:
    shape = tuple(int_of(size, where) for size in list_of(tree, where))
    if len(shape) > MAX_RANK:
        raise WrongError(f"{where} has {len(shape)} dimensions, at most {MAX_RANK} are read")
    return shape


def _tensor(tree: Any, where: str) -> Tensor:
    tree = object_of(tree, where, "name role dtype shape offset")
    return Tensor(
        str_of(tree["name"], where + ".name"),
        str_of(tree["role"], where + ".role"),
        choice_of(tree["dtype"], where + ".dtype", tuple(DTYPES)),
        _shape(tree["shape"], where + ".shape"),
        int_of(tree["offset"], where + ".offset"),
    )


def _shard(tree: Any, where: str) -> Shard:
    tree = object_of(tree, where, "name file bytes sha256 data_start tensors blocks")
    file, size, sha256 = _file_fields(tree, where)
    tensors = enumerate(list_of(tree["tensors"], where + ".tensors"))
    shard = Shard(
        str_of(tree["name"], where + ".name", NAME),
        file,
        size,
        sha256,
        int_of(tree["data_start"], where + ".data_start", PAGE_BYTES, min(size, MAX_MANIFEST_BYTES)),
        tuple(_tensor(tensor, f"{where}.tensors[{i}]") for i, tensor in tensors),
        None if tree["blocks"] is None else _file(tree["blocks"], where + ".blocks"),
    )
    _check_layout(shard, where)
    return shard


def _check_layout(shard: Shard, where: str) -> None:
    if shard.data_start % PAGE_BYTES:
        raise WrongError(f"{where}.data_start {shard.data_start} is not a multiple of {PAGE_BYTES}")
    end = 0
    for tensor in sorted(shard.tensors, key=lambda tensor: tensor.offset):
        if tensor.offset != end:
            raise WrongError(f"{where}: tensor {tensor.name!r} begins at {tensor.offset}, not at {end}")
        end += tensor.num_bytes
    if end != shard.data_bytes:
        raise WrongError(f"{where}: tensors take {end} bytes, the file holds {shard.data_bytes}")


def _source(tree: Any) -> Source:
    tree = object_of(tree, "source", "fingerprint architecture model_type method widened_from")
    widened = tree["widened_from"]
    architecture, model_type, method = (
        str_of(tree[key], "source." + key) for key in ("architecture", "model_type", "method")
    )
    return Source(
        str_of(tree["fingerprint"], "source.fingerprint", _SHA256),
        architecture,
        model_type,
        method,
        None if widened is None else choice_of(widened, "source.widened_from", tuple(DTYPES)),
    )


def _proof(tree: Any) -> Proof:
    tree = object_of(tree, "proof", "examples is_paged unsaved_buffers_sha256")
    digest = tree["unsaved_buffers_sha256"]
    examples = enumerate(list_of(tree["examples"], "proof.examples"))
    return Proof(
        tuple(_proven_example(example, f"proof.examples[{i}]") for i, example in examples),
        bool_of(tree["is_paged"], "proof.is_paged"),
        None if digest is None else str_of(digest, "proof.unsaved_buffers_sha256", _SHA256),
    )


def _proven_example(tree: Any, where: str) -> ProvenExample:
    counts = "unplanned_loads disorders peak_weight_bytes weight_budget_bytes"
    tree = object_of(tree, where, f"inputs inputs_sha256 equal {counts}")
    return ProvenExample(
        {name: _proven_input(part, f"{where}.inputs") for name, part in items_of(tree["inputs"], where + ".inputs")},
        str_of(tree["inputs_sha256"], where + ".inputs_sha256", _SHA256),
        bool_of(tree["equal"], where + ".equal"),
        *(int_of(tree[key], f"{where}.{key}") for key in counts.split()),
    )


def _proven_input(tree: Any, where: str) -> ProvenInput:
    tree = object_of(tree, where, "dtype shape")
    return ProvenInput(str_of(tree["dtype"], where + ".dtype"), _shape(tree["shape"], where + ".shape"))
