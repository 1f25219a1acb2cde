"""Transcripts: stored outputs of every exit on every example of a split.

Policies are tuned on a transcript without running a model.

`DIR/SPLIT.safetensors` holds, for N examples, K exits, C outputs of a head and hidden size H:

    logits [N, K, C] F32    lengths [N] I32, in tokens    labels [N] I64, or F32 values of a regression
    rows [N] U64, optional: salted digests of the inputs (`tasks.digests`)
    features [N, K, H] F32, optional: the hidden state of the first token at each exit

`DIR/SPLIT.json` describes the data and gets its name last; a transcript without it does not exist. It lies complete in
`DIR/SPLIT.json.tmp` before the data get their name: data without a description are the rest of a process that was
killed, and are replaced, if that file describes them. Rows are written and read in windows, so their number is not
limited by memory. This module is independent of models and policies.
"""

import contextlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np

from offramp.errors import DamagedError, StoreError, UsageError, VersionError
from offramp.program.checks import POSITIVE, WrongError, read, strict_json
from offramp.program.dtypes import DTYPES, FLOAT
from offramp.store import files
from offramp.store.safetensors import header_bytes, num_bytes, read_header

FORMAT = 2
"""Version of the transcript format that is written. Format 1, which is read as well, has no digests of rows."""
MAX_DESCRIPTION_BYTES = 16 << 20
"""Largest description that is read; the names of 20,000 labels take 1 MiB."""
_REMEDY = "write the transcript again: offramp eval --transcript"
_DTYPES = {name: np.dtype(DTYPES[name].numpy).newbyteorder("<") for name in (FLOAT, "I32", "I64", "U64")}


@dataclass(frozen=True)
class About:
    """Description of the data in a transcript."""

    task: str
    split: str
    problem: str
    """Problem type, as in the config of the model."""
    labels: Tuple[str, ...]
    """Names of the label ids; empty for a regression."""
    metrics: Tuple[str, ...]
    model_sha256: str
    """Fingerprint of the model folder."""
    data_sha256: str
    """Digest of texts and labels, in order."""
    max_length: int = field(metadata=POSITIVE)
    """Maximum number of tokens; longer texts were truncated."""
    row_salt: str = ""
    """Salt of the digests of rows; empty without digests."""
    training_rows: Optional[int] = None
    """Number of rows of the split that the model was trained on; None: unknown."""
    includes_training_rows: bool = False
    """False if these rows were left out."""


@dataclass(frozen=True)
class _Data:
    bytes: int
    sha256: str


