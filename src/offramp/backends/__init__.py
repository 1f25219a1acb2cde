"""Compute backends: ONNX Runtime (default) and PyTorch. Importing the room imports neither library."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from offramp.errors import MissingExtraError

if TYPE_CHECKING:
    from offramp.backends.onnx import OrtBackend as OrtBackend
    from offramp.backends.onnx_segments import OrtSegments as OrtSegments
    from offramp.backends.torch import TorchBackend as TorchBackend
    from offramp.backends.torch_segments import TorchSegments as TorchSegments

__all__ = ["OrtBackend", "OrtSegments", "TorchBackend", "TorchSegments"]

_HOMES = {
    "OrtBackend": "offramp.backends.onnx",
    "OrtSegments": "offramp.backends.onnx_segments",
    "TorchBackend": "offramp.backends.torch",
    "TorchSegments": "offramp.backends.torch_segments",
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
