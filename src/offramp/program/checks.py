"""Checked values of a JSON tree: each function returns what it was asked for, or raises `WrongError` naming where."""

from __future__ import annotations

import re
from typing import Any, Optional


class WrongError(Exception):
    """A value of the manifest that is not what it must be."""


def object_of(tree: Any, where: str, required: str) -> dict:
    """An object with these keys, separated by spaces, and no others."""
    if not isinstance(tree, dict):
        raise WrongError(f"{where} must be an object")
    missing = set(required.split()) - set(tree)
    unknown = set(tree) - set(required.split())
    if missing:
        raise WrongError(f"{where} lacks {sorted(missing)}")
    if unknown:
        raise WrongError(f"{where} has unknown keys {sorted(unknown)}")
    return tree


def list_of(tree: Any, where: str) -> list:
    """A list."""
    if not isinstance(tree, list):
        raise WrongError(f"{where} must be a list")
    return tree


def int_of(value: Any, where: str, low: int = 0, high: int = 1 << 53) -> int:
    """An integer within bounds, and no boolean."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise WrongError(f"{where} must be an integer from {low} to {high}, not {value!r}")
    return value


def str_of(value: Any, where: str, pattern: Optional[re.Pattern] = None) -> str:
    """A string that matches the pattern, if one is given."""
    if not isinstance(value, str) or (pattern is not None and not pattern.fullmatch(value)):
        raise WrongError(f"{where} must be a string{' like ' + pattern.pattern if pattern else ''}, not {value!r}")
    return value


def choice_of(value: Any, where: str, choices: tuple) -> Any:
    """One of some values."""
    if value not in choices:
        raise WrongError(f"{where} must be one of {choices}, not {value!r}")
    return value
