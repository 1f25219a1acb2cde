"""Reader and writer of the safetensors container with the standard library only: not all devices have a wheel for it.

The reader is strict: offsets must be contiguous, sizes must follow from dtype and shape, and no byte may be left over.
Files are never mapped, because truncation of a mapped file kills the process with SIGBUS. Tensor data is not checked
here: the manifest holds the digests. Format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import Any, Dict, Iterable, Tuple

from offramp.errors import DamagedError
from offramp.program.dtypes import DTYPES

MAX_HEADER_BYTES = 100_000_000
"""Maximum size of a header in bytes; the limit of the reference implementation."""
MAX_RANK = 64
"""Maximum number of dimensions of a tensor."""
PAGE_BYTES = 4096


@dataclass(frozen=True)
class Entry:
    """One tensor: dtype as spelled by safetensors, shape, and byte range.

    The range [start, end) is relative to the first data byte.
    """

    dtype: str
    shape: Tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A validated header. `data_start` is the file offset of the first data byte."""

    tensors: Dict[str, Entry]
    data_start: int
    metadata: Dict[str, str]


def read_header(fd: int, size: int, where: object) -> Header:
    """Read and validate the header of the open file `fd` with `size` bytes. Raises DamagedError that names `where`."""
    length = _header_length(os.pread(fd, 8, 0), size, where)
    return parse_header(os.pread(fd, 8 + length, 0), size, where)


def parse_header(data: bytes, size: int, where: object) -> Header:
    """Parse the header of a file of `size` bytes that begins with `data`. Raises DamagedError that names `where`."""
    length = _header_length(data[:8], size, where)
    text = data[8 : 8 + length]
    if len(text) != length:
        raise _damaged("file ends inside its header", where)
    try:
        tree = strict_json(text)
    except ValueError as error:
        raise _damaged(f"header is not JSON ({error})", where) from None
    if not isinstance(tree, dict):
        raise _damaged("header is not a JSON object", where)
    metadata = tree.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged("__metadata__ must map strings to strings", where)
    tensors = {name: _entry(name, fields, where) for name, fields in tree.items()}
    _check_layout(tensors, size - 8 - length, where)
    return Header(tensors, 8 + length, metadata)


def _header_length(prefix: bytes, size: int, where: object) -> int:
    length = int.from_bytes(prefix, "little")
    if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
        raise _damaged(f"header of {length} bytes does not fit a file of {size}", where)
    return length


def header_bytes(tensors: Iterable[Tuple[str, str, Tuple[int, ...], int]]) -> bytes:
    """Return a header for (name, dtype, shape, start) entries in file order, padded with spaces to a page boundary.

    The specification allows the padding. O_DIRECT requires page-aligned data.
    """
    tree: Dict[str, Any] = {"__metadata__": {"format": "pt"}}  # required by transformers
    for name, dtype, shape, start in tensors:
        tree[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, start + num_bytes(dtype, shape)]}
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % PAGE_BYTES)
    return len(text).to_bytes(8, "little") + text


def num_bytes(dtype: str, shape: Tuple[int, ...]) -> int:
    """Size of a tensor's data."""
    size = DTYPES[dtype].item_bytes
    for extent in shape:
        size *= extent
    return size


def _damaged(what: str, where: object) -> DamagedError:
    return DamagedError(what, where, "download or write the file again")


def strict_json(data: bytes) -> Any:
    """Parse JSON, refusing everything that two parsers could read differently. Raises ValueError.

    Refused are duplicate keys, NaN, numbers beyond the range of a float or with more than 20 digits (parsing them takes
    quadratic time), and nesting deeper than the stack of the interpreter.
    """
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_short_int,
            parse_float=_finite_float,
            parse_constant=_finite_float,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list) -> dict:
    tree: dict = {}
    for key, value in pairs:
        if key in tree:
            raise ValueError(f"duplicate key {key!r}")
        tree[key] = value
    return tree


def _short_int(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"number with {len(text)} digits")
    return int(text)


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _entry(name: str, fields: object, where: object) -> Entry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(f"tensor {name!r} must have dtype, shape and data_offsets", where)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _damaged(f"tensor {name!r} has unknown dtype {dtype!r}", where)
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_natural, shape)):
        raise _damaged(f"tensor {name!r} has a bad shape", where)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise _damaged(f"tensor {name!r} has bad offsets", where)
    if offsets[1] - offsets[0] != num_bytes(dtype, tuple(shape)):
        raise _damaged(f"tensor {name!r} of {dtype} {shape} cannot occupy {offsets[1] - offsets[0]} bytes", where)
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _check_layout(tensors: Dict[str, Entry], data_bytes: int, where: object) -> None:
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise _damaged(f"tensor {name!r} begins at {entry.start}, expected {end}", where)
        end = entry.end
    if end != data_bytes:
        raise _damaged(f"tensors occupy {end} bytes, the file has {data_bytes}", where)
