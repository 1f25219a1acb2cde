"""Wording that refusals of divisions share."""

from collections.abc import Sequence

from offramp.errors import StageError
from offramp.errors import said as said


def listed(items: Sequence[str], num_shown: int = 5) -> str:
    """Return the first items, separated by commas."""
    return ", ".join(items[:num_shown]) + (", ..." if len(items) > num_shown else "")


def no_graph(what: str, where: object = None) -> StageError:
    """Return the error for a module that can be divided, but not into graphs."""
    return StageError(what, where, "use --method eager")
