"""Temporary folders that do not outlive their process for long: the next one clears what a killed process left."""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Iterator, Optional

from offramp.errors import UsageError
from offramp.store.files import lock_folder

_BUSY = "another process uses this temporary folder"


@contextlib.contextmanager
def scratch_folder(prefix: str, parent: Optional[Path] = None) -> Iterator[Path]:
    """Context manager of a folder `parent/PREFIX...`, which is locked meanwhile; by default in that of the system.

    Folders of this name and of this user that no process has locked are removed first.
    """
    place = Path(tempfile.gettempdir()) if parent is None else parent
    for path in place.glob(prefix + "*"):
        with contextlib.suppress(OSError, UsageError):  # of another user, or in use
            if os.lstat(str(path)).st_uid == os.geteuid():
                _remove(path)
    with contextlib.ExitStack() as closing:
        folder = None
        while folder is None:
            with contextlib.suppress(UsageError):  # cleared by another process before it was locked
                folder = _create(prefix, place, closing)
        yield folder


def _create(prefix: str, place: Path, closing: contextlib.ExitStack) -> Path:
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=str(place)))
    closing.callback(lock_folder(folder, "no temporary folder can be made there", _BUSY))
    closing.callback(shutil.rmtree, str(folder), ignore_errors=True)
    return folder


def _remove(folder: Path) -> None:
    release = lock_folder(folder, "a temporary folder cannot be removed", _BUSY)
    try:
        shutil.rmtree(str(folder))
    finally:
        release()