class TranscriptWriter:
    """Context manager that writes one split.

    Without `finish` nothing is kept. Raises UsageError if the split exists, or if another process writes it.
    """

    def __init__(
        self, folder: Path, about: About, num_rows: int, num_exits: int, num_outputs: int, feature_size: int = 0
    ) -> None:
        self.folder, self.about = folder, about
        tensors = {
            "logits": (FLOAT, (num_rows, num_exits, num_outputs)),
            "lengths": ("I32", (num_rows,)),
            "labels": (FLOAT if about.problem == "regression" else "I64", (num_rows,)),
        }
        if about.row_salt:
            tensors["rows"] = ("U64", (num_rows,))
        if feature_size:
            tensors["features"] = (FLOAT, (num_rows, num_exits, feature_size))
        entries, size = [], 0
        for name, (dtype, shape) in tensors.items():
            entries.append((name, dtype, shape, size))
            size += num_bytes(dtype, shape)
        self._header = header_bytes(entries)
        self._file_bytes = len(self._header) + size
        self._specs = {name: (_DTYPES[dtype], shape, start) for name, dtype, shape, start in entries}
        self._path, self._description = folder / (about.split + ".safetensors"), folder / (about.split + ".json")
        self._data, self._rows_left = files.NewFile(self._path), num_rows

    def __enter__(self) -> "TranscriptWriter":
        with files.translate_disk_full(self.folder), contextlib.ExitStack() as on_failure:
            with files.translate_path_errors("a transcript cannot be written there", self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                on_failure.enter_context(self._data)
            self._make_room()
            os.ftruncate(self._data.fd, self._file_bytes)
            files.write_all(self._data.fd, self._header)
            on_failure.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._data.__exit__(*error)

    def _make_room(self) -> None:
        """Remove the rest of a process that was killed. Raises UsageError if the split exists otherwise."""
        for path in (self._path, self._description):
            if os.path.lexists(str(path)) and not (path == self._path and self._is_rest()):
                raise UsageError("target exists", path, "choose another folder, or remove it")
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()  # before the file that tells whose it is
        with files.NewFile(self._description):
            pass

    def _is_rest(self) -> bool:
        """Return whether the data have only a temporary description, which has not got its final name."""
        if os.path.lexists(str(self._description)):
            return False
        try:
            _, file = _read_description(files.NewFile(self._description).temporary)
            with files.opened(self.folder, self._path.name) as fd:
                return _Data(os.fstat(fd).st_size, files.sha256_of(fd)) == file
        except StoreError:
            return False

    def write(self, start: int, **arrays: np.ndarray) -> None:
        """Write the arrays of the rows from `start` on; each row must be written once.

        Arrays are `logits`, `lengths`, `labels`, `rows` if there is a salt, and `features` if the writer has a feature
        size.

        Raises ValueError for other arrays or shapes, DiskFullError.
        """
        if set(arrays) != set(self._specs):
            raise ValueError(f"arrays must be {sorted(self._specs)}, got {sorted(arrays)}")
        for name, array in arrays.items():
            dtype, shape, first = self._specs[name]
            if array.shape[1:] != shape[1:] or start + len(array) > shape[0]:
                raise ValueError(f"{name} of shape {array.shape} at {start} does not fit {shape}")
            row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
            with files.translate_disk_full(self._path):
                os.lseek(self._data.fd, len(self._header) + first + start * row_bytes, os.SEEK_SET)
                files.write_all(self._data.fd, np.ascontiguousarray(array, dtype).data)
        self._rows_left -= len(arrays["labels"])

    def finish(self) -> Path:
        """Flush the data and give the files their final names. Return the path of the description.

        Raises ValueError if rows are missing, DiskFullError.
        """
        if self._rows_left:
            raise ValueError(f"{self._rows_left} rows were not written")
        with files.translate_disk_full(self._path), files.NewFile(self._description) as description:
            file = {"bytes": self._file_bytes, "sha256": files.sha256_of(self._data.fd)}
            tree = {"format": FORMAT, **asdict(self.about), "file": file}
            files.write_all(description.fd, json.dumps(tree, indent=1).encode() + b"\n")
            files.fsync(description.fd)  # before the data get their name: see the module
            self._data.finish()
            try:
                description.finish()
            except BaseException:
                if not os.path.lexists(str(self._description)):
                    self._path.unlink()
                raise
        return self._description


@dataclass(frozen=True, eq=False)
class Transcript:
    """One split as it was written. Features are read on demand."""

    about: About
    logits_NKC: np.ndarray
    lengths_N: np.ndarray
    labels_N: np.ndarray
    path: Path
    feature_start: Optional[int]
    """Offset of the features in the file in bytes; None without features."""
    feature_size: int
    rows_N: Optional[np.ndarray] = None
    """Digests of the rows, uint64; None if they were not recorded."""

    def features(self, start: int, stop: int) -> np.ndarray:
        """Return the features [stop - start, K, H] of a range of rows. Raises ValueError if there are none."""
        num_rows, num_exits = self.logits_NKC.shape[:2]
        if self.feature_start is None or not 0 <= start <= stop <= num_rows:
            raise ValueError(f"the transcript has no features for rows {start} to {stop}")
        shape = (stop - start, num_exits, self.feature_size)
        row_bytes = 4 * num_exits * self.feature_size
        with files.opened(self.path.parent, self.path.name) as fd:
            return _read_array(fd, self.feature_start + start * row_bytes, FLOAT, shape, self.path)


def find_transcript(folder: Path, about: About, feature_size: int) -> Optional[Transcript]:
    """Return the transcript of exactly these data, or None where it is absent, of others, or damaged."""
    try:
        found = read_transcript(folder, about.split)
    except (StoreError, UsageError):
        return None
    return found if (found.about, found.feature_size) == (about, feature_size) else None


def read_transcript(folder: Path, split: str) -> Transcript:
    """Read and verify a split.

    Raises UsageError if it does not exist, DamagedError if a file was changed, VersionError for another format, and
    StoreError for other invalid contents.
    """
    path = folder / (split + ".safetensors")
    if not any(os.path.lexists(str(each)) for each in (path, path.with_suffix(".json"))):
        remedy = f"create one: offramp eval --split {split} --transcript DIR"
        raise UsageError(f"no transcript of split {split}", folder, remedy)
    try:
        found = _read(path)
    except DamagedError as error:  # replaces the remedy, which is written for stores
        raise DamagedError(error.what, error.where, _REMEDY) from None
    if found.about.split != split:  # a policy is not certified on the rows that it was chosen by
        raise StoreError(f"this is the transcript of split {found.about.split}, not of {split}", path, _REMEDY)
    return found


def _read(path: Path) -> Transcript:
    about, file = _read_description(path.with_suffix(".json"))
    with files.opened(path.parent, path.name) as fd:
        files.require_size(fd, file.bytes, path)
        if files.sha256_of(fd) != file.sha256:
            raise StoreError("sha256 differs from the description", path, _REMEDY)
        header = read_header(fd, file.bytes, path)
        arrays = {}
        for name in ("logits", "lengths", "labels", *(["rows"] if about.row_salt else [])):
            entry = header.tensors.get(name)
            if entry is None or entry.dtype not in _DTYPES:
                raise StoreError(f"tensor {name!r} is missing or has a wrong dtype", path, _REMEDY)
            arrays[name] = _read_array(fd, header.data_start + entry.start, entry.dtype, entry.shape, path)
    features = header.tensors.get("features")
    _require_shapes(arrays, None if features is None else features.shape, path)
    _require_values(arrays, len(about.labels), path)
    start, size = (None, 0) if features is None else (header.data_start + features.start, features.shape[2])
    logits_NKC, lengths_N, labels_N = (arrays[name] for name in ("logits", "lengths", "labels"))
    return Transcript(about, logits_NKC, lengths_N, labels_N, path, start, size, arrays.get("rows"))


def _read_description(path: Path) -> Tuple[About, _Data]:
    with files.opened(path.parent, path.name) as fd, files.translate_read_errors(path):
        data = files.read_up_to(fd, MAX_DESCRIPTION_BYTES + 1)
    try:
        if len(data) > MAX_DESCRIPTION_BYTES:
            raise WrongError(f"more than {MAX_DESCRIPTION_BYTES} bytes")
        tree: Dict[str, Any] = read(Dict[str, Any], strict_json(data), "it")
        lacking = [key for key in ("format", "file") if key not in tree]
        if lacking:
            raise WrongError(f"it lacks {lacking}")
        version, file = tree.pop("format"), tree.pop("file")
        if type(version) is not int or version not in (1, FORMAT):
            raise VersionError(f"transcript of format {version!r}, supported are 1 and {FORMAT}", path, _REMEDY)
        return read(About, tree, "", fills=version == 1), read(_Data, file, "file")
    except ValueError as error:
        raise StoreError(f"not a description of a transcript ({error})", path, _REMEDY) from None


def _require_shapes(arrays: Dict[str, np.ndarray], features: Optional[Tuple[int, ...]], where: Path) -> None:
    shape = arrays["logits"].shape
    found: List[Tuple[int, ...]] = [array.shape for name, array in arrays.items() if name != "logits"]
    fits = len(shape) == 3 and all(other == shape[:1] for other in found)
    if not fits or not (features is None or (len(features) == 3 and features[:2] == shape[:2])):
        raise StoreError(f"tensors of shapes {shape}, {found}, {features} are not a transcript", where, _REMEDY)


def _require_values(arrays: Dict[str, np.ndarray], num_labels: int, where: Path) -> None:
    """Raise StoreError for a label that is none of the head's outputs, and for numbers that are not finite."""
    logits_NKC, lengths_N, labels_N = (arrays[name] for name in ("logits", "lengths", "labels"))
    num_outputs = logits_NKC.shape[2]
    if num_labels not in (0, num_outputs):
        raise StoreError(f"labels: {num_labels}, the tensor 'logits' has {num_outputs} outputs", where, _REMEDY)
    is_label_N = (labels_N >= 0) & (labels_N < num_outputs) if labels_N.dtype.kind == "i" else np.isfinite(labels_N)
    for name, fine in (("logits", np.isfinite(logits_NKC)), ("lengths", lengths_N >= 0), ("labels", is_label_N)):
        if not fine.all():
            raise StoreError(f"tensor {name!r} has a value out of range", where, _REMEDY)


def _read_array(fd: int, offset: int, dtype: str, shape: Tuple[int, ...], where: Path) -> np.ndarray:
    array = np.empty(shape, _DTYPES[dtype])
    files.read_exactly(fd, [(array.reshape(-1).view(np.uint8).data, offset)], where, _REMEDY)
    return array
