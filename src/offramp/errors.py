"""Exception tree of offramp. Each class carries the exit code of the command line.

    OfframpError                 1  base class
    ├── UsageError               2  wrong arguments, wrong path, existing target, unknown column, empty input
    ├── BudgetError              3  no plan fits; the message names the smallest budget that works
    ├── RefusedError             4  input that is damaged, of unknown format, or unsafe
    │   ├── SourceError             a model folder: architecture; missing, extra or mis-shaped tensors
    │   │   └── PickleError         a pickle that `weights_only` cannot read safely
    │   ├── StoreError              a store
    │   │   ├── DamagedError        truncated, corrupted, or not what the manifest describes
    │   │   └── VersionError        a manifest of an unknown version
    │   ├── StageError              a divided module whose execution differs from its division
    │   └── NonFiniteError          NaN or infinite logits; the message names the stage
    ├── DiskFullError            5  no space left; no file stays under the final name
    └── AbsentError              1  something that is asked for is not installed
        └── MissingExtraError       an optional library; the message names the extra to install

A message is one line: WHAT - WHERE - WHAT TO DO. Wrong arguments to functions raise plain `ValueError`. Messages can
quote names from untrusted files: control characters are escaped and long parts are shortened.
"""

from __future__ import annotations

import errno
import os
import re

_LONGEST_PART = 1000
"""Longest part of a message in characters; longer parts are shortened in the middle. Valid paths and remedies are
shorter."""


