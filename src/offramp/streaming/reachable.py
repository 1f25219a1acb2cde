"""Objects that an object refers to: elements, attributes, slots, and what functions are bound to."""

from collections import deque
from collections.abc import Mapping
from functools import partial
from types import FunctionType, MemberDescriptorType, MethodType
from typing import Any

CONTAINERS = (list, tuple, set, frozenset, deque)
"""Containers whose elements are referred to."""


def referents(part: Any) -> list[Any]:
    """Return the objects that `part` refers to, without those of its class."""
    if isinstance(part, Mapping):
        return list(part.values())
    if isinstance(part, CONTAINERS):
        return list(part)
    if isinstance(part, partial):
        return [part.func, part.args, part.keywords]
    if isinstance(part, MethodType):
        return [part.__self__, part.__func__]
    if isinstance(part, FunctionType):
        return [contents(cell) for cell in cells(part)] + [part.__defaults__, part.__kwdefaults__]
    return [*getattr(part, "__dict__", {}).values(), *slots(part).values()]


def slots(part: Any) -> dict[str, Any]:
    """Return the values of the slots of an object, by name."""
    found = {}
    for cls in type(part).__mro__ if not isinstance(part, type) else ():
        for name, value in vars(cls).items():
            if isinstance(value, MemberDescriptorType) and cls.__module__ != "builtins" and hasattr(part, name):
                found[name] = getattr(part, name)
    return found


def is_own_function(part: Any) -> bool:
    """Return whether a function is defined in offramp, such as one that surrounds the forward of a module."""
    return isinstance(part, FunctionType) and str(part.__globals__.get("__name__")).startswith("offramp.")


def cells(function: FunctionType) -> tuple[Any, ...]:
    """Return the cells of the variables that a function takes from around it."""
    return function.__closure__ or ()


def contents(cell: Any) -> Any:
    """Return what a cell holds, or None if it holds nothing yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
