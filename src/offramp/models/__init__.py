"""Multiply with PyTorch. Importing the room imports no torch; asking it for a name does."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from offramp.errors import MissingExtraError

if TYPE_CHECKING:
    from offramp.models.backend import TorchBackend as TorchBackend
    from offramp.models.segment_backend import TorchSegments as TorchSegments
    from offramp.models.streaming import stream as stream

__all__ = ["TorchBackend", "TorchSegments", "stream"]

_HOMES = {
    "TorchBackend": "offramp.models.backend",
    "TorchSegments": "offramp.models.segment_backend",
    "stream": "offramp.models.streaming",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562). Raises MissingExtraError without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'offramp.models' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOMES[name]), name)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError("torch", "torch") from None
