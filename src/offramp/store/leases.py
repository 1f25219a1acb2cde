"""Read leases of files: as long as one is held, no process can write to the file or cut it (Linux, fcntl(2)).

A process that opens the file for writing, or truncates it, waits until the lease is given back, or for as long as
/proc/sys/fs/lease-break-time says (45 s), after which the kernel takes the lease. Renaming or deleting the file does
not wait: who has it open keeps its data.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import weakref
from typing import Optional

LEAST_BREAK_SECONDS = 10
"""Shortest lease-break-time with which leases are used. Breaks are looked for twice a second, but a thread may have to
wait for a disk or for the interpreter meanwhile."""
_BREAK_TIME = "/proc/sys/fs/lease-break-time"
_LOCAL = frozenset((
    0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0xCA451A4E, 0x01021994, 0x794C7630, 0xE0F5E1E2, 0x73717368
))  # fmt: skip
"""Types of file systems whose files only this kernel changes: ext2 to ext4, XFS, Btrfs, F2FS, bcachefs, tmpfs, overlay,
EROFS, SquashFS. A server can cut a file of NFS, SMB or FUSE whatever leases its clients hold."""
_STATFS_BYTES = 256
"""More than `struct statfs` takes on any machine; its first member is a long, the type of the file system."""


class LeasedFile:
    """A descriptor of its own, on which a lease can be taken. No copy of it may be used in the child of a fork: both
    would have the same lease.

    The descriptor is closed by `close` or with the object.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._closing = weakref.finalize(self, os.close, fd)
        self._closing.atexit = False  # its mapping may be in use then

    def take(self) -> Optional[str]:
        """Take the lease. Return None, or why there is none."""
        try:
            # A break sends a signal to the owner of the descriptor. It has none, but a break may come before that is
            # said: then a signal that is ignored unless the host program asks for it, not SIGIO, which kills.
            fcntl.fcntl(self.fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(self.fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(self.fd, fcntl.F_SETOWN, 0)
        except OSError as error:
            self.end_lease()
            if error.errno in (errno.EAGAIN, errno.EACCES):
                is_open = error.errno == errno.EAGAIN
                return "a file is open for writing" if is_open else "the store belongs to another user"
            return f"the file system gives no read leases ({error.strerror})"
        return None

    @property
    def is_held(self) -> bool:
        """True if the lease is held and no process waits for it."""
        return fcntl.fcntl(self.fd, fcntl.F_GETLEASE) == fcntl.F_RDLCK

    def end_lease(self) -> None:
        """Give back the lease, if it is held."""
        with contextlib.suppress(OSError, AttributeError):  # the kernel has taken it, or there are none
            fcntl.fcntl(self.fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    def close(self) -> None:
        """Close the descriptor, which ends the lease unless the child of a fork has a copy: give it back first."""
        self._closing()


def lease_obstacle(fd: int) -> Optional[str]:
    """Return why no lease of an open file would protect its reader, or None. `LeasedFile.take` tells the rest."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return "this system has no read leases"
    try:
        with open(_BREAK_TIME, encoding="ascii") as file:
            seconds = int(file.read())
    except (OSError, ValueError):
        return f"{_BREAK_TIME} cannot be read"
    if 0 < seconds < LEAST_BREAK_SECONDS:
        return f"{_BREAK_TIME} is {seconds} s"
    return None if _type_of(fd) in _LOCAL else "its file system may change files in spite of a read lease"


def _type_of(fd: int) -> int:
    """Return the type of the file system of an open file, or 0."""
    found = ctypes.create_string_buffer(_STATFS_BYTES)
    if ctypes.CDLL(None).fstatfs(fd, found):
        return 0
    return ctypes.c_ulong.from_buffer(found).value & 0xFFFFFFFF
