"""Transcripts: what every exit said of every example of a split, on disk, so that policies are tuned without a model.

`DIR/SPLIT.safetensors` holds, for N examples, K exits, C outputs of a head and H hidden:

    logits [N, K, C] F32    lengths [N] I32, in tokens    labels [N] I64, or F32 values of a regression
    features [N, K, H] F32, the first token's hidden state where each exit stands, if it was asked for

`DIR/SPLIT.json` says of what they are, and closes the transcript: without it there is none. Rows are written and read
in windows: no number of them is too large. It knows nothing of models and policies.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, cast

import numpy as np

from offramp.errors import DamagedError, StoreError, UsageError, VersionError
from offramp.store.files import (
    MAX_SMALL_BYTES,
    disk_full_is_ours,
    fsync_folder,
    iter_chunks,
    no_place_is_ours,
    open_regular,
    require_size,
    sha256_of,
    unreadable_is_ours,
    write_atomic,
)
from offramp.store.safetensors import header_bytes, num_bytes, read_header

FORMAT = 1
_REMEDY = "write the transcript again: offramp eval --transcript"
_DTYPES = {"F32": np.dtype("<f4"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8")}


@dataclass(frozen=True)
class About:
    """What a transcript is of."""

    task: str
    split: str
    problem: str
    """As in the model's config."""
    labels: Tuple[str, ...]
    """Names of the label ids; empty for a regression."""
    metrics: Tuple[str, ...]
    model_sha256: str
    """Fingerprint of the model folder."""
    data_sha256: str
    """Of the texts and labels, in order."""
    max_length: int
    """Tokens that texts were cut to."""


