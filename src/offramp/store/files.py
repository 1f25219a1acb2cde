"""Opening and writing of files, safe against hostile folders and interruptions.

Symlinks and devices are refused, and a file has its final name only when it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import warnings
from pathlib import Path
from typing import Callable, Iterable, Iterator, Optional, Tuple, Union

from offramp.errors import DamagedError, StoreError, SystemNotice, UsageError, disk_full, missing
from offramp.store import pages
from offramp.store.manifest import BLOCK_BYTES, File

Data = Union[bytes, bytearray, memoryview]
"""Bytes of a file, or a view of them."""
CHUNK_BYTES = 1 << 20
"""Bytes per read when a file is streamed."""
MAX_SMALL_BYTES = 64 << 20
"""Maximum size in bytes of a file that is read into memory as a whole."""
_REMEDY = "divide the model again"
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
"""Flags that open a folder."""
_NOT_PLAIN = (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ENODEV, errno.EMLINK)
"""Error numbers of `open` on symlinks, folders, pipes and devices."""
_UNREADABLE = (errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE)
"""Error numbers of files that exist but cannot be read."""
_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)
"""Error numbers of paths at which no folder can be created."""
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.EBADF)
"""Error numbers of calls that a kernel or a file system does not implement. No failing device reports them."""
_KINDS = {
    stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder", stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}  # fmt: skip
"""Type of what is no regular file -> its name in errors."""


def absolute(path: Union[str, os.PathLike]) -> Path:
    """Return a path that does not depend on the working folder. Raises UsageError where that was deleted, and for an
    empty path; ValueError for what is neither a text nor a path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ValueError(f"the path of a folder must be a text or a Path, not {path!r}")
    if not os.fspath(path):
        raise missing(repr(path))
    try:
        return Path(path).absolute()
    except FileNotFoundError:
        raise UsageError("the working folder was deleted", path, "change to a folder that exists") from None


@contextlib.contextmanager
def translate_read_errors(where: object) -> Iterator[None]:
    """Translate OSError from opening or reading a file of a store to DamagedError or StoreError."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise DamagedError("file is missing", where, _REMEDY) from None
        if error.errno in _NOT_PLAIN:
            raise _not_plain(where) from None
        if error.errno in _UNREADABLE:
            what = f"file cannot be read ({error.strerror})"
            raise StoreError(what, where, "check permissions and disk") from error
        _locate(error, where)
        raise


def _locate(error: OSError, where: object) -> None:
    """Give an error of a descriptor, which has no file name, the path that its message will name."""
    if error.filename is None:
        error.filename = str(where)


def _not_plain(where: object) -> DamagedError:
    return DamagedError("not a regular file: a store must not contain links or devices", where, "copy the file itself")


def open_regular(root: Path, name: str, flags: int = 0, *, dir_fd: Optional[int] = None) -> int:
    """Open `name` (at most one folder deep) under `root` for reading. Return the descriptor.

    `dir_fd` is an open descriptor of `root`, which is opened otherwise.

    Raises DamagedError for missing files, symlinks, folders, pipes and devices.
    """
    flags |= os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # NONBLOCK: opening a pipe must not block
    *parents, leaf = name.split("/")
    with translate_read_errors(root / name), contextlib.ExitStack() as closing:
        if dir_fd is None:
            dir_fd = os.open(str(root), FOLDER)
            closing.callback(os.close, dir_fd)
        for parent in parents:
            dir_fd = os.open(parent, FOLDER | os.O_NOFOLLOW, dir_fd=dir_fd)
            closing.callback(os.close, dir_fd)
        fd = os.open(leaf, flags, dir_fd=dir_fd)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise _not_plain(root / name)
    return fd


def open_plain(path: Union[str, os.PathLike]) -> int:
    """Open a regular file outside a store for reading; links are followed. Return the descriptor.

    Nothing else is opened: a pipe would wait for its writer, and some devices act when they are opened. Raises OSError
    whose `strerror` names what is there instead.
    """
    where = str(path)
    _require_plain(Path(path).stat(), where)
    fd = os.open(where, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _require_plain(os.fstat(fd), where)  # again: it may be another file by now
    except OSError:
        os.close(fd)
        raise
    return fd


def _require_plain(found: os.stat_result, where: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "a special file")
        raise OSError(errno.ENXIO, f"{kind}, not a regular file", where)


def read_plain(path: Union[str, os.PathLike], most_bytes: int = MAX_SMALL_BYTES) -> bytes:
    """Return the content of a regular file outside a store, or its first `most_bytes`. Raises OSError, as `open_plain`
    does.
    """
    fd = open_plain(path)
    try:
        return read_up_to(fd, most_bytes)
    finally:
        os.close(fd)


@contextlib.contextmanager
def opened(root: Path, name: str, *, dir_fd: Optional[int] = None) -> Iterator[int]:
    """Context manager of the descriptor that `open_regular` returns."""
    fd = open_regular(root, name, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def require_size(fd: int, file_bytes: int, where: object) -> None:
    """Raise DamagedError unless the open file has the size given in the manifest."""
    size = os.fstat(fd).st_size
    if size != file_bytes:
        raise DamagedError(f"file has {size} bytes, expected {file_bytes} from the manifest", where, _REMEDY)


def read_small(root: Path, file: File, *, dir_fd: Optional[int] = None) -> bytes:
    """Return the whole content of a small file of the store, checked against its size and digest."""
    where = root / file.file
    if file.bytes > MAX_SMALL_BYTES:
        raise DamagedError(f"file of {file.bytes} bytes exceeds the limit of {MAX_SMALL_BYTES}", where)
    with opened(root, file.file, dir_fd=dir_fd) as fd, translate_read_errors(where):
        require_size(fd, file.bytes, where)
        data = read_up_to(fd, file.bytes)
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise DamagedError("sha256 differs from the manifest", where, _REMEDY)
    return data


def read_up_to(fd: int, most_bytes: int) -> bytes:
    """Return the content of a regular file, or its first `most_bytes`, in one piece: parts would be copied."""
    size = min(os.fstat(fd).st_size, most_bytes)  # of some files of the kernel it is said to be 0
    return b"".join(iter_chunks(fd, most_bytes, max(size, CHUNK_BYTES)))


def iter_chunks(fd: int, size: int, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Yield the first `size` bytes of `fd`, in order; fewer if the file is shorter."""
    offset, is_cold = 0, pages.is_cold(fd, 0, size)
    while offset < size:
        if is_cold:
            pages.read_in(fd, offset)
        data = os.pread(fd, min(chunk_bytes, size - offset), offset)
        if not data:
            return
        offset += len(data)
        yield data


