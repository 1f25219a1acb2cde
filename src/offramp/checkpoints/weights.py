"""Tensors of a model folder in safetensors files, read a few megabytes at a time.

`Weights` is the protocol of a checkpoint; `SafetensorsWeights` implements it. Files are read, never mapped: a file that
is truncated while it is mapped kills the process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from offramp.errors import DamagedError, SourceError
from offramp.store.safetensors import Entry, read_header

MAX_JSON_BYTES = 64 << 20


class Weights(Protocol):
    """The tensors of a checkpoint."""

    entries: dict[str, tuple[str, tuple[int, ...]]]
    """Tensor name -> (dtype in safetensors, shape)."""
    files: tuple[Path, ...]
    """Every file that was read."""

    def pieces(self, name: str, piece_bytes: int) -> Iterator[bytes | memoryview]:
        """Yield the data of one tensor, little-endian and row by row, in pieces of at most `piece_bytes` (8 n)."""
        ...

    def read_into(self, name: str, buffer: memoryview) -> None:
        """Read the whole data of one tensor into a buffer of its size."""
        ...

    def close(self) -> None:
        """Close the files."""
        ...


class SafetensorsWeights:
    """Tensors in safetensors files. Where an index names the files, each has the set of tensors that it must hold."""

    def __init__(self, files: Mapping[Path, frozenset[str] | None], index: Path | None = None) -> None:
        self.files = (*files, *([index] if index else []))
        self.entries: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._places: dict[str, tuple[int, Path, int, int]] = {}
        self._fds: list[int] = []
        try:
            for path, owned in files.items():
                self._add(path, owned)
        except BaseException:
            self.close()
            raise

    def _add(self, path: Path, owned: frozenset[str] | None) -> None:
        fd = open_file(path)
        self._fds.append(fd)
        tensors, data_start = _read_header(fd, path)
        check_owned(owned, tensors, path)
        for name, entry in tensors.items():
            self.entries[name] = entry.dtype, entry.shape
            self._places[name] = fd, path, data_start + entry.start, data_start + entry.end

    def pieces(self, name: str, piece_bytes: int) -> Iterator[bytes]:
        """Yield the data of one tensor. Raises SourceError if the file has become shorter."""
        fd, path, start, end = self._places[name]
        for offset in range(start, end, piece_bytes):
            size = min(piece_bytes, end - offset)
            data = os.pread(fd, size, offset)
            if len(data) != size:
                raise SourceError(f"file ends inside tensor {name!r}", path, "get the file again")
            yield data
            del data  # before the next is read

    def read_into(self, name: str, buffer: memoryview) -> None:
        """Read the data of one tensor without an intermediate copy."""
        fd, path, start, end = self._places[name]
        done = 0
        while done < end - start:
            size = os.preadv(fd, [buffer[done:]], start + done)
            if not size:
                raise SourceError(f"file ends inside tensor {name!r}", path, "get the file again")
            done += size

    def close(self) -> None:
        """Close the files."""
        while self._fds:
            os.close(self._fds.pop())


def _read_header(fd: int, path: Path) -> tuple[Mapping[str, Entry], int]:
    try:
        header = read_header(fd, os.fstat(fd).st_size, path)
    except DamagedError as error:  # of a store; this is a source
        raise SourceError(error.what, error.where, error.remedy) from None
    return header.tensors, header.data_start


def check_owned(owned: frozenset[str] | None, found: Mapping[str, object], path: Path) -> None:
    """Raise SourceError unless a file holds the tensors that its index promises, neither fewer nor more."""
    if owned is not None and owned != found.keys():
        name = min(owned ^ found.keys())
        raise SourceError(f"index and file disagree about tensor {name!r}", path, "get the whole model again")


def open_file(path: Path) -> int:
    """Open a plain file for reading, links followed. Raises SourceError."""
    if not path.is_file():
        raise SourceError("no such file", path, "get the whole model again")
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(f"cannot be read ({error.strerror})", path, "check its permissions") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of at most 64 MiB. Raises SourceError."""
    fd = open_file(path)
    with os.fdopen(fd, "rb") as file:
        data = file.read(MAX_JSON_BYTES + 1)
    try:
        if len(data) > MAX_JSON_BYTES:
            raise ValueError("too long")
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"not JSON ({error})", path, "get the file again") from None
    if not isinstance(tree, dict):
        raise SourceError("not a JSON object", path, "get the file again")
    return tree


def read_index(index: Path, suffix: str) -> dict[Path, frozenset[str]]:
    """Return the files that an index of shards names, and the tensors that each must hold. Raises SourceError."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError("index has no weight_map", index, "get the file again")
    owned: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(suffix) or "\0" in file:
            raise SourceError(f"index names the file {file!r}", index, f"it must be a plain name that ends in {suffix}")
        owned.setdefault(file, set()).add(tensor)
    return {index.parent / file: frozenset(owned[file]) for file in sorted(owned)}
