"""Checks of values in a JSON tree: each function returns the checked value or raises `WrongError` naming its place."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any, ItemsView, Mapping, Optional, Tuple


class WrongError(Exception):
    """A value of the manifest that is not allowed."""


def object_of(tree: Any, where: str, required: str) -> dict:
    """Return an object that has exactly the keys `required`, a list separated by spaces."""
    if not isinstance(tree, dict):
        raise WrongError(f"{where} must be an object")
    missing = set(required.split()) - set(tree)
    unknown = set(tree) - set(required.split())
    if missing:
        raise WrongError(f"{where} lacks {sorted(missing)}")
    if unknown:
        raise WrongError(f"{where} has unknown keys {sorted(unknown)}")
    return tree


def items_of(tree: Any, where: str) -> ItemsView[str, Any]:
    """Return the items of an object whose keys are free."""
    if not isinstance(tree, dict):
        raise WrongError(f"{where} must be an object")
    return tree.items()


def list_of(tree: Any, where: str) -> list:
    """Return a list."""
    if not isinstance(tree, list):
        raise WrongError(f"{where} must be a list")
    return tree


def int_of(value: Any, where: str, low: int = 0, high: int = 1 << 53) -> int:
    """Return an integer from `low` to `high`; a boolean is none."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise WrongError(f"{where} must be an integer from {low} to {high}, not {value!r}")
    return value


def str_of(value: Any, where: str, pattern: Optional[re.Pattern] = None) -> str:
    """Return a string that matches the pattern, if one is given."""
    if not isinstance(value, str) or (pattern is not None and not pattern.fullmatch(value)):
        raise WrongError(f"{where} must be a string{' like ' + pattern.pattern if pattern else ''}, not {value!r}")
    return value


def bool_of(value: Any, where: str) -> bool:
    """Return a boolean."""
    if not isinstance(value, bool):
        raise WrongError(f"{where} must be true or false, not {value!r}")
    return value


def names_of(tree: Any, where: str, pattern: Optional[re.Pattern] = None) -> Tuple[str, ...]:
    """Return a list of strings that match the pattern, if one is given."""
    return tuple(str_of(name, where, pattern) for name in list_of(tree, where))


def choice_of(value: Any, where: str, choices: tuple) -> Any:
    """Return one of `choices`."""
    if value not in choices:
        raise WrongError(f"{where} must be one of {choices}, not {value!r}")
    return value


def require_known(kind: type, tree: Mapping[str, Any], what: str) -> None:
    """Raise ValueError naming the keys of `tree` that are no fields of the dataclass `kind`, and listing the fields."""
    known = [each.name for each in fields(kind)]
    unknown = sorted(set(tree) - set(known))
    if unknown:
        raise ValueError(f"unknown {what} {', '.join(unknown)}; known: {', '.join(known)}")
