"""Run a module's own forward code while at most a budget of its weights is in memory. Needs PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from offramp.errors import MissingExtraError

if TYPE_CHECKING:
    from offramp.streaming.opening import stream as stream

__all__ = ["stream"]

_HOMES = {
    "stream": "offramp.streaming.opening",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first access (PEP 562). Raises MissingExtraError where its library is not installed."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError("torch", "torch") from None
