"""Checking of a whole store: every byte of every file that the manifest lists."""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Dict, Iterator, Optional

from offramp.errors import DamagedError, RefusedError
from offramp.store import files
from offramp.store import manifest as m
from offramp.store.exits import parse_exits
from offramp.store.folders import Folder
from offramp.store.parsing import loads, parse_labels
from offramp.store.reader import Store, read_manifest_bytes, require_self_contained
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
    with contextlib.closing(Folder(path)) as folder:
        manifest = loads(read_manifest_bytes(folder.path, folder), folder.path / m.FILE_NAME)
        shards = {shard.file: shard for shard in manifest.shards.values()}
        contents = _content_checks(manifest)
        for file in m.all_files(manifest):
            try:
                _check(folder, file, shards.get(file.file))
                if file.file in contents:
                    contents[file.file](files.read_small(folder.path, file, dir_fd=folder.fd), folder.path / file.file)
            except RefusedError as error:
                yield Check(file.file, file.bytes, error.what)
            else:
                yield Check(file.file, file.bytes, None)


def _content_checks(manifest: m.Manifest) -> Dict[str, Callable[[bytes, Path], object]]:
    """Return name of a file -> function that raises RefusedError for content that does not fit the program."""
    program = manifest.program
    checks: Dict[str, Callable[[bytes, Path], object]] = {
        graph.file: require_self_contained for graph in manifest.graphs.values()
    }
    if manifest.exits is not None:
        places = sum(stage.exit is not None for stage in program.layers) if program.stages else None
        checks[manifest.exits.description.file] = partial(parse_exits, num_places=places)
    if manifest.labels is not None:
        num_labels = 0 if program.output is None else program.output.num_labels
        checks[manifest.labels.file] = lambda data, where: parse_labels(data, num_labels, where)
    return checks


def require_whole(store: Store) -> None:
    """Check every file of an open store. Raises DamagedError for the first that differs from the manifest."""
    shards = {shard.file: shard for shard in store.manifest.shards.values()}
    for file in m.all_files(store.manifest):
        _check(store.folder, file, shards.get(file.file))


def _check(folder: Folder, file: m.File, shard: Optional[m.Shard]) -> None:
    where = folder.path / file.file
    with files.opened(folder.path, file.file, dir_fd=folder.fd) as fd, files.translate_read_errors(where):
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
