"""Tensors of a model folder in safetensors files, read a few megabytes at a time.

`Weights` is the protocol of a checkpoint; `SafetensorsWeights` implements it. Files are read, never mapped: a file that
is truncated while it is mapped kills the process.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from offramp.errors import DamagedError, SourceError
from offramp.program.checks import strict_json
from offramp.store.files import open_plain, read_up_to
from offramp.store.safetensors import read_header
from offramp.tasks.lines import POINTER

MAX_JSON_BYTES = 16 << 20
"""Largest JSON file that is read: the index of a checkpoint of 90,000 tensors has 9 MiB."""
Rows = tuple[int, int] | None
"""First row of a tensor, and the one after the last; None: all rows."""
STAND_INS = {
    POINTER: ("a Git LFS pointer", "run `git lfs pull` in its folder"),
    **dict.fromkeys((b"<!doctype html", b"<html", b"<?xml"), ("a web page", "download the file itself")),
    **dict.fromkeys(
        (b'{"error":', b"entry not found", b"repository not found", b"access to model "),
        ("the answer of a server that refused it", "download the file itself"),
    ),
}
"""Beginning of a file that stands in for one of a model, in lower case -> its kind, and the remedy."""
_BLANKS = 16
"""Most blanks before such a beginning."""
ZIP_MAGIC = b"PK\x03\x04"
PICKLES = (ZIP_MAGIC, b"\x80\x02\x8a\n")
"""Beginnings of the files of `torch.save`: of today, and before torch 1.6."""


class Weights(Protocol):
    """The tensors of a checkpoint."""

    entries: dict[str, tuple[str, tuple[int, ...]]]
    """Tensor name -> (dtype in safetensors, shape)."""

    def pieces(self, name: str, piece_bytes: int, rows: Rows = None) -> Iterator[bytes | memoryview]:
        """Yield the data of one tensor, little-endian and row by row, in pieces of at most `piece_bytes` (8 n)."""
        ...

    def close(self) -> None:
        """Close the files."""


class SafetensorsWeights:
    """Tensors in safetensors files. A tensor of several files is that of the last one, as in transformers."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.entries: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._places: dict[str, tuple[int, Path, int, int]] = {}
        with ExitStack() as opened:
            for path in files:
                fd = open_file(path)
                opened.callback(os.close, fd)
                self._add(fd, path)
            self._opened = opened.pop_all()

    def _add(self, fd: int, path: Path) -> None:
        try:
            header = read_header(fd, os.fstat(fd).st_size, path)
        except DamagedError as error:  # of a store; this is a source
            if os.pread(fd, len(ZIP_MAGIC), 0) in PICKLES:
                what, remedy = "a file of torch.save, not of safetensors", "rename it to pytorch_model.bin"
                raise SourceError(what, path, remedy) from None
            raise SourceError(error.what, error.where, error.remedy) from None
        for name, entry in header.tensors.items():
            self.entries[name] = entry.dtype, entry.shape
            self._places[name] = fd, path, header.data_start + entry.start, header.data_start + entry.end

    def pieces(self, name: str, piece_bytes: int, rows: Rows = None) -> Iterator[bytes]:
        """Yield the data of one tensor. Raises SourceError if the file has become shorter."""
        fd, path, start, end = self._places[name]
        if rows is not None:
            row_bytes = (end - start) // self.entries[name][1][0]
            start, end = start + rows[0] * row_bytes, start + rows[1] * row_bytes
        for offset in range(start, end, piece_bytes):
            size = min(piece_bytes, end - offset)
            data = os.pread(fd, size, offset)
            if len(data) != size:
                raise SourceError(f"file ends inside tensor {name!r}", path, "get the file again")
            yield data
            del data  # before the next is read

    def close(self) -> None:
        """Close the files."""
        self._opened.close()


def open_file(path: Path) -> int:
    """Open a regular file for reading, links followed. Raises SourceError, also for a stand-in for a file."""
    try:
        fd = open_plain(path)
    except FileNotFoundError:
        raise SourceError("no such file", path, "get the whole model again") from None
    except OSError as error:
        raise SourceError(f"cannot be read ({error.strerror})", path, "put a file there that can be read") from None
    beginning = os.pread(fd, max(map(len, STAND_INS)) + _BLANKS, 0).lstrip().lower()
    for start, (kind, remedy) in STAND_INS.items():
        if beginning.startswith(start):
            os.close(fd)
            raise SourceError(f"{kind} in place of the file", path, remedy)
    return fd


def read_small(path: Path, most_bytes: int = MAX_JSON_BYTES) -> bytes:
    """Return the content of a file. Raises SourceError for one of more than `most_bytes`, and as `open_file` does."""
    fd = open_file(path)
    try:
        is_small = os.fstat(fd).st_size <= most_bytes  # a hole of a terabyte is not read
        data = read_up_to(fd, most_bytes + 1) if is_small else b""
    finally:
        os.close(fd)
    if not is_small or len(data) > most_bytes:
        raise SourceError(f"file of more than {most_bytes} bytes", path, "get the file again")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of at most 16 MiB. Raises SourceError."""
    try:
        tree = strict_json(read_small(path), is_foreign=True)
    except ValueError as error:
        raise SourceError(f"not JSON ({error})", path, "get the file again") from None
    if not isinstance(tree, dict):
        raise SourceError("not a JSON object", path, "get the file again")
    return tree


def read_index(index: Path, suffix: str) -> list[Path]:
    """Return the files that an index of shards names, in the order in which transformers reads them.

    Which tensor is in which file is left to the files, as in transformers. Raises SourceError.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError("index has no weight_map", index, "get the file again")
    for file in weight_map.values():
        if not isinstance(file, str) or not file.endswith(suffix) or not _stays_inside(file):
            remedy = f"it must be a path in this folder that ends in {suffix}"
            raise SourceError(f"index names the file {file!r}", index, remedy)
    return [index.parent / file for file in sorted(set(weight_map.values()))]


def _stays_inside(file: str) -> bool:
    path = PurePosixPath(file)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in file
