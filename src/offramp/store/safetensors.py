"""The safetensors container, read and written with the standard library alone: the device has no wheel of it.

The reader is strict: offsets are contiguous, sizes follow from dtype and shape, nothing overlaps, nothing is left over.
It never maps a file: one that is truncated under a map kills the process with SIGBUS. Payloads are not judged here: the
manifest carries their digests.
Format: https://github.com/huggingface/safetensors (README, "Format").
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
MAX_RANK = 64
PAGE_BYTES = 4096


@dataclass(frozen=True)
class Entry:
    """One tensor: dtype as safetensors spells it, shape, and its bytes [start, end) from the first data byte on."""

    dtype: str
    shape: Tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header. `data_start` is the file offset of the first data byte."""

    tensors: Dict[str, Entry]
    data_start: int
    metadata: Dict[str, str]


def read_header(fd: int, size: int, where: object) -> Header:
    """Read and check the header of the open file `fd` of `size` bytes. Raises DamagedError naming `where`."""
    length = _header_length(os.pread(fd, 8, 0), size, where)
    return parse_header(os.pread(fd, 8 + length, 0), size, where)


def parse_header(data: bytes, size: int, where: object) -> Header:
    """The same for a file of `size` bytes that begins with `data`."""
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
    """A header for (name, dtype, shape, start) entries in file order, padded with spaces so that data begin on a page.

    The padding is what the specification allows; a page boundary is what O_DIRECT and SIMD want.
    """
    tree: Dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file that does not say so
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
    return DamagedError(what, where, "get the file again")


def strict_json(data: bytes) -> Any:
    """Parse JSON that two parsers cannot read in two ways. Raises ValueError where it is not.

    Refused are duplicate keys, NaN, numbers beyond a float or of more than 20 digits (to read those takes quadratic
    time), and nesting deeper than the interpreter's stack.
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
            raise ValueError(f"key {key!r} stands twice")
        tree[key] = value
    return tree


def _short_int(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"a number of {len(text)} digits")
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
        raise _damaged(f"tensor {name!r} of {dtype} {shape} does not take {offsets[1] - offsets[0]} bytes", where)
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _check_layout(tensors: Dict[str, Entry], data_bytes: int, where: object) -> None:
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise _damaged(f"tensor {name!r} begins at {entry.start}, not at {end}", where)
        end = entry.end
    if end != data_bytes:
        raise _damaged(f"tensors take {end} bytes, the file holds {data_bytes}", where)
