"""Reader and writer of the safetensors container with the standard library only: not all devices have a wheel for it.

The reader is strict: offsets must be contiguous, sizes must follow from dtype and shape, and no byte may be left over.
Files are never mapped, because truncation of a mapped file kills the process with SIGBUS. Tensor data is not checked
here: the manifest holds the digests. Format: https://github.com/huggingface/safetensors (README, "Format").
"""

import json
import math
import os
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, Mapping, Optional, Tuple

from offramp.errors import DamagedError
from offramp.program.checks import MAX_RANK, WrongError, read, require_shape, strict_json
from offramp.program.dtypes import DTYPES, PACKED

MAX_HEADER_BYTES = 16 << 20
"""Maximum size of a header in bytes."""
MAX_HEADER_VALUES = 400_000
"""Maximum number of values in a header. A tensor takes about 8, and a value about 100 bytes once it is parsed."""
_MOST_PARSED_BYTES = 128 << 20
"""Memory of a header for `strict_json`, whose bound is twice what tensors take: their values are counted above."""
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
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_HEADER_VALUES:
        what = f"header of more than {MAX_HEADER_VALUES:,} values"
        raise DamagedError(what, where, "save the tensors in several files, each with fewer of them")
    try:
        tree = read(Dict[str, Any], strict_json(text, most_bytes=_MOST_PARSED_BYTES), "header")
        metadata = read(Optional[Dict[str, str]], tree.pop("__metadata__", None), "__metadata__") or {}
        _refuse_packed(tree, where)
        tensors = {name: _entry(described, f"tensor {name!r}") for name, described in tree.items()}
        require_contiguous(((e.start, e.end - e.start, name) for name, e in tensors.items()), size - 8 - length)
    except WrongError as error:
        raise _damaged(str(error), where) from None
    except ValueError as error:
        raise _damaged(f"header is not JSON ({error})", where) from None
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
    """Return the size of a tensor's data. Raises WrongError for a shape that no array can have."""
    size = DTYPES[dtype].item_bytes * math.prod(shape)
    if not size:
        require_shape(shape, f"a tensor {[*shape]}")
    return size


def _refuse_packed(tree: Mapping[str, Any], where: object) -> None:
    """Raise DamagedError for a tensor whose values share bytes: such a file is whole, but no store can hold it."""
    for name, described in tree.items():
        dtype = described.get("dtype") if isinstance(described, dict) else None
        if dtype in PACKED:
            what = f"tensor {name!r} is {dtype}, whose values share bytes, which a store cannot hold"
            raise DamagedError(what, where, "convert it to a dtype of whole bytes, such as F8_E4M3 or F16")


def _damaged(what: str, where: object) -> DamagedError:
    return DamagedError(what, where, "download or write the file again")


@dataclass(frozen=True)
class _Described:
    """A tensor as a header describes it."""

    dtype: str = field(metadata={"choices": tuple(DTYPES)})
    shape: Tuple[int, ...] = field(metadata={"most": MAX_RANK})
    data_offsets: Tuple[int, int]


def _entry(tree: Any, where: str) -> Entry:
    found = read(_Described, tree, where)
    start, end = found.data_offsets
    if end - start != num_bytes(found.dtype, found.shape):
        raise WrongError(f"{where} of {found.dtype} {[*found.shape]} cannot occupy {end - start} bytes")
    return Entry(found.dtype, found.shape, start, end)


def require_contiguous(tensors: Iterable[Tuple[int, int, str]], data_bytes: int, where: str = "") -> None:
    """Raise WrongError unless tensors, (start, number of bytes, name) each, fill the data without gap or overlap."""
    end = 0
    for start, size, name in sorted(tensors):
        if start != end:
            raise WrongError(f"{where}tensor {name!r} begins at {start}, not at {end}")
        end += size
    if end != data_bytes:
        raise WrongError(f"{where}tensors take {end} bytes, the file holds {data_bytes}")
