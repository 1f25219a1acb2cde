"""Compute backends: ONNX Runtime (default) and PyTorch. Importing the room imports neither library."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from offramp.errors import MissingExtraError
from offramp.store.manifest import ModuleManifest

if TYPE_CHECKING:
    from offramp.backends.onnx import OrtBackend as OrtBackend
    from offramp.backends.onnx_segments import OrtSegments as OrtSegments
    from offramp.backends.torch import TorchBackend as TorchBackend
    from offramp.backends.torch_segments import TorchSegments as TorchSegments
    from offramp.runtime.backend import Backend
    from offramp.store import Store

__all__ = ["BACKENDS", "OrtBackend", "OrtSegments", "TorchBackend", "TorchSegments", "open_backend"]

BACKENDS = {"ort": ("OrtBackend", "OrtSegments"), "torch": ("TorchBackend", "TorchSegments")}
"""Backend name -> class for stores divided by names, class for stores divided by a run."""
_HOMES = {
    "OrtBackend": "offramp.backends.onnx",
    "OrtSegments": "offramp.backends.onnx_segments",
    "TorchBackend": "offramp.backends.torch",
    "TorchSegments": "offramp.backends.torch_segments",
}


def open_backend(name: str, store: Store, num_threads: int) -> Backend:
    """Return the backend called `name`, with the kernels of `store`.

    Raises ValueError for an unknown name, MissingExtraError where the library of the backend is not installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {name!r}")
    return __getattr__(BACKENDS[name][isinstance(store.contents, ModuleManifest)])(store, num_threads)


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
