"""Manifests read from bytes: the one place that checks them.

Unknown or missing keys, types, names and sizes are refused here by name, so that every caller can rely on a `Manifest`.
Files are compared with their digests by `store.reader` and `store.checking`.
"""

from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

from offramp.errors import DamagedError, VersionError
from offramp.program.checks import NAMED, WrongError, read, require_distinct
from offramp.program.consistency import check_program
from offramp.program.encoder import Encoder
from offramp.program.program import Program
from offramp.store import lifting
from offramp.store import manifest as m
from offramp.store.consistency import check_manifest
from offramp.store.repeats import expand
from offramp.store.safetensors import strict_json

_REMEDY = "divide the model again"


@dataclass(frozen=True)
class _Common:
    """Keys of the manifests of all formats, `format` excepted."""

    source: m.Source
    shards: Tuple[m.Shard, ...]
    graphs: Dict[str, m.Graph] = field(metadata=NAMED)
    files: Tuple[m.File, ...]
    exits: Optional[m.Exits]
    sha256: Any


@dataclass(frozen=True)
class _EncoderManifest(_Common):
    encoder: Encoder
    stages: Tuple[lifting.OldStage, ...]
    proof: Optional[Dict[str, Any]]
    """Nothing reads it."""


@dataclass(frozen=True)
class _ModuleManifest(_Common):
    program: lifting.OldProgram
    stages: Tuple[lifting.OldStage, ...]
    proof: Optional[Dict[str, Any]]


@dataclass(frozen=True)
class _ProgramManifest(_Common):
    program: Any
    proof: Optional[m.Proof]
    labels: Optional[m.File]


_KINDS = {m.ENCODER_FORMAT: _EncoderManifest, m.MODULE_FORMAT: _ModuleManifest, m.FORMAT: _ProgramManifest}


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
    if type(version) is not int or version not in _KINDS:
        what = f"manifest has format {version!r}, this version reads {', '.join(map(str, _KINDS))}"
        raise VersionError(what, where, "use the offramp that wrote it, or divide again")
    try:
        manifest = _manifest(read(_KINDS[version], tree, ""))
        check_program(manifest.program)
        check_manifest(manifest)
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


def _manifest(found: Any) -> m.Manifest:
    """Return a manifest of any format with its computation as a program."""
    require_distinct((shard.name for shard in found.shards), "shard")
    shards: Dict[str, m.Shard] = {shard.name: shard for shard in found.shards}
    proof, labels, inline_labels = None, None, ()
    if isinstance(found, _ProgramManifest):
        program, proof, labels = read(Program, expand(found.program, "program"), "program"), found.proof, found.labels
    elif isinstance(found, _ModuleManifest):
        proof = lifting.lift_proof(found.proof)
        program, inline_labels = lifting.lift_module(found.program, found.stages, shards, proof)
    else:
        program, inline_labels = lifting.lift_encoder(found.encoder, found.stages, shards)
    common = (found.graphs, found.files, found.exits)
    return m.Manifest(found.source, program, shards, *common, proof, labels, inline_labels)
