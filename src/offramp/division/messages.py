"""Wording that refusals of divisions share."""

from collections.abc import Sequence

from offramp.errors import StageError


def listed(items: Sequence[str], num_shown: int = 5) -> str:
    """Return the first items, separated by commas."""
    return ", ".join(items[:num_shown]) + (", ..." if len(items) > num_shown else "")


def said(error: Exception) -> str:
    """Return the class of an exception and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def no_graph(what: str, where: object = None) -> StageError:
    """Return the error for a module that can be divided, but not into graphs."""
    return StageError(what, where, "use --method eager")