def read_exactly(fd: int, pieces: Iterable[Tuple[memoryview, int]], where: object, remedy: str = _REMEDY) -> None:
    """Fill each view from the bytes of a file at its offset. Raises DamagedError where the file is shorter."""
    with translate_read_errors(where):
        for view, offset in pieces:
            while len(view):
                got = os.preadv(fd, [view], offset)
                if not got:
                    raise DamagedError("file ends inside a tensor", where, remedy)
                view, offset = view[got:], offset + got


def block_digests(fd: int, size: int) -> bytes:
    """Return the concatenated SHA-256 digests of the blocks of a file of `size` bytes."""
    return b"".join(hashlib.sha256(block).digest() for block in iter_chunks(fd, size, BLOCK_BYTES))


def sha256_of(fd: int) -> str:
    """Return the SHA-256 digest of a whole open file as hex text. The file is streamed."""
    digest = hashlib.sha256()
    for chunk in iter_chunks(fd, os.fstat(fd).st_size):
        digest.update(chunk)
    return digest.hexdigest()


def notice(message: str) -> None:
    """Warn once that this system lacks a feature."""
    warnings.warn(message, SystemNotice, stacklevel=1)  # one place, so each text is shown once


def fsync(fd: int) -> None:
    """Flush a file, or the names in a folder, to disk. Warns where the file system cannot do this."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:  # such as EIO: the data are lost
            raise
        notice("this file system does not flush files to the disk: a power failure may damage what was just written")


def fsync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    fd = os.open(str(folder), FOLDER)
    try:
        fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def translate_disk_full(where: object) -> Iterator[None]:
    """Translate OSError of a full disk, a quota or a limit of file sizes to DiskFullError.

    Other errors get the path if they have none.
    """
    try:
        yield
    except OSError as error:
        full = disk_full(error, where)
        if full is not None:
            raise full from error
        _locate(error, where)
        raise


@contextlib.contextmanager
def translate_path_errors(what: str, where: object) -> Iterator[None]:
    """Translate OSError of a path at which no folder can be created to UsageError with the message `what`."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_PLACE:
            raise UsageError(f"{what} ({error.strerror})", where, "choose another folder") from error
        raise


def lock_folder(folder: Path, what: str, busy: str) -> Callable[[], None]:
    """Create a folder and its parents, and lock it. Return the function that releases the lock.

    Where the file system has no locks, a file `FOLDER.lock` beside the folder takes the place of the lock.

    Raises UsageError: with `busy` if another process holds the lock, with `what` if the folder cannot be created.
    """
    with translate_path_errors(what, folder), contextlib.ExitStack() as on_failure:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        # locked, or renamed by the holder of the lock in the meantime
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            lock = os.open(str(folder), FOLDER | os.O_NOFOLLOW)
            on_failure.callback(os.close, lock)
            if not flock(lock, fcntl.LOCK_EX):
                on_failure.callback(_own(folder.with_name(folder.name + ".lock"), busy))
            if os.path.samestat(os.fstat(lock), os.lstat(str(folder))):
                return on_failure.pop_all().close
    raise UsageError(busy, folder, "wait until it has finished")


