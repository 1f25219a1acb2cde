"""Folders of stores while they are read and replaced.

A reader opens the folder, takes a shared lock, and then checks that the folder still has its name. From then on a
division that replaces the store keeps these files: it exchanges the two folders in one step, renames the old one to
`STORE.retired`, and deletes it if no reader is left, which an exclusive lock tells; else the next division does.

Without locks the old files are deleted at once, and without the exchange there is no store for a moment; both are said.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
import sys
import time
import weakref
from pathlib import Path
from typing import Iterator, List, Optional, Union

from offramp.errors import StoreError
from offramp.store.files import FOLDER, absolute, flock, notice, translate_read_errors

STATE = ".building"
"""File that marks a folder that is being built; contains the fingerprint of its source."""
RETIRED = ".retired"
"""File that marks a replaced store, which may be deleted. It is also the suffix of the name of its folder."""
WAIT_SECONDS = 2.0
"""Longest wait for another process that changes names; it takes less than a millisecond."""
_PAUSE_SECONDS = 0.002
_RENAMEAT2 = {("x86_64", True): 316, ("aarch64", True): 276, ("armv7l", False): 382, ("armv8l", False): 382}
"""Machine and whether the process has 64 bits -> number of renameat2(2), which C libraries before 2018 do not have."""
_AT_FDCWD, _EXCHANGE = -100, 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV)
"""Error numbers where the kernel, its filter of system calls or the file system cannot exchange names."""


class Folder:
    """The folder of a store and one descriptor of it, by which its files are found although it is renamed or replaced.

    The descriptor is opened and locked at the first use, and closed by `close` or with the object.
    """

    def __init__(self, path: Union[str, os.PathLike], *, is_shared: bool = True) -> None:
        """`is_shared`: take the lock of readers; the writer of the folder has another one."""
        self.path, self._is_shared = absolute(path), is_shared
        self._closing: Optional[weakref.finalize] = None
        self._fd = -1

    @property
    def fd(self) -> int:
        """Descriptor of the folder. Raises StoreError where it is replaced all the time, DamagedError for none."""
        if self._closing is None:
            with translate_read_errors(self.path):
                self._fd = _open_shared(self.path) if self._is_shared else os.open(str(self.path), FOLDER)
            self._closing = weakref.finalize(self, os.close, self._fd)
        return self._fd

    @property
    def is_open(self) -> bool:
        """True if there is a descriptor."""
        return self._closing is not None

    @property
    def is_replaced(self) -> bool:
        """True if the path names another folder than the open one."""
        return self._closing is not None and self.path.exists() and not _is_at(self._fd, self.path)

    def close(self) -> None:
        """Close the descriptor, which frees the lock; the next use opens it again."""
        if self._closing is not None:
            self._closing()
            self._closing = None


def _open_shared(path: Path) -> int:
    """Open a folder and share its lock. Raises StoreError if it is being replaced for longer than WAIT_SECONDS."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        is_late = time.monotonic() > deadline
        with contextlib.ExitStack() as closing:
            try:
                fd = os.open(str(path), FOLDER)
                closing.callback(os.close, fd)
                if (_is_shared(fd) or is_late) and _is_at(fd, path):  # in this order: afterwards it stays
                    closing.pop_all()
                    return fd
            except FileNotFoundError:
                if not is_being_replaced(path) and not path.exists():  # in this order: it may have come meanwhile
                    raise
        if is_late:
            remedy = "run again when the division has finished; divide again if it was killed"
            raise StoreError("the store is being replaced", path, remedy)
        time.sleep(_PAUSE_SECONDS)


def _is_shared(fd: int) -> bool:
    """Share the lock of a folder, if there are locks. Return False where a writer has it, which frees it at once when
    the folder has its name; while it builds there, nothing can be replaced.
    """
    try:
        flock(fd, fcntl.LOCK_SH)
    except BlockingIOError:
        return STATE in os.listdir(fd)
    except OSError:  # reading works without a lock
        pass
    return True


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def is_being_replaced(path: Path) -> bool:
    """Return whether there is no store because another one takes its place, or would have done, had it not died."""
    target = Path(os.path.realpath(str(path)))
    return not os.path.lexists(str(target)) and any(is_retired(each) for each in retired_folders(target))


