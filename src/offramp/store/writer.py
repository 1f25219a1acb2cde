"""Atomic and resumable writing of a store.

Files are written to `STORE.partial`, the manifest last, followed by one rename, or an exchange with the store that is
replaced (`folders`). An interrupted build is resumed if the
fingerprint matches; a shard of the earlier attempt is kept if it is byte for byte identical. At most one chunk of
tensor data is in memory at a time. A folder created by another program is never deleted.

An empty folder becomes the store in place, because it may be a mount point, which cannot be renamed: it is a store when
the manifest is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, List, Optional, Sequence, Tuple

from offramp.errors import DamagedError, DiskFullError, StageError, StoreError, UsageError
from offramp.store import files, folders
from offramp.store import manifest as m
from offramp.store.folders import STATE, remove
from offramp.store.parsing import loads
from offramp.store.reader import read_manifest_bytes
from offramp.store.safetensors import header_bytes, num_bytes
from offramp.units import format_size

_LOST = "lost+found"
"""Folder that is part of an empty file system."""
_MARK = "user.offramp.unfinished"
"""Extended attribute of a store whose writer has not ended; contains the fingerprint. It is no file, so that a store is
whole under its final name, and the same command is told apart from another one for the same target.
"""
Described = Tuple[str, str, str, Tuple[int, ...]]
"""Name, role, dtype and shape of a tensor."""
Reader = Callable[[str], Iterable[files.Data]]
"""Function that yields the data of a tensor in chunks."""


class StoreWriter:
    """Context manager that writes one store. Without `finish` the target is unchanged and the next writer resumes.

    `fingerprint` identifies the source and the tool; it contains the fingerprint of the source in the manifest.
    """

    def __init__(self, target: Path, fingerprint: str, *, force: bool = False) -> None:
        self.target = Path(os.path.normpath(str(files.absolute(target))))  # else `..` would be the name
        self.fingerprint, self.force = fingerprint, force
        self.partial = _partial_name(self.target)
        self._release: Optional[Callable[[], None]] = None

    def __enter__(self) -> StoreWriter:
        what = "a store cannot be built there"
        with files.translate_path_errors(what, self.target):
            self.partial = self.target if may_fill(self.target) or self._is_marked(self.target) else self.partial
        self._refuse_target()
        try:
            with files.translate_disk_full(self.partial):
                self._release = self._lock(what)
                self._refuse_target()  # again: another writer may have finished in the meantime
                self._resume_or_clear()
            files.make_folder(self.partial / "graphs")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, kind: Any = None, error: Optional[BaseException] = None, trace: Any = None) -> None:
        """Release the lock.

        After StageError the partial folder is removed, because a retry would fail in the same way. DiskFullError gets
        the sentence that a retry continues.
        """
        if self._release is None:
            return
        if isinstance(error, DiskFullError) and str(error.remedy).endswith("run again"):  # else in another folder
            error.add_kept("finished shards are kept")
        if isinstance(error, StageError):
            with contextlib.suppress(OSError):
                _clear(self.partial)
                if self.partial != self.target:
                    self.partial.rmdir()
        self._unlock()

    def _lock(self, what: str) -> Callable[[], None]:
        """Create and lock the partial folder. Returns the function that frees the lock. Raises UsageError."""
        busy = "another process is building this store"
        beside = _partial_name(self.target)
        with files.translate_path_errors(what, self.partial):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            with folders.names_locked(self.target.parent):
                if folders.is_retired(beside):  # a writer was killed after it exchanged the two
                    beside.rename(folders.retired_name(self.target))
                return files.lock_folder(self.partial, what, busy)

    def _unlock(self) -> None:
        if self._release is not None:
            self._release()
            self._release = None

    def require_space(self, total_bytes: int) -> None:
        """Raise DiskFullError unless the free space exceeds the bytes that remain to be written by 5 %."""
        present = sum(path.stat().st_size for path in self.partial.rglob("*") if path.is_file())
        needed, usage = max(total_bytes - present, 0) * 21 // 20, shutil.disk_usage(str(self.partial))
        if needed > usage.free and any(usage):  # some network file systems report 0 of 0 bytes
            remedy = "free some space or choose another folder"
            raise DiskFullError(
                f"{format_size(needed)} needed, {format_size(usage.free)} free", self.target.parent, remedy
            )

    def add_shard(self, name: str, tensors: Sequence[Described], read: Reader, *, gathered: bool = False) -> m.Shard:
        """Write one shard of tensors in the given order.

        Args:
            name: name of the shard.
            tensors: description of each tensor.
            read: yields the data of one tensor in chunks; called again if a file of an earlier attempt differs.
            gathered: whether single rows will be read; adds digests of blocks.
        """
        entries, offset = [], 0
        for tensor, role, dtype, shape in tensors:
            entries.append(m.Tensor(tensor, role, dtype, tuple(shape), offset))
            offset += num_bytes(dtype, tuple(shape))
        header = header_bytes((entry.name, entry.dtype, entry.shape, entry.offset) for entry in entries)
        path, chunks = self.partial / (name + ".safetensors"), partial(_chained, header, entries, read)
        file, blocks = self._kept(path, len(header) + offset, chunks) or files.write_atomic(path, chunks()), None
        if gathered:
            with files.opened(self.partial, path.name) as fd:
                blocks = self.add_file(name + ".blocks", files.block_digests(fd, file.bytes))
        return m.Shard(name, file.file, file.bytes, file.sha256, len(header), tuple(entries), blocks)

    def add_file(self, name: str, data: bytes) -> m.File:
        """Write a small companion file, at most one folder deep."""
        return replace(files.write_atomic(self.partial / name, [data]), file=name)

    def add_copy(self, name: str, source: Path) -> m.File:
        """Copy a companion file of any size."""
        with os.fdopen(files.open_plain(source), "rb") as stream:
            return files.write_atomic(self.partial / name, iter(partial(stream.read, 1 << 20), b""))

    def add_labels(self, labels: Sequence[str]) -> Optional[m.File]:
        """Write the labels in the order of their ids. Returns None where there are none."""
        return self.add_file(m.LABELS_FILE, m.labels_bytes(labels)) if labels else None

    def add_exits(self, heads: Path, description: Path) -> m.Exits:
        """Copy the exit heads and their description."""
        return m.Exits(self.add_copy(heads.name, heads), self.add_copy(description.name, description))

    def add_graph(self, kernel: str, data: bytes, opset: int, ir: int) -> m.Graph:
        """Write the ONNX graph of a kernel."""
        return m.Graph(**vars(self.add_file(f"graphs/{kernel}.onnx", data)), opset=opset, ir=ir)

    def finish(self, manifest: m.Manifest) -> Path:
        """Write the manifest, then give the folder its final name, unless it has it already."""
        with files.translate_disk_full(self.target):
            self._drop_strangers(manifest)
            files.write_atomic(self.partial / m.FILE_NAME, [m.dumps(manifest)])
            with contextlib.suppress(OSError):  # where there are no attributes, the same command says that it exists
                os.setxattr(str(self.partial), _MARK, self.fingerprint.encode())
            (self.partial / STATE).unlink()
            files.fsync_folder(self.partial)
            if self.partial != self.target:
                self._refuse_target()
                with folders.names_locked(self.target.parent):
                    if self.target.exists():
                        folders.replace_folder(self.partial, self.target)
                    else:
                        self.partial.rename(self.target)
                files.fsync_folder(self.target.parent)
            with contextlib.suppress(OSError):
                os.removexattr(str(self.target), _MARK)
            self._unlock()  # readers of the new store wait for it
            folders.delete_retired(self.target)
        return self.target

    def _is_marked(self, folder: Path) -> bool:
        """Return whether a folder is a whole store by the same command, which was killed at its end."""
        return mark_of(folder) == self.fingerprint.encode()

    def _refuse_target(self) -> None:
        in_place = self.partial == self.target and (may_fill(self.target) or self._is_marked(self.target))
        if in_place or not os.path.lexists(str(self.target)):
            return
        require_replaceable(self.target, self.force)
        retired = self.target.with_name(self.target.name + folders.RETIRED)
        if os.path.lexists(str(retired)) and not folders.is_deletable(retired):
            raise UsageError("--force needs this name for the old store, but it exists", retired, "move it away")

    def _resume_or_clear(self) -> None:
        state, present = self.partial / STATE, {path.name for path in _entries(self.partial)}
        if STATE in present and self._is_of_this_source():
            return
        is_marked = self._is_marked(self.partial)
        if not (is_marked or STATE in present or present <= {STATE + ".tmp"} or self._is_finished_build()):
            what = "a folder with this name exists and was not created by offramp"
            raise UsageError(what, self.partial, "move it away")
        if state.is_dir() and not state.is_symlink():
            remove(state)
        files.write_atomic(state, [self.fingerprint.encode()])  # first: it marks the folder as created by offramp
        if not is_marked:
            _clear(self.partial, keep=STATE)

    def _is_of_this_source(self) -> bool:
        """Return whether the partial folder was begun for this source; what is no regular file tells nothing."""
        wanted = self.fingerprint.encode()
        try:
            with files.opened(self.partial, STATE) as fd:
                return os.pread(fd, len(wanted) + 1, 0) == wanted
        except DamagedError:
            return False

    def _is_finished_build(self) -> bool:
        """Return whether the partial folder is a finished build of this source without its final rename."""
        try:
            found = folders.Folder(self.partial, is_shared=False)  # this writer has the lock
            return loads(read_manifest_bytes(self.partial, found)).source.fingerprint in self.fingerprint
        except (StoreError, UsageError):
            return False

    def _kept(self, path: Path, size: int, chunks: Callable[[], Iterable[files.Data]]) -> Optional[m.File]:
        """Return the file of an earlier attempt if it is identical to the file to be written, otherwise None."""
        if path.is_symlink() or not path.is_file() or path.stat().st_size != size:
            return None
        expected = hashlib.sha256()
        for chunk in chunks():
            expected.update(chunk)
        with files.opened(path.parent, path.name) as fd:
            found = files.sha256_of(fd)
        return m.File(path.name, size, found) if found == expected.hexdigest() else None

    def _drop_strangers(self, manifest: m.Manifest) -> None:
        """Remove files of an earlier attempt that the manifest does not list."""
        wanted = {file.file for file in m.all_files(manifest)} | {STATE, _LOST}
        wanted |= {str(Path(name).parent) for name in wanted}
        for path in sorted(self.partial.rglob("*"), reverse=True):  # contents before their folder
            if str(path.relative_to(self.partial)) not in wanted and path.parent.name != _LOST:
                remove(path)


def require_replaceable(target: Path, force: bool) -> None:
    """Raise UsageError for a target that exists, unless it is a store and is replaced by `force`."""
    if target.is_symlink() or (target / m.FILE_NAME).is_symlink() or not (target / m.FILE_NAME).is_file():
        what = "target exists and is not a store, so --force does not replace it"
        raise UsageError(what, target, "choose another name")
    if os.path.ismount(str(target)):
        raise UsageError("a mount point cannot be replaced", target, "remove its files, or choose another name")
    if not force:
        raise UsageError("target exists", target, "choose another name, or --force to replace it")


def may_fill(folder: Path) -> bool:
    """Return whether a folder is empty, or holds a store under construction."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = {path.name for path in _entries(folder)}
    return STATE in names or names <= {STATE + ".tmp"}


def mark_of(folder: Path) -> bytes:
    """Return the fingerprint of a store whose writer was killed at its end; b"" for every other folder."""
    try:
        return os.getxattr(str(folder), _MARK, follow_symlinks=False)
    except OSError:
        return b""


def _partial_name(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def _entries(folder: Path) -> List[Path]:
    return [path for path in folder.iterdir() if path.name != _LOST]


def _clear(folder: Path, keep: str = "") -> None:
    for path in _entries(folder):
        if path.name != keep:
            remove(path)


def _chained(header: bytes, entries: Sequence[m.Tensor], read: Reader) -> Iterator[files.Data]:
    yield header
    for entry in entries:
        size = 0
        for chunk in read(entry.name):
            size += memoryview(chunk).nbytes
            yield chunk
            del chunk  # the next one takes its memory
        if size != entry.num_bytes:
            raise ValueError(f"tensor {entry.name!r}: expected {entry.num_bytes} bytes, got {size}")