def flock(fd: int, kind: int) -> bool:
    """Lock a file without waiting. Return False where the file system has no locks. Raises BlockingIOError."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return False
    return True


def _own(owner: Path, busy: str) -> Callable[[], None]:
    """Create a file that only one process can create. Return the function that removes it."""
    try:
        os.close(os.open(str(owner), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    except FileExistsError:
        raise UsageError(busy, owner, "wait until it has finished; remove this file if it was killed") from None
    notice(f"this file system has no locks: {owner.name} keeps other processes away")

    def remove() -> None:
        with contextlib.suppress(FileNotFoundError):
            owner.unlink()

    return remove


def make_folder(folder: Path) -> None:
    """Create a folder inside a store if it does not exist. Raises DamagedError if a link or a file has its name."""
    with translate_disk_full(folder), contextlib.suppress(FileExistsError):
        folder.mkdir()
    if folder.is_symlink() or not folder.is_dir():
        raise _not_plain(folder)


def open_written(path: Path, flags: int = 0) -> int:
    """Open a file for reading and writing, and create it if there is none. Return the descriptor.

    Raises UsageError for a link, which could lead to any file, a pipe, a device and a folder.
    """
    flags |= os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(str(path), flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
            raise
    else:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
    raise UsageError("is a link, a pipe, a device or a folder", path, "remove it, or name another file")


class NewFile:
    """Context manager of a file that replaces `path` when `finish` is called, and that otherwise leaves nothing.

    It grows as `PATH.tmp`, which its writer locks: what a killed process left there is overwritten.

    Raises UsageError where another process writes the same file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.temporary = path, path.with_name(path.name + ".tmp")
        self.fd = -1
        """Descriptor for writing and reading; -1 outside the block."""
        self._is_finished = False

    def __enter__(self) -> NewFile:
        with contextlib.ExitStack() as on_failure:
            fd = open_written(self.temporary)
            on_failure.callback(os.close, fd)
            # locked by its writer, who may have renamed it in the meantime
            with contextlib.suppress(BlockingIOError, FileNotFoundError):
                flock(fd, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(fd), os.lstat(str(self.temporary))):
                    os.ftruncate(fd, 0)
                    on_failure.pop_all()
                    self.fd = fd
                    return self
        what = "another process is writing this file"
        raise UsageError(what, self.path, "wait until it has finished, or name another file")

    def __exit__(self, *_: object) -> None:
        if not self._is_finished:
            with contextlib.suppress(OSError):  # the first error is the one to report
                self.temporary.unlink()
        os.close(self.fd)  # only now: the lock ends
        self.fd = -1

    def finish(self, *, flush: bool = True) -> None:
        """Give the file its final name. `flush` writes it to disk before, and the names in its folder afterwards."""
        if flush:
            fsync(self.fd)
        self.temporary.replace(self.path)
        self._is_finished = True
        if flush:
            fsync_folder(self.path.parent)


def write_atomic(path: Path, chunks: Iterable[Data]) -> File:
    """Write a file so that `path` is complete or absent. The mode follows the umask.

    Raises DiskFullError, and UsageError where another process writes the same file.
    """
    digest, size = hashlib.sha256(), 0
    with translate_disk_full(path), NewFile(path) as file:
        for piece in _pieces(chunks):
            digest.update(piece)
            write_all(file.fd, piece)
            size += len(piece)
            del piece  # it may hold a chunk, whose memory the next one takes
        file.finish()
    return File(path.name, size, digest.hexdigest())


def _pieces(chunks: Iterable[Data]) -> Iterator[Data]:
    """Yield the bytes of chunks in pieces that end at multiples of HUGE_BYTES, but for the last: what is written from
    one multiple to the next is one piece in the page cache.
    """
    begun = bytearray()
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        missing = -len(begun) % pages.HUGE_BYTES
        begun += view[:missing]
        if len(begun) == pages.HUGE_BYTES:
            yield begun
            begun = bytearray()
        view = view[missing:]
        whole = len(view) - len(view) % pages.HUGE_BYTES
        if whole:
            yield view[:whole]
        begun += view[whole:]
        del chunk, view  # the next chunk takes its memory
    if begun:
        yield begun


def write_all(fd: int, chunk: Data) -> None:
    """Write a whole chunk at the position of the descriptor."""
    view = memoryview(chunk).cast("B")
    while len(view):
        view = view[os.write(fd, view) :]