class TranscriptWriter:
    """Writes one split. A context manager; without `finish` nothing stays. Raises UsageError where one exists."""

    def __init__(
        self, folder: Path, about: About, num_rows: int, num_exits: int, num_outputs: int, feature_size: int = 0
    ) -> None:
        self.folder, self.about = folder, about
        label_dtype = "F32" if about.problem == "regression" else "I64"
        specs = [
            ("logits", "F32", (num_rows, num_exits, num_outputs)),
            ("lengths", "I32", (num_rows,)),
            ("labels", label_dtype, (num_rows,)),
        ]
        if feature_size:
            specs.append(("features", "F32", (num_rows, num_exits, feature_size)))
        self._specs = {name: (_DTYPES[dtype], shape) for name, dtype, shape in specs}
        entries, offset = [], 0
        for name, dtype, shape in specs:
            entries.append((name, dtype, shape, offset))
            offset += num_bytes(dtype, shape)
        self._header, self._size = header_bytes(entries), offset
        self._starts = {name: len(self._header) + start for name, _, _, start in entries}
        self._path, self._description = folder / (about.split + ".safetensors"), folder / (about.split + ".json")
        self._partial = folder / (about.split + ".safetensors.tmp")
        self._fd, self._rows_left = -1, num_rows

    def __enter__(self) -> TranscriptWriter:
        for path in (self._path, self._description):
            if os.path.lexists(str(path)):
                raise UsageError("target exists", path, "choose another folder, or remove it")
        with disk_full_is_ours(self.folder):
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
            with no_place_is_ours("a transcript cannot be written there", self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._fd = os.open(str(self._partial), flags, 0o666)
            try:
                os.ftruncate(self._fd, len(self._header) + self._size)
                _pwrite(self._fd, self._header, 0)
            except OSError:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            with contextlib.suppress(FileNotFoundError):
                self._partial.unlink()

    def write(self, start: int, **arrays: np.ndarray) -> None:
        """Rows from `start` on, each once: `logits`, `lengths`, `labels`, and `features` if promised.

        Raises DiskFullError.
        """
        if set(arrays) != set(self._specs):
            raise ValueError(f"expected {sorted(self._specs)}, got {sorted(arrays)}")
        for name, array in arrays.items():
            dtype, shape = self._specs[name]
            if array.shape[1:] != shape[1:] or start + len(array) > shape[0]:
                raise ValueError(f"{name} of shape {array.shape} at {start} does not fit {shape}")
            row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
            with disk_full_is_ours(self._partial):
                _pwrite(
                    self._fd, np.ascontiguousarray(array, dtype).data.cast("B"), self._starts[name] + start * row_bytes
                )
        self._rows_left -= len(arrays["labels"])

    def finish(self) -> Path:
        """Make it durable, and give it its name; every row must have been written. Returns the path of the JSON."""
        if self._rows_left:
            raise ValueError(f"{self._rows_left} rows were not written")
        with disk_full_is_ours(self._partial):
            os.fsync(self._fd)
            sha256 = sha256_of(self._fd)
            self._partial.replace(self._path)
            fsync_folder(self.folder)
        file = {"bytes": len(self._header) + self._size, "sha256": sha256}
        tree = {"format": FORMAT, **asdict(self.about), "file": file}
        write_atomic(self._description, [json.dumps(tree, indent=1).encode() + b"\n"])
        return self._description


@dataclass(frozen=True, eq=False)
class Transcript:
    """One split, as it was written; the features stay on disk until they are asked for."""

    about: About
    logits_NKC: np.ndarray
    lengths_N: np.ndarray
    labels_N: np.ndarray
    path: Path
    feature_start: Optional[int]
    """Where features begin in the file; None if there are none."""
    feature_size: int

    def features(self, start: int, stop: int) -> np.ndarray:
        """Features [stop - start, K, H] of some rows. Raises ValueError where there are none."""
        num_rows, num_exits = self.logits_NKC.shape[:2]
        if self.feature_start is None or not 0 <= start <= stop <= num_rows:
            raise ValueError(f"no features of rows {start} to {stop}")
        shape = (stop - start, num_exits, self.feature_size)
        row_bytes = 4 * num_exits * self.feature_size
        fd = open_regular(self.path.parent, self.path.name)
        try:
            return _read_array(fd, self.feature_start + start * row_bytes, "F32", shape, self.path)
        finally:
            os.close(fd)


def read_transcript(folder: Path, split: str) -> Transcript:
    """Read and check a split.

    Raises UsageError where there is none, StoreError (DamagedError where a file is not what was written, VersionError
    for another format).
    """
    path = folder / (split + ".safetensors")
    if not any(os.path.lexists(str(each)) for each in (path, path.with_suffix(".json"))):
        raise UsageError(f"no transcript of {split} there", folder, f"offramp eval --split {split} --transcript DIR")
    try:
        return _read(path)
    except DamagedError as error:  # what opens files thinks that they are a store's
        raise DamagedError(error.what, error.where, _REMEDY) from None


def _read(path: Path) -> Transcript:
    folder, split = path.parent, path.stem
    about, file = _read_description(folder, split)
    fd = open_regular(folder, path.name)
    try:
        require_size(fd, file["bytes"], path)
        if sha256_of(fd) != file["sha256"]:
            raise StoreError("sha256 differs from the description", path, _REMEDY)
        header = read_header(fd, file["bytes"], path)
        arrays = {}
        for name in ("logits", "lengths", "labels"):
            entry = header.tensors.get(name)
            if entry is None or entry.dtype not in _DTYPES:
                raise StoreError(f"no tensor {name!r} that a transcript has", path, _REMEDY)
            arrays[name] = _read_array(fd, header.data_start + entry.start, entry.dtype, entry.shape, path)
    finally:
        os.close(fd)
    features = header.tensors.get("features")
    _require_shapes(arrays, None if features is None else features.shape, path)
    return Transcript(
        about,
        arrays["logits"],
        arrays["lengths"],
        arrays["labels"],
        path,
        None if features is None else header.data_start + features.start,
        0 if features is None else features.shape[2],
    )


def _read_description(folder: Path, split: str) -> Tuple[About, Dict[str, Any]]:
    path = folder / (split + ".json")
    fd = open_regular(folder, path.name)
    try:
        with unreadable_is_ours(path):
            data = b"".join(iter_chunks(fd, min(os.fstat(fd).st_size, MAX_SMALL_BYTES)))
    finally:
        os.close(fd)
    try:
        tree = json.loads(data)
        if tree["format"] != FORMAT:
            raise VersionError(f"transcript of format {tree['format']!r}, {FORMAT} is read", path, _REMEDY)
        file = {"bytes": int(tree["file"]["bytes"]), "sha256": str(tree["file"]["sha256"])}
        fields = {name: tree[name] for name in About.__dataclass_fields__}
        lists = {name: tuple(fields[name]) for name in ("labels", "metrics")}
        return About(**{**fields, **lists}), file
    except (ValueError, KeyError, TypeError, RecursionError):
        raise StoreError("no description of a transcript", path, _REMEDY) from None


def _require_shapes(arrays: Dict[str, np.ndarray], features: Optional[Tuple[int, ...]], where: Path) -> None:
    shape = arrays["logits"].shape
    found: List[Tuple[int, ...]] = [arrays["lengths"].shape, arrays["labels"].shape]
    fits = len(shape) == 3 and all(other == shape[:1] for other in found)
    if not fits or not (features is None or (len(features) == 3 and features[:2] == shape[:2])):
        raise StoreError(f"tensors of shapes {shape}, {found}, {features} are no transcript", where, _REMEDY)


def _read_array(fd: int, offset: int, dtype: str, shape: Tuple[int, ...], where: Path) -> np.ndarray:
    array = np.empty(shape, _DTYPES[dtype])
    view: Any = memoryview(cast(Any, array.reshape(-1).view(np.uint8)))
    done = 0
    while done < len(view):
        with unreadable_is_ours(where):
            count = os.preadv(fd, [view[done:]], offset + done)
        if not count:
            raise StoreError("file ends inside a tensor", where, _REMEDY)
        done += count
    return array


def _pwrite(fd: int, data: Any, offset: int) -> None:
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)
