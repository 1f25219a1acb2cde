"""Exception tree of offramp. Each class carries the exit code of the command line.

    OfframpError                 1  base class
    ├── UsageError               2  wrong arguments, existing target, unknown column or policy, empty input
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
    └── MissingExtraError        1  an optional library is missing; the message names the extra to install

A message is one line: WHAT - WHERE - WHAT TO DO. Wrong arguments to functions raise plain `ValueError`. Messages can
quote names from untrusted files: control characters are escaped and long parts are shortened.
"""

from __future__ import annotations

import errno

_LONGEST_PART = 1000
"""Longest part of a message in characters; longer parts are shortened in the middle. Valid paths and remedies are
shorter."""


_OUT_OF_MEMORY = ("bad_alloc", "bad allocation", "allocate memory", "start new thread", "pthread_create failed")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an error, or what caused it, is that the system refuses memory or a thread.

    Libraries raise their own classes for it, so their messages decide.
    """
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if not isinstance(error, OfframpError) and any(words in str(error) for words in _OUT_OF_MEMORY):
            return True
        error = error.__cause__
    return False


class OfframpError(Exception):
    """Base class of all errors of offramp. `where` and `remedy` follow `what` in the message."""

    exit_code = 1

    def __init__(self, what: str, where: object = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = shown(what), where, remedy
        super().__init__(" - ".join(shown(part) for part in (what, where, remedy) if part is not None))


def shown(part: object) -> str:
    """Return `part` as printable text.

    Control characters are escaped, because they could move the cursor or forge a line; long text is shortened.
    """
    text = str(part)
    if len(text) > _LONGEST_PART:
        text = text[: _LONGEST_PART // 2] + " ... " + text[-_LONGEST_PART // 2 :]
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


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


class DiskFullError(OfframpError):
    """The device has no space left."""

    exit_code = 5


class MissingExtraError(OfframpError):
    """An optional library is not installed. The message names the extra that installs it."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed", None, f"pip install 'offramp[{extra}]'")
