"""What can go wrong, as one tree. Each class carries the exit code that the command line ends with.

    OfframpError                 1  ours
    ├── UsageError               2  arguments, target exists, unknown column or policy, empty input
    ├── BudgetError              3  no plan fits; names the smallest budget that would do
    ├── RefusedError             4  something that was read is damaged, foreign or refused
    │   ├── SourceError             a model folder: architecture, missing, extra or mis-shaped tensors
    │   │   └── PickleError         a pickle that `weights_only` cannot read safely
    │   ├── StoreError              a store
    │   │   ├── DamagedError        truncated, flipped, or not what the manifest says
    │   │   └── VersionError        a manifest of another version
    │   ├── StageError              a divided module that does not run as it was divided
    │   └── NonFiniteError          NaN or infinite logits, naming the stage
    ├── DiskFullError            5  no space left; nothing stays under the final name
    └── MissingExtraError        1  an optional library is not installed; says which to install

A message is one line: WHAT - WHERE - WHAT TO DO. Wrong arguments to functions are plain `ValueError`s.
Names in messages may come from a stranger's file: what is not printable is escaped, what is endless is cut.
"""

from __future__ import annotations

_LONGEST_PART = 1000
"""Characters; no path or remedy of an honest message is longer."""


class OfframpError(Exception):
    """Base of all errors of offramp. `where` and `remedy` follow `what` in the message."""

    exit_code = 1

    def __init__(self, what: str, where: object = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = shown(what), where, remedy
        super().__init__(" - ".join(shown(part) for part in (what, where, remedy) if part is not None))


def shown(part: object) -> str:
    """`part` as it may be printed: control characters would move the cursor or forge a second line."""
    text = str(part)
    if len(text) > _LONGEST_PART:
        text = text[: _LONGEST_PART // 2] + " ... " + text[-_LONGEST_PART // 2 :]
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class UsageError(OfframpError):
    """The user asked for something that cannot be."""

    exit_code = 2


class BudgetError(OfframpError):
    """No plan keeps the budget."""

    exit_code = 3


class RefusedError(OfframpError):
    """Something that was read is damaged, foreign or refused."""

    exit_code = 4


class SourceError(RefusedError):
    """A model folder that cannot be divided."""


class PickleError(SourceError):
    """A checkpoint that only an unsafe unpickler could read."""


class StoreError(RefusedError):
    """A folder that is not a store, or not a sound one."""


class DamagedError(StoreError):
    """A file of a store is not what its manifest says."""


class VersionError(StoreError):
    """A manifest that this version does not know."""


class StageError(RefusedError):
    """A module that cannot be divided into stages, or does not keep to those it was divided into."""


class NonFiniteError(RefusedError):
    """NaN or infinite numbers came out of a stage."""


class DiskFullError(OfframpError):
    """No space left on the device."""

    exit_code = 5


class MissingExtraError(OfframpError):
    """An optional library is missing."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed", None, f"pip install 'offramp[{extra}]'")