def is_retired(folder: Path) -> bool:
    """Return whether a folder is a replaced store, or what is left of one."""
    try:
        is_folder = stat.S_ISDIR(os.lstat(str(folder)).st_mode)
        return is_folder and stat.S_ISREG(os.lstat(str(folder / RETIRED)).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def retired_folders(target: Path) -> List[Path]:
    """Return everything beside a store that has the name of a retired one."""
    name = re.compile(re.escape(target.name + RETIRED) + r"(\.\d+)?")
    with contextlib.suppress(OSError):  # no such folder, or one that cannot be listed
        return [path for path in target.parent.iterdir() if name.fullmatch(path.name)]
    return []


def retired_name(target: Path) -> Path:
    """Return a name for the store at `target` once it is replaced; an earlier one may still be read."""
    name, number = target.with_name(target.name + RETIRED), 0
    while os.path.lexists(str(name)):
        number += 1
        name = target.with_name(f"{target.name}{RETIRED}.{number}")
    return name


@contextlib.contextmanager
def names_locked(folder: Path) -> Iterator[None]:
    """Keep other writers from changing names in a folder, if they do not hold its lock for long."""
    fd = os.open(str(folder), FOLDER)
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            with contextlib.suppress(BlockingIOError):
                flock(fd, fcntl.LOCK_EX)
                break
            if time.monotonic() > deadline:
                break
            time.sleep(_PAUSE_SECONDS)
        yield
    finally:
        os.close(fd)


def replace_folder(new: Path, target: Path) -> None:
    """Give the name of a store to a new one, and that of a retired one to the old one. The caller locks the names.

    Whatever ends the process in between, the old store is marked and one of both has the name, except between the two
    renames of a system that cannot exchange names.
    """
    _mark(target)
    if exchange(new, target):
        new.rename(retired_name(target))
        return
    notice("this system cannot exchange two folders: for a moment there is no store of this name")
    target.rename(retired_name(target))
    new.rename(target)


def _mark(folder: Path) -> None:
    marker = folder / RETIRED
    if os.path.lexists(str(marker)) and not is_retired(folder):  # such as a link, which must not be followed
        remove(marker)
    os.close(os.open(str(marker), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666))


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step. Return False where the kernel or the file system cannot. Raises OSError."""
    number = _RENAMEAT2.get((os.uname().machine, sys.maxsize > 1 << 32))
    if number is None:
        return False
    import ctypes

    here, libc = ctypes.c_long(_AT_FDCWD), ctypes.CDLL(None, use_errno=True)
    names = (here, os.fsencode(str(first)), here, os.fsencode(str(second)))
    if libc.syscall(ctypes.c_long(number), *names, ctypes.c_long(_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code not in _NO_EXCHANGE:
        raise OSError(code, os.strerror(code), str(first), None, str(second))
    return False


def delete_retired(target: Path) -> None:
    """Delete the replaced stores beside `target` that have no reader."""
    for folder in retired_folders(target):
        # another writer deletes it, it is read, or it is no folder
        with contextlib.suppress(FileNotFoundError, BlockingIOError, NotADirectoryError):
            _delete(folder)


def is_deletable(folder: Path) -> bool:
    """Return whether a folder is a replaced store, or empty as the last step of a deletion leaves it."""
    is_folder = folder.is_dir() and not folder.is_symlink() and not os.path.ismount(str(folder))
    return is_folder and (is_retired(folder) or not any(folder.iterdir()))


def _delete(folder: Path) -> None:
    fd = os.open(str(folder), FOLDER | os.O_NOFOLLOW)
    try:
        flock(fd, fcntl.LOCK_EX)
        if not (_is_at(fd, folder) and is_deletable(folder)):
            return
        for path in folder.iterdir():
            if path.name != RETIRED:
                remove(path)
        with contextlib.suppress(FileNotFoundError):
            (folder / RETIRED).unlink()  # last: it marks the folder as one that may be deleted
        folder.rmdir()
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with its content."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(str(path))
    else:
        path.unlink()