class OfframpError(Exception):
    """Base class of all errors of offramp. `where` and `remedy` follow `what` in the message."""

    exit_code = 1
    environment: dict[str, object] | None = None
    """Machine and conditions of the worker process that raised it; None: this process, or unknown."""

    def __init__(self, what: str, where: object = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = shown(what), where, remedy
        super().__init__(" - ".join(shown(part) for part in (what, where, remedy) if part is not None))

    def placed(self, place: str | None) -> OfframpError:
        """Return this error with a further place, such as the line of a recipe, behind `where`; None adds nothing."""
        if place is not None:
            where = place if self.where is None else f"{self.where} ({place})"
            OfframpError.__init__(self, self.what, where, self.remedy)
        return self


def shown(part: object) -> str:
    """Return `part` as printable text.

    Control characters are escaped, because they could move the cursor or forge a line; long text is shortened.
    """
    text = str(part)
    if len(text) > _LONGEST_PART:
        text = text[: _LONGEST_PART // 2] + " ... " + text[-_LONGEST_PART // 2 :]
    return escaped(text)


def escaped(text: str) -> str:
    """Return a text as one line, in which characters that are not printable are escaped."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def said(error: BaseException) -> str:
    """Return the class of an exception and the first line of its message, without colours of a terminal."""
    text = re.sub(r"\x1b\[[\d;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def innermost_line(error: BaseException, path: str, line: int = 1) -> int:
    """Return the innermost line of a file of code that took part in an error; `line` if none did."""
    if isinstance(error, SyntaxError) and error.filename == path:
        line = error.lineno or 1
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == path:
            line = trace.tb_lineno or line
        trace = trace.tb_next
    return line


class UsageError(OfframpError):
    """The request is invalid: wrong arguments, or a target that already exists."""

    exit_code = 2


class BudgetError(OfframpError):
    """No plan fits the memory budget."""

    exit_code = 3


class RefusedError(OfframpError):
    """Input that is damaged, of unknown format, or unsafe to read."""

    exit_code = 4


class SourceError(RefusedError):
    """A model folder that cannot be divided."""


class PickleError(SourceError):
    """A checkpoint that only an unsafe unpickler could read."""


class StoreError(RefusedError):
    """A folder that is not a store, or an invalid store."""


class DamagedError(StoreError):
    """A file of a store differs from the description in its manifest."""


class VersionError(StoreError):
    """A manifest of a format version that this release cannot read."""


class StageError(RefusedError):
    """A module that cannot be divided into stages, or whose execution differs from its division."""


class NonFiniteError(RefusedError):
    """A stage produced NaN or infinite numbers."""


class ChangedError(RefusedError):
    """A model or data were replaced while they were used."""


class DiskFullError(OfframpError):
    """The device has no space left, or the system allows no more of it: a quota, or a limit of file sizes."""

    exit_code = 5

    def add_kept(self, kept: str) -> None:
        """Add to the remedy what the next attempt finds finished."""
        self.remedy, self.args = f"{self.remedy}: {kept}", (f"{self}: {kept}",)


class AbsentError(OfframpError):
    """Something that is asked for is not installed."""


class MissingExtraError(AbsentError):
    """An optional library is not installed. The message names the extra that installs it."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed", None, f"pip install 'offramp[{extra}]'")


def import_error(error: ImportError, library: str, extra: str) -> OfframpError:
    """Return the reason why an optional library cannot be imported: it is not installed, or it does not load."""
    if isinstance(error, ModuleNotFoundError):
        return MissingExtraError(library, extra)
    if is_out_of_memory(error):
        return BudgetError(f"not enough memory to load {library}", None, _MEMORY_REMEDY)
    reason = str(error).strip().partition("\n")[0]
    return OfframpError(f"{library} is installed but does not load ({reason})", None, f"install {library} again")


def missing(path: object, kind: str = "file or folder") -> UsageError:
    """Return the error of a path at which there is nothing. `kind` is what should be there."""
    return UsageError(f"no such {kind}", path, "check the path")


def require_folder(path: object, kind: str, remedy: str) -> None:
    """Raise UsageError unless a folder lies at a path. `kind` is what the folder should be."""
    if not os.path.isdir(str(path)):  # noqa: PTH112  # Path("") is the working folder, and Path.is_dir may raise
        what = "not a folder" if os.path.lexists(str(path)) else f"no such {kind}"
        raise UsageError(what, str(path) or repr(""), remedy)


class SystemNotice(UserWarning):
    """Warning that this system lacks a feature. The message names what is used instead."""


_MEMORY_REMEDY = "close other programs, or raise the limit of memory (ulimit -v)"
_NO_MEMORY = re.compile(
    "bad_alloc|bad allocation|failed to map segment|(cannot|can't|failed to|unable to) allocate", re.IGNORECASE
)
_NO_THREAD = re.compile("can't start new thread|pthread_create failed")
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")
_SYSTEM = (
    ("ENOSPC", DiskFullError, "no space left", "free some space and run again"),
    ("EDQUOT", DiskFullError, "the quota of the disk is used up", "free some space or raise the quota, and run again"),
    ("EFBIG", DiskFullError, "the limit of file sizes is reached", "raise it (ulimit -f unlimited) and run again"),
    ("ENOMEM", BudgetError, "not enough memory", _MEMORY_REMEDY),
    ("EMFILE ENFILE", UsageError, "too many open files", "raise the limit of open files: ulimit -n 1024"),
    ("EAGAIN", BudgetError, "no further thread or process can start", "raise the limits (ulimit -u, ulimit -v)"),
    ("EACCES EPERM EROFS", UsageError, "no permission", "check the permissions, or name another place"),
    ("EBUSY EXDEV ETXTBSY", UsageError, "in use, or a mount point", "name a folder inside it, or another place"),
    ("EIO ESTALE EREMOTEIO ENXIO ENODEV ETIMEDOUT", RefusedError, "a device fails", "check the disk or its connection"),
    ("ENOSYS EOPNOTSUPP ENOLCK EINVAL EBADF ENOTTY", UsageError, "not supported here", "use another file system"),
    ("ENOENT", UsageError, "no such file or folder", "check the path"),
)
"""Error numbers of the operating system -> class, what happened, and what to do."""
_OTHER = UsageError, "the system refuses", "check the path, or run again with --debug to see the call"


def system_error(error: BaseException) -> OfframpError | None:
    """Return the failure of the operating system that an exception reports as an OfframpError, or None.

    Libraries report such failures in their own exceptions: as their cause, or in the text.
    """
    number = _error_number(error)
    if number is None and not isinstance(error, OSError):
        return None if error.__cause__ is None else system_error(error.__cause__)
    name = errno.errorcode.get(number or 0, "")
    kind, what, remedy = next((row[1:] for row in _SYSTEM if name in row[0].split()), _OTHER)
    place = [shown(part) for part in (getattr(error, key, None) for key in ("filename", "filename2")) if part]
    if number == errno.ENOENT and isinstance(error, OSError) and not place:  # os.getcwd
        what, remedy = "the working folder was deleted", "change to a folder that exists"
    reason = os.strerror(number) if number else str(error).strip().partition("\n")[0]
    return kind(f"{what} ({reason})", " -> ".join(place) or None, remedy)


def disk_full(error: BaseException, where: object) -> DiskFullError | None:
    """Return an error that means that nothing more can be written at `where` as such, or None for any other."""
    found = system_error(error)
    if not isinstance(found, DiskFullError):
        return None
    return DiskFullError(found.what.rpartition(" (")[0], where, found.remedy)  # without the words of the system


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception reports that memory could not be allocated."""
    return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


def _error_number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if is_out_of_memory(error):
        return errno.ENOMEM
    if _NO_THREAD.search(str(error)):
        return errno.EAGAIN
    found = _RUST_ERROR.search(str(error))
    return None if found is None else int(found.group(1))
