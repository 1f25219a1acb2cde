"""Opening and writing files so that a hostile or interrupted folder cannot do harm.

No symlinks, no devices, nothing half-written under a final name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
from pathlib import Path
from typing import Iterable, Iterator, Tuple, Union

from offramp.errors import DamagedError, DiskFullError, StoreError, UsageError
from offramp.store.manifest import File, Graph

Data = Union[bytes, memoryview]
CHUNK_BYTES = 1 << 20
MAX_SMALL_BYTES = 64 << 20
_NOT_PLAIN = (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ENODEV, errno.EMLINK)
_UNREADABLE = (errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE)
_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def unreadable_is_ours(where: object) -> Iterator[None]:
    """Turn what a system says of a file that a store cannot have, or a disk of one that it lost, into a StoreError."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise DamagedError("file is missing", where, "divide the model again") from None
        if error.errno in _NOT_PLAIN:
            raise _not_plain(where) from None
        if error.errno in _UNREADABLE:
            what = f"cannot be read ({error.strerror})"
            raise StoreError(what, where, "check permissions and disk") from error
        raise


def _not_plain(where: object) -> DamagedError:
    return DamagedError("a store holds plain files only, this is a link or a device", where, "copy the file itself")


def open_regular(root: Path, name: str, flags: int = 0) -> int:
    """Open `name` (at most one folder deep) under `root` for reading. Returns the descriptor.

    Raises DamagedError for what is missing, and for symlinks, folders, pipes and devices.
    """
    flags |= os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # NONBLOCK: a pipe must not hang us
    *parents, leaf = name.split("/")
    with unreadable_is_ours(root / name):
        folder = os.open(str(root), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for parent in parents:
                inner = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = inner
            fd = os.open(leaf, flags, dir_fd=folder)
        finally:
            os.close(folder)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _not_plain(root / name)
    return fd


def require_size(fd: int, file_bytes: int, where: object) -> None:
    """Raise DamagedError unless the open file has the size that the manifest says."""
    size = os.fstat(fd).st_size
    if size != file_bytes:
        raise DamagedError(f"file has {size} bytes, the manifest says {file_bytes}", where, "divide the model again")


def read_small(root: Path, file: Union[File, Graph]) -> bytes:
    """The whole content of a small file of the store, checked against its size and digest."""
    where = root / file.file
    if file.bytes > MAX_SMALL_BYTES:
        raise DamagedError(f"file of {file.bytes} bytes, at most {MAX_SMALL_BYTES} are read whole", where)
    fd = open_regular(root, file.file)
    try:
        require_size(fd, file.bytes, where)
        with unreadable_is_ours(where):
            data = b"".join(iter_chunks(fd, file.bytes))
    finally:
        os.close(fd)
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise DamagedError("sha256 differs from the manifest", where, "divide the model again")
    return data


def iter_chunks(fd: int, size: int, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The first `size` bytes of `fd`, in order; fewer if the file is shorter."""
    offset = 0
    while offset < size:
        data = os.pread(fd, min(chunk_bytes, size - offset), offset)
        if not data:
            return
        offset += len(data)
        yield data


def sha256_of(fd: int) -> str:
    """Digest of a whole open file, streamed."""
    digest = hashlib.sha256()
    for chunk in iter_chunks(fd, os.fstat(fd).st_size):
        digest.update(chunk)
    return digest.hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(str(folder), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def disk_full_is_ours(where: object) -> Iterator[None]:
    """Turn the ways in which a disk says that it is full into DiskFullError."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            what, remedy = "no space left", "free some space and run again: finished shards are kept"
            raise DiskFullError(what, where, remedy) from error
        raise


@contextlib.contextmanager
def no_place_is_ours(what: str, where: object) -> Iterator[None]:
    """Turn what a system says of a path where no folder can be made into a UsageError that begins with `what`."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_PLACE:
            raise UsageError(f"{what} ({error.strerror})", where, "choose another folder") from error
        raise


def lock_folder(folder: Path, what: str, busy: str) -> int:
    """Make a folder, with those above it, and lock it until the returned descriptor is closed.

    Raises UsageError: `busy` where another process has the lock, `what` where no folder can be made.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with no_place_is_ours(what, folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        lock = -1
        try:
            lock = os.open(str(folder), flags)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(lock), os.lstat(str(folder))):
                return lock
        except (BlockingIOError, FileNotFoundError):
            pass  # locked, or renamed by who had it while we were about to lock it
        except BaseException:
            if lock >= 0:
                os.close(lock)
            raise
    if lock >= 0:
        os.close(lock)
    raise UsageError(busy, folder, "wait for it to end")


def make_folder(folder: Path) -> None:
    """Make a folder inside a store, unless it is there. Raises DamagedError where a link or a file has its name."""
    with disk_full_is_ours(folder), contextlib.suppress(FileExistsError):
        folder.mkdir()
    if folder.is_symlink() or not folder.is_dir():
        raise _not_plain(folder)


def write_atomic(path: Path, chunks: Iterable[Data]) -> File:
    """Write a file so that it is complete or absent under `path`: sibling, fsync, rename, fsync of the folder.

    The mode follows the umask. Raises DiskFullError.
    """
    temporary = path.with_name(path.name + ".tmp")
    with disk_full_is_ours(path):
        fd = os.open(str(temporary), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            size, sha256 = _write_durably(fd, chunks)
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                temporary.unlink()
            raise
        fsync_folder(path.parent)
    return File(path.name, size, sha256)


def _write_durably(fd: int, chunks: Iterable[Data]) -> Tuple[int, str]:
    """Write, fsync and close. Returns (bytes, sha256)."""
    digest, size = hashlib.sha256(), 0
    try:
        for chunk in chunks:
            digest.update(chunk)
            size += _write_all(fd, chunk)
        os.fsync(fd)
    finally:
        os.close(fd)
    return size, digest.hexdigest()


def _write_all(fd: int, chunk: Data) -> int:
    view = memoryview(chunk).cast("B")
    written = 0
    while written < len(view):
        written += os.write(fd, view[written:])
    return written
