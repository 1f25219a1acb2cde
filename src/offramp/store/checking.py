"""Checking of a whole store: every byte of every file that the manifest lists."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Optional

from offramp.errors import DamagedError, RefusedError
from offramp.store import files
from offramp.store import manifest as m
from offramp.store.exits import parse_exits
from offramp.store.parsing import loads, parse_labels
from offramp.store.reader import read_manifest_bytes, require_self_contained
from offramp.store.safetensors import read_header


@dataclass(frozen=True)
class Check:
    """Result of checking one file. `problem` describes the error, or is None."""

    file: str
    bytes: int
    problem: Optional[str]


def verify(path: os.PathLike) -> Iterator[Check]:
    """Check a store file by file, in the order of the manifest.

    Raises StoreError or VersionError if the manifest itself cannot be read.
    """
    root = files.absolute(path)
    manifest = loads(read_manifest_bytes(root), root / m.FILE_NAME)
    shards = {shard.file: shard for shard in manifest.shards.values()}
    graphs = {graph.file for graph in manifest.graphs.values()}
    places = sum(stage.exit is not None for stage in manifest.program.layers) if manifest.program.stages else None
    for file in m.all_files(manifest):
        try:
            _check(root, file, shards.get(file.file))
            if manifest.exits is not None and file == manifest.exits.description:
                parse_exits(files.read_small(root, file), root / file.file, num_places=places)
            if manifest.labels is not None and file == manifest.labels:
                num_labels = 0 if manifest.program.output is None else manifest.program.output.num_labels
                parse_labels(files.read_small(root, file), num_labels, root / file.file)
            if file.file in graphs:
                require_self_contained(files.read_small(root, file), root / file.file)
        except RefusedError as error:
            yield Check(file.file, file.bytes, error.what)
        else:
            yield Check(file.file, file.bytes, None)


def _check(root: Path, file: m.File, shard: Optional[m.Shard]) -> None:
    where = root / file.file
    with files.opened(root, file.file) as fd, files.translate_read_errors(where):
        files.require_size(fd, file.bytes, where)
        if files.sha256_of(fd) != file.sha256:
            raise DamagedError("sha256 differs from the manifest", where)
        if shard is None:
            return
        _check_header(fd, shard, where)
        blocks = shard.blocks
        if blocks is not None and hashlib.sha256(files.block_digests(fd, shard.bytes)).hexdigest() != blocks.sha256:
            raise DamagedError(f"blocks differ from {blocks.file}", where)


def _check_header(fd: int, shard: m.Shard, where: Path) -> None:
    header = read_header(fd, shard.bytes, where)
    found = {(name, entry.dtype, entry.shape, entry.start) for name, entry in header.tensors.items()}
    expected = {(tensor.name, tensor.dtype, tensor.shape, tensor.offset) for tensor in shard.tensors}
    if found != expected or header.data_start != shard.data_start:
        names = sorted({name for name, *_ in found ^ expected})
        raise DamagedError(f"tensors differ from the manifest: {names[:5]}", where)
